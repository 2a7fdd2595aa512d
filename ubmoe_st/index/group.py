"""Several indexes searched as one: shards that were built apart, by one model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from .core import EmbeddingIndex
from .embedder import check_probes
from .filters import Filter
from .rerank import Method, Reranking
from .search import Hit, Searcher, check_k, check_parameters


class IndexGroup:
    """Searches several indexes of one model together, each as it is.

    The results are those of one index over the rows of all, in the order given: scores are exact cosines, and equal
    scores come in that order.

    Args:
        indexes: Open indexes.

    Raises:
        TypeError: If it is no list of open indexes.
        ValueError: If there is none, or their vectors are of different models.
    """

    def __init__(self, indexes: Sequence[EmbeddingIndex]) -> None:
        if isinstance(indexes, EmbeddingIndex):
            raise TypeError("a group is of several open indexes, got one: give a list")
        indexes = list(indexes)
        if not indexes:
            raise ValueError("a group needs at least one index, got none")
        for index in indexes:
            if not isinstance(index, EmbeddingIndex):
                raise TypeError(f"a group is of open indexes, got {index!r}: open folders with IndexGroup.open([...])")
        self.indexes = indexes
        self._searchers()

    @classmethod
    def open(cls, paths: Sequence[str | os.PathLike[str]], *, model: Any = None, verify: bool = False) -> IndexGroup:
        """Open several index folders.

        Args:
            paths: The folders, as a list.
            model: The model for text queries, as in `EmbeddingIndex.open`. None loads the one the first remembers.
            verify: Check every file first.

        Raises:
            TypeError: If it is one path.
        """
        if isinstance(paths, (str, bytes, os.PathLike)):
            raise TypeError(f"a group is of several folders, got one, {os.fspath(paths)!r}: give a list")
        group = cls([EmbeddingIndex.open(path, verify=verify) for path in paths])
        if model is not None:
            group.use_model(model)
        return group

    def __len__(self) -> int:
        return sum(len(index) for index in self.indexes)

    def __repr__(self) -> str:
        return f"IndexGroup({len(self.indexes)} indexes, rows={len(self):,}, dimension={self.dimension})"

    @property
    def dimension(self) -> int:
        """Dimensions of the stored vectors."""
        return self.indexes[0].dimension

    @property
    def model(self) -> Any:
        """The embedding model."""
        return self.indexes[0].model

    def use_model(self, model: Any) -> None:
        """Take `model` for text queries, after checking that it is the one the indexes were built with."""
        self.indexes[0].use_model(model)

    def refresh(self) -> bool:
        """Move every index to its newest committed version; True if there was a newer one."""
        return any([index.refresh() for index in self.indexes])

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        filter: Filter | None = None,
        exact: bool = False,
        parameters: dict[str, int] | None = None,
        rerank: int | Method | None = None,
        candidates: int | None = None,
    ) -> tuple[np.ndarray, list[list[str]]]:
        """Cosines and ids of the nearest entries of all indexes, best first. Arguments as in `EmbeddingIndex.search`.

        Returns:
            Scores, float32, (Q, K), and ids, Q lists of K.
        """
        searchers = self._searchers()
        order = Reranking.of(rerank, candidates)
        scores, members, rows = self._reranked(searchers, queries, k, filter, exact, parameters, order)
        ids = [[""] * len(line) for line in rows]
        for number, searcher in enumerate(searchers):
            places = np.argwhere(members == number)
            names = searcher.snapshot.ids_at(rows[members == number])
            for (query, column), name in zip(places.tolist(), names):
                ids[query][column] = name
        return scores, ids

    def search_entries(
        self,
        queries: Any,
        k: int = 10,
        *,
        filter: Filter | None = None,
        exact: bool = False,
        parameters: dict[str, int] | None = None,
        rerank: int | Method | None = None,
        candidates: int | None = None,
    ) -> list[list[Hit]]:
        """The nearest entries of all indexes, best first; `Hit.index` says which each is from."""
        searchers = self._searchers()
        order = Reranking.of(rerank, candidates)
        found = self._reranked(searchers, queries, k, filter, exact, parameters, order)
        return [
            [searchers[member].hit_at(row, score) for score, member, row in zip(*line)]
            for line in zip(*(part.tolist() for part in found))
        ]

    def _searchers(self) -> list[Searcher]:
        """Of the versions that the indexes read now: one search stays with them.

        Raises:
            ValueError: If they are of different models, as after one was built anew.
        """
        searchers = [index.searcher for index in self.indexes]
        first = searchers[0].snapshot
        for other in (one.snapshot for one in searchers[1:]):
            try:
                check_probes(other.probes, first.probes)
            except ValueError as error:
                raise ValueError(f"{other.folder} cannot be searched together with {first.folder}: {error}") from error
        return searchers

    def _reranked(
        self,
        searchers: Sequence[Searcher],
        queries: Any,
        k: int,
        spec: Filter | None,
        exact: bool,
        parameters: dict[str, int] | None,
        order: Reranking | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `_nearest`, the first results in the order of `order`."""
        if order is None:
            return self._nearest(searchers, queries, k, spec, exact, parameters)
        check_k(k)
        asked = order.check(queries, self.model)
        found = self._nearest(searchers, queries, max(k, order.candidates), spec, exact, parameters)
        _, members, rows = (part[:, : order.candidates].tolist() for part in found)
        entries = [
            [searchers[member].snapshot.entry_at(row) for member, row in zip(*line)] for line in zip(members, rows)
        ]
        places = order.order(self.indexes[0].embedder, asked, entries, found[0].shape[1])[:, :k]
        scores, members, rows = (np.take_along_axis(part, places, 1) for part in found)
        return scores, members, rows

    def _nearest(
        self,
        searchers: Sequence[Searcher],
        queries: Any,
        k: int,
        spec: Filter | None,
        exact: bool,
        parameters: dict[str, int] | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores, numbers of the indexes and rows in them, (Q, K) each."""
        vectors = self.indexes[0].query_vectors(queries)
        check_parameters(parameters)
        own = [one.fitting(parameters) for one in searchers]
        if strange := sorted((parameters or {}).keys() - set().union(*own)):
            raise ValueError(f"no index of the group has {strange[0]}: leave it out")
        parts = [one.search(vectors, k, one.allowed(spec), exact, mine) for one, mine in zip(searchers, own)]
        scores, rows = (np.concatenate(arrays, axis=1) for arrays in zip(*parts))
        members = np.repeat(np.arange(len(parts)), [part.shape[1] for part, _ in parts])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, 1), members[order], np.take_along_axis(rows, order, 1)
