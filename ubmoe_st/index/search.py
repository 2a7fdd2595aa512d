"""Search over one snapshot: exact, through a faiss index, or joined with keywords; always scored by exact cosines."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from ..forking import ForkSafeLock
from .embedder import plain_texts
from .exact import SLACK, TopK, exact_search, pair_scores
from .filters import Filter, FilterEngine
from .hybrid import KeywordSearch, fuse, fuse_weighted
from .kinds import can_select, candidates, parameters_of, read_index
from .manifest import FileRecord, Manifest
from .store import BLOCK_BYTES, Snapshot

logger = logging.getLogger(__name__)

FUSION_DEPTH = 100
"""Results of each search that reciprocal rank fusion looks at, at least."""
PARAMETERS = ("nprobe", "efSearch", "rerank")
"""What `parameters` of a search may hold."""
QUERY_BLOCK = 256
"""Queries that faiss gets at a time."""
RERANK_BYTES = 16 << 20
"""Vectors of candidates compared at a time, in bytes of float32."""

Mode = Literal["dense", "bm25", "hybrid"]


@dataclass(frozen=True)
class SearchSettings:
    """What bounds the work of a search without changing what it finds."""

    few_rows: int = 20_000
    """When a filter, or the death of most rows, leaves no more rows than this, they are all compared."""
    block_bytes: int = BLOCK_BYTES
    """Stored vectors compared at a time, in bytes of float32."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result."""

    id: str
    score: float
    """Cosine of query and entry."""
    text: str
    title: str | None
    parent: str | None
    """Id of the document a chunk was cut from; None for a whole document."""
    start: int
    """First character of `text` in its document."""
    end: int
    """Character after the last one."""
    metadata: dict[str, Any]
    """Other fields of the corpus row."""
    row: int
    """Row number in this version of the index."""
    index: str
    """Folder of the index."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Searcher:
    """Finds rows. Holds no state of a search, so threads may share it.

    Args:
        snapshot: What to search.
        settings: See `SearchSettings`.
    """

    def __init__(self, snapshot: Snapshot, settings: SearchSettings | None = None) -> None:
        self.snapshot = snapshot
        self.settings = settings or SearchSettings()
        self._keywords = KeywordSearch(snapshot)
        self._filters = FilterEngine(snapshot)
        self._shards: list[tuple[int, Any]] | None = None
        self._lock = ForkSafeLock()

    @property
    def shards(self) -> list[tuple[int, Any]]:
        """The faiss indexes of this version with their first rows, opened on first use; none for a flat one."""
        record = self.snapshot.manifest.index
        if record.kind == "flat":
            return []
        with self._lock:
            if self._shards is None:
                self._shards = self._opened(record.files)
            return self._shards

    def _opened(self, files: list[FileRecord]) -> list[tuple[int, Any]]:
        folder, manifest = self.snapshot.folder, self.snapshot.manifest
        shards: list[tuple[int, Any]] | None = None
        with contextlib.suppress(FileNotFoundError):
            shards = [(file.first_row or 0, read_index(folder / file.file)) for file in files]
        current = Manifest.read(folder)
        if shards is None and current.is_version(manifest):
            missing = next((file.file for file in files if not (folder / file.file).is_file()), files[0].file)
            raise FileNotFoundError(f"{folder / missing} is missing: restore it, or make it again with reindex()")
        # A name that a later version did not need may be taken again by one after that.
        there = {(file.file, file.sha256) for file in current.index.files}
        if shards is not None and there >= {(file.file, file.sha256) for file in files}:
            return shards
        logger.warning(
            "a writer has replaced the faiss index of %s since it was opened: searching it exactly until refresh()",
            folder,
        )
        return []

    def fitting(self, parameters: dict[str, int] | None) -> dict[str, int]:
        """Those search parameters that the index of this version has; all for a flat one, which is exact with any."""
        shards = self.shards if parameters else []
        names = parameters_of(shards[0][1]) if shards else PARAMETERS
        return {name: value for name, value in (parameters or {}).items() if name in names}

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
        few_rows: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and rows of the nearest allowed rows, best first.

        Args:
            vectors: Unit query vectors, (Q, D).
            k: How many; cut to the number of allowed rows.
            allowed: From `allowed`.
            exact: Compare with every allowed row, whatever the kind.
            parameters: Search parameters instead of the stored ones; those that are not named stay as stored.
            few_rows: As in `SearchSettings`, for this search.

        Returns:
            Scores, float32, (Q, K), and rows, (Q, K).
        """
        check_k(k)
        check_parameters(parameters)
        if parameters and (strange := sorted(parameters.keys() - self.fitting(parameters).keys())):
            raise ValueError(
                f"a search of kind {self.snapshot.manifest.index.kind} has no {strange[0]}, expected "
                f"{' or '.join(parameters_of(self.shards[0][1]))}: leave it out"
            )
        snapshot = self.snapshot
        count = snapshot.stored_rows if allowed is None else int(np.count_nonzero(allowed))
        k = min(k, count)
        if not k or not len(vectors):
            return np.zeros((len(vectors), k), np.float32), np.zeros((len(vectors), k), np.int64)
        found = TopK(vectors, k, SLACK[snapshot.manifest.dtype])
        few = self.settings.few_rows if few_rows is None else few_rows
        # Some dead rows are no filter; among many the index finds the live ones no better than behind one.
        filtered = allowed is not None and (allowed is not snapshot.alive or 2 * count < snapshot.stored_rows)
        shards = [] if exact or (filtered and count <= few) else self.shards
        if not shards:
            exact_search(snapshot.blocks(0, self.settings.block_bytes), allowed, found)
        else:
            settings = {**snapshot.manifest.index.parameters, **(parameters or {})}
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
        covered = snapshot.manifest.index.rows
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
        exact_search(snapshot.blocks(covered, self.settings.block_bytes), allowed, found)
        short = found.short()
        if len(short):  # the index proposed too few, through a filter or too few cells
            again = TopK(vectors[short], k, SLACK[snapshot.manifest.dtype])
            exact_search(snapshot.blocks(0, self.settings.block_bytes), allowed, again)
            found.replace(short, again)

    def find(
        self,
        queries: Any,
        to_vectors: Callable[[Any], np.ndarray],
        k: int,
        spec: Filter | None,
        mode: Mode,
        weight: float | None,
        exact: bool,
        parameters: dict[str, int] | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores, float32, (Q, K), and rows, (Q, K), as `EmbeddingIndex.search` wants them; -1 is no row.

        Args:
            queries: As in `EmbeddingIndex.search`, like the rest.
            to_vectors: Queries to unit vectors, (Q, D).
            k: How many.
            spec: Only rows that pass.
            mode: How to search.
            weight: Share of the vectors in `hybrid`.
            exact: Compare with every row.
            parameters: Search parameters instead of the stored ones.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"mode is dense, bm25 or hybrid, got {mode!r}")
        if weight is not None and (mode != "hybrid" or not 0 <= weight <= 1):
            raise ValueError(f"weight is the share of the vectors in mode='hybrid', 0 to 1; got {weight!r}, {mode!r}")
        texts = plain_texts(queries)
        if mode != "dense" and not (isinstance(texts, (list, tuple)) and all(isinstance(t, str) for t in texts)):
            raise TypeError(f"mode={mode!r} needs queries as texts, got {type(queries).__name__}")
        vectors = to_vectors(texts)
        if mode == "dense":
            return self.search(vectors, k, self.allowed(spec), exact, parameters)
        return self.search_words(texts, vectors, k, spec, mode == "hybrid", weight, exact, parameters)

    def search_words(
        self,
        texts: Sequence[str],
        vectors: np.ndarray,
        k: int,
        spec: Filter | None,
        hybrid: bool,
        weight: float | None = None,
        exact: bool = False,
        parameters: dict[str, int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows in the order of BM25, or of its fusion with the cosines, with their cosines.

        Args:
            texts: The queries, Q.
            vectors: The same as unit vectors, (Q, D).
            k: How many.
            spec: Only rows that pass.
            hybrid: Whether to join them with the nearest rows.
            weight: Share of the nearest rows in the fusion. None: reciprocal rank fusion.
            exact: As in `search`, for these.
            parameters: As in `search`, for these.

        Returns:
            Scores, float32, (Q, K), and rows, (Q, K); NaN and -1 where there are no more.
        """
        check_k(k)
        allowed = self.allowed(spec)
        depth = max(FUSION_DEPTH, 4 * k)
        words = self._keywords.search(texts, depth, allowed)
        cosines, dense = self.search(vectors, depth, allowed, exact, parameters) if hybrid else (None, None)
        width = min(k, len(self.snapshot) if allowed is None else int(np.count_nonzero(allowed)))
        scores = np.full((len(vectors), width), np.nan, np.float32)
        rows = np.full((len(vectors), width), -1, np.int64)
        for number, (found, points) in enumerate(words):
            if cosines is None or dense is None:
                line = found[:width]
            elif weight is None:
                line = fuse([found, dense[number]], width)
            else:
                line = fuse_weighted([(dense[number], cosines[number]), (found, points)], [weight, 1 - weight], width)
            rows[number, : len(line)] = line
            scores[number, : len(line)] = pair_scores(vectors[number], self.snapshot.vectors_at(line))
        return scores, rows

    def hit_at(self, row: int, score: float) -> Hit:
        """A row as a search result with this score."""
        entry = self.snapshot.entry_at(row)
        metadata = json.loads(entry.metadata) if entry.metadata else {}
        span = (entry.start, entry.end)
        return Hit(
            entry.id, score, entry.text, entry.title, entry.parent, *span, metadata, row, str(self.snapshot.folder)
        )


def check_k(k: Any) -> None:
    """Refuse a number of results that is none."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"k is a whole number of at least 1, got {k!r}")


def check_parameters(parameters: Any) -> None:
    """Refuse search parameters that no index has."""
    for name, value in dict(parameters or {}).items():
        if name not in PARAMETERS or isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(
                f"parameters are {', '.join(PARAMETERS)}, whole numbers of at least 1; got {name}={value!r}"
            )
