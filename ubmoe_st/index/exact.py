"""Exact search: cosines against every stored vector, block by block, with stable ties.

A block's products are float32 (fast, but rounded differently by position and batch). Rows that may belong to the best K
are then scored again one by one in float64, so a score depends on the two vectors only and equal vectors tie. Ties go
to the lower row.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

SPARE = 8
"""Rows of a list, beyond K, that are scored exactly because rounding might have hidden one of the best."""
PRODUCT_BYTES = 64 << 20
"""Products of queries with a block held at a time, however many queries there are."""


def pair_scores(query: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Cosines, (..., n), of unit queries, (..., D), with stored vectors, (..., n, D): float64 sums in a fixed order."""
    wide = vectors.astype(np.float64)
    products = (wide * query.astype(np.float64)[..., None, :]).sum(axis=-1)
    norms = np.sqrt((wide * wide).sum(axis=-1))
    return (products / np.where(norms > 0, norms, 1.0)).astype(np.float32)


def best(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The K highest scores, along the last axis, with their rows: falling score, then rising row."""
    order = np.lexsort((rows, -scores), axis=-1)[..., :k]
    return np.take_along_axis(scores, order, -1), np.take_along_axis(rows, order, -1)


class TopK:
    """Collects the best K rows of each query over many blocks.

    Args:
        queries: Unit vectors, float32, (Q, D).
        k: Rows to keep per query.
        slack: How far a float32 block product may be from the exact cosine.
    """

    def __init__(self, queries: np.ndarray, k: int, slack: float) -> None:
        self._queries, self._k, self._slack = queries, k, slack
        self._scores = np.full((len(queries), k), -np.inf, np.float32)
        self._rows = np.full((len(queries), k), -1, np.int64)

    def add(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Take in a block: rows, (n,), and their vectors, (n, D) of any float type."""
        if not len(rows):
            return
        block = np.ascontiguousarray(vectors, dtype=np.float32)
        step = max(1, PRODUCT_BYTES // (4 * len(block)))
        for first in range(0, len(self._queries), step):
            self._add(first, self._queries[first : first + step] @ block.T, rows, block)

    def _add(self, first: int, products: np.ndarray, rows: np.ndarray, block: np.ndarray) -> None:
        """Take in the products, (q, n), of the queries from number `first` on with a block."""
        thresholds = self._scores[first : first + len(products), -1] - self._slack
        for number, (line, threshold) in enumerate(zip(products, thresholds), first):
            chosen = np.flatnonzero(line >= threshold)
            if len(chosen) > self._k:
                values = line[chosen]
                top = float(np.partition(values, len(values) - self._k)[len(values) - self._k])
                chosen = chosen[values >= top - 2 * self._slack]
            if len(chosen):
                self._keep(number, pair_scores(self._queries[number], block[chosen]), rows[chosen])

    def add_lists(self, first: int, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Take in a list of rows for each query from number `first` on.

        Args:
            first: Number of the first query.
            rows: (q, W), -1 for none.
            vectors: Of these rows, float32, (q, W, D).
        """
        queries = self._queries[first : first + len(rows)]
        width = self._k + SPARE
        if rows.shape[1] > width:
            products = np.matmul(vectors, queries[:, :, None])[:, :, 0]  # (q, W)
            products[rows < 0] = -np.inf
            order = np.argpartition(-products, width - 1, axis=1)[:, :width]
            kept = np.take_along_axis(products, order, 1)
            top = np.partition(kept, SPARE, axis=1)[:, SPARE]
            unsure = (kept[:, -1] >= top - 2 * self._slack) & (kept[:, -1] > -np.inf)
            for number in np.flatnonzero(unsure).tolist():  # more than SPARE nearly tie with the last of the best
                found = rows[number] >= 0
                scores = pair_scores(queries[number], vectors[number][found])
                self._keep(first + number, scores, rows[number][found])
            rows = np.take_along_axis(rows, order, 1)
            rows[unsure] = -1
            vectors = np.take_along_axis(vectors, order[:, :, None], 1)
        scores = pair_scores(queries, vectors)
        scores[rows < 0] = -np.inf
        self._keep(slice(first, first + len(rows)), scores, rows)

    def _keep(self, numbers: int | slice, scores: np.ndarray, rows: np.ndarray) -> None:
        """Merge exactly scored rows into what is kept for a query or several."""
        self._scores[numbers], self._rows[numbers] = best(
            np.concatenate([self._scores[numbers], scores], axis=-1),
            np.concatenate([self._rows[numbers], rows], axis=-1),
            self._k,
        )

    def short(self) -> np.ndarray:
        """Queries with fewer than K rows so far."""
        return np.flatnonzero(self._rows[:, -1] < 0)

    def replace(self, numbers: np.ndarray, other: TopK) -> None:
        """Put the results of `other` in place for the queries `numbers`."""
        self._scores[numbers], self._rows[numbers] = other._scores, other._rows

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows, (Q, K), falling score; -1 where there was no row."""
        return self._scores, self._rows


SLACK = {"float32": 2e-6, "float16": 2e-3}
"""Bound on |block product - exact cosine|, by type of the stored vectors (float16 ones are not quite unit length)."""


def exact_search(blocks: Iterable[tuple[int, np.ndarray]], allowed: np.ndarray | None, into: TopK) -> None:
    """Offer every allowed row of `blocks` to `into`.

    Args:
        blocks: (first row, vectors (n, D)).
        allowed: Which rows may be found, bool (N,); None: all.
        into: Collects the result.
    """
    for start, vectors in blocks:
        rows = np.arange(start, start + len(vectors), dtype=np.int64)
        if allowed is not None:
            mask = allowed[start : start + len(vectors)]
            rows, vectors = rows[mask], vectors[mask]
        into.add(rows, vectors)
