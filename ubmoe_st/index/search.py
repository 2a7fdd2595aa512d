"""Search over one snapshot: exact or through a faiss index, with filters, always scored by exact cosines."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np

from .exact import SLACK, TopK, exact_search
from .filters import Filter, FilterEngine
from .kinds import can_select, candidates, read_index
from .snapshot import Snapshot, read_info

logger = logging.getLogger(__name__)

FEW_ROWS = 20_000
"""When a filter leaves no more rows than this, they are all compared."""
QUERY_BLOCK = 256
"""Queries that faiss gets at a time."""
RERANK_BYTES = 16 << 20
"""Vectors of candidates compared at a time, in bytes of float32."""


class Searcher:
    """Finds rows. Holds no state of a search, so threads may share it.

    Args:
        snapshot: What to search.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._filters = FilterEngine(snapshot)
        self._shards: list[tuple[int, Any]] | None = None
        self._lock = threading.Lock()

    @property
    def shards(self) -> list[tuple[int, Any]]:
        """The faiss indexes of this version with their first rows, opened on first use; none for a flat one."""
        record = self.snapshot.info["index"]
        if record["kind"] == "flat":
            return []
        with self._lock:
            if self._shards is None:
                self._shards = self._opened(record["files"])
            return self._shards

    def _opened(self, files: list[dict[str, Any]]) -> list[tuple[int, Any]]:
        folder = self.snapshot.folder
        try:
            return [(file["first_row"], read_index(folder / file["file"])) for file in files]
        except FileNotFoundError:
            if read_info(folder)["version"] == self.snapshot.version:
                raise
            logger.warning(
                "a writer has replaced the faiss index of %s since it was opened: searching it exactly until refresh()",
                folder,
            )
            return []

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
        shards = [] if exact or (allowed is not None and count <= FEW_ROWS) else self.shards
        if not shards:
            exact_search(snapshot.blocks(), allowed, found)
        else:
            settings = parameters if parameters is not None else snapshot.info["index"]["parameters"]
            self._through(shards, vectors, k, count, allowed, settings, found)
        return found.result()

    def _through(
        self,
        shards: list[tuple[int, Any]],
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
        selecting = within is not None and can_select(shards[0][1])
        if within is not None and not selecting:
            share = max(1e-3, float(np.count_nonzero(within)) / max(1, covered))
            wanted = min(covered, int(wanted / share) + k)
        for start in range(0, len(vectors), QUERY_BLOCK):
            block = vectors[start : start + QUERY_BLOCK]
            rows = candidates(shards, block, wanted, parameters, within if selecting else None)
            if within is not None and not selecting:
                rows[~within[rows]] = -1
            step = max(1, RERANK_BYTES // (4 * snapshot.dimension * rows.shape[1]))
            for local in range(0, len(rows), step):
                lists = rows[local : local + step]
                fetched = snapshot.vectors_at(np.maximum(lists, 0).ravel())
                found.add_lists(start + local, lists, fetched.reshape(*lists.shape, snapshot.dimension))
        exact_search(snapshot.blocks(covered), allowed, found)
        short = found.short()
        if len(short):  # the index proposed too few, through a filter or too few cells
            again = TopK(vectors[short], k, SLACK[snapshot.info["dtype"]])
            exact_search(snapshot.blocks(), allowed, again)
            found.replace(short, again)
