"""Exact search: cosines against every stored vector, block by block, with stable ties.

A block's products are float32 (fast, but rounded differently by position and batch). Rows that may belong to the best K
are then scored again one by one in float64, so a score depends on the two vectors only and equal vectors tie. Ties go
to the lower row.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def pair_scores(query: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Cosines of a unit query, (D,), with stored vectors, (n, D), summed in float64 in a fixed order: (n,)."""
    wide = vectors.astype(np.float64)
    products = (wide * query.astype(np.float64)).sum(axis=1)
    norms = np.sqrt((wide * wide).sum(axis=1))
    return (products / np.where(norms > 0, norms, 1.0)).astype(np.float32)


def best(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The K highest scores with their rows: falling score, then rising row."""
    order = np.lexsort((rows, -scores))[:k]
    return scores[order], rows[order]


class TopK:
    """Collects the best K rows of each query over many blocks.

    Args:
        queries: Unit vectors, float32, (Q, D).
        k: Rows to keep per query.
        slack: How far a float32 block product may be from the exact cosine.
    """

    def __init__(self, queries: np.ndarray, k: int, slack: float) -> None:
        self._queries, self._k, self._slack = queries, k, slack
        self._scores = [np.zeros(0, np.float32) for _ in queries]
        self._rows = [np.zeros(0, np.int64) for _ in queries]

    def add(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Take in a block: rows, (n,), and their vectors, (n, D) of any float type."""
        if not len(rows):
            return
        block = np.ascontiguousarray(vectors, dtype=np.float32)
        products = self._queries @ block.T  # (Q, n)
        for number, line in enumerate(products):
            self._choose(number, line, rows, block)

    def add_for(self, number: int, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Take in rows, (n,), with float32 vectors, (n, D), for query `number` alone."""
        if len(rows):
            self._choose(number, vectors @ self._queries[number], rows, vectors)

    def _choose(self, number: int, line: np.ndarray, rows: np.ndarray, block: np.ndarray) -> None:
        """Of a block with float32 products `line`, (n,), score those exactly that can be among the best K."""
        kept = self._scores[number]
        threshold = float(kept[-1]) - self._slack if len(kept) == self._k else -np.inf
        chosen = np.flatnonzero(line >= threshold)
        if len(chosen) > self._k:
            products = line[chosen]
            top = float(np.partition(products, len(products) - self._k)[len(products) - self._k])
            chosen = chosen[products >= top - 2 * self._slack]
        if len(chosen):
            self.offer(number, rows[chosen], block[chosen])

    def offer(self, number: int, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Score some rows exactly for query `number` and keep the best."""
        scores = pair_scores(self._queries[number], vectors)
        self._scores[number], self._rows[number] = best(
            np.concatenate([self._scores[number], scores]), np.concatenate([self._rows[number], rows]), self._k
        )

    def short(self, k: int) -> np.ndarray:
        """Queries with fewer than K rows so far."""
        return np.array([number for number, rows in enumerate(self._rows) if len(rows) < k], np.int64)

    def replace(self, numbers: np.ndarray, other: TopK) -> None:
        """Put the results of `other` in place for the queries `numbers`."""
        for position, number in enumerate(numbers.tolist()):
            self._scores[number], self._rows[number] = other._scores[position], other._rows[position]

    def result(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per query: scores and rows, falling score."""
        return list(zip(self._scores, self._rows))


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
