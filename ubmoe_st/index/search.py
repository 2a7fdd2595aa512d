"""Search over one snapshot: exact or through a faiss index, with filters, always scored by exact cosines."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from .exact import SLACK, TopK, exact_search
from .filters import Filter, FilterEngine
from .kinds import can_select, candidates, read_index
from .snapshot import Snapshot

FEW_ROWS = 20_000
"""When a filter leaves no more rows than this, they are all compared."""
QUERY_BLOCK = 64
"""Queries whose candidates are handled at a time."""


class Searcher:
    """Finds rows. Holds no state of a search, so threads may share it.

    Args:
        snapshot: What to search.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._filters = FilterEngine(snapshot)
        self._faiss: Any = None
        self._lock = threading.Lock()

    @property
    def faiss_index(self) -> Any:
        """The faiss index of this version, opened on first use; None for a flat one."""
        record = self.snapshot.info["index"]
        if record is None or record["kind"] == "flat":
            return None
        with self._lock:
            if self._faiss is None:
                self._faiss = read_index(self.snapshot.folder / record["file"])
            return self._faiss

    def allowed(self, spec: Filter | None) -> np.ndarray | None:
        """Rows that may be found, bool (N,); None when all are."""
        alive = self.snapshot.alive
        if spec is None:
            return alive
        mask = self._filters.mask(spec)
        return mask if alive is None else mask & alive

    def search(
        self,
        vectors: np.ndarray,
        k: int,
        allowed: np.ndarray | None,
        exact: bool = False,
        parameters: dict[str, int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and rows of the nearest allowed rows, best first.

        Args:
            vectors: Unit query vectors, (Q, D).
            k: How many; cut to the number of allowed rows.
            allowed: From `allowed`.
            exact: Compare with every allowed row, whatever the kind.
            parameters: Search parameters instead of the stored ones.

        Returns:
            Scores, float32, (Q, K), and rows, (Q, K).
        """
        snapshot = self.snapshot
        count = snapshot.stored_rows if allowed is None else int(np.count_nonzero(allowed))
        k = min(k, count)
        if not k or not len(vectors):
            return np.zeros((len(vectors), k), np.float32), np.zeros((len(vectors), k), np.int64)
        found = TopK(vectors, k, SLACK[snapshot.info["dtype"]])
        index = None if exact or (allowed is not None and count <= FEW_ROWS) else self.faiss_index
        if index is None:
            exact_search(snapshot.blocks(), allowed, found)
        else:
            settings = parameters if parameters is not None else snapshot.info["index"]["parameters"]
            self._through(index, vectors, k, count, allowed, settings, found)
        results = found.result()
        return np.stack([scores for scores, _ in results]), np.stack([rows for _, rows in results])

    def _through(
        self,
        index: Any,
        vectors: np.ndarray,
        k: int,
        count: int,
        allowed: np.ndarray | None,
        parameters: dict[str, int],
        found: TopK,
    ) -> None:
        """Candidates from faiss, exact cosines from the stored vectors; rows added since are compared one by one."""
        snapshot = self.snapshot
        covered = snapshot.info["index"]["rows"]
        within = None if allowed is None else allowed[:covered]
        wanted = min(covered, k * max(1, parameters.get("rerank", 1)))
        selecting = within is not None and can_select(index)
        if within is not None and not selecting:
            share = max(1e-3, float(np.count_nonzero(within)) / max(1, covered))
            wanted = min(covered, int(wanted / share) + k)
        for start in range(0, len(vectors), QUERY_BLOCK):
            block = vectors[start : start + QUERY_BLOCK]
            rows = candidates(index, block, wanted, parameters, within if selecting else None)
            for number, line in enumerate(rows, start=start):
                line = line[line >= 0]
                if within is not None and not selecting:
                    line = line[within[line]]
                line = np.sort(line)
                found.add_for(number, line, snapshot.vectors_at(line))
        exact_search(snapshot.blocks(covered), allowed, found)
        short = found.short(k)
        if len(short):  # the index proposed too few, through a filter or too few cells
            again = TopK(vectors[short], k, SLACK[snapshot.info["dtype"]])
            exact_search(snapshot.blocks(), allowed, again)
            found.replace(short, again)
