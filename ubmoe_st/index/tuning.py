"""Tuning: the fastest search parameters that reach a recall, measured against brute force."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..configuration import check_count
from .kinds import parameter_grid
from .search import Searcher, check_k


@dataclass(frozen=True)
class Trial:
    """One setting, measured."""

    parameters: dict[str, int]
    recall: float
    """Part of the true K nearest that were found."""
    queries_per_second: float


@dataclass(frozen=True)
class TuningReport:
    """What `EmbeddingIndex.tune` found."""

    kind: str
    k: int
    queries: int
    source: str
    """Where the queries came from."""
    target: float
    reached: bool
    chosen: Trial
    flat_queries_per_second: float
    """Exact search of the same queries."""
    trials: list[Trial]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def recall_of(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean part of the true rows, (Q, K), that are among the found rows, (Q, K)."""
    hits = [len(np.intersect1d(a, b)) for a, b in zip(found, truth)]
    return float(np.mean(hits)) / truth.shape[1] if truth.size else 1.0


def held_back_queries(searcher: Searcher, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stored vectors of random live rows as queries, and those rows, which are then left out of the search.

    Returns:
        Vectors, (Q, D), and rows, (Q,).
    """
    snapshot = searcher.snapshot
    alive = snapshot.alive
    live: Any = snapshot.stored_rows if alive is None else np.flatnonzero(alive)
    rows = np.random.default_rng(seed).choice(live, min(count, len(snapshot)), replace=False)
    rows = np.sort(rows).astype(np.int64)
    return snapshot.vectors_at(rows), rows


def tune(
    searcher: Searcher, recall: float, k: int, queries: np.ndarray | None, count: int, seed: int = 0
) -> TuningReport:
    """Try settings from cheap to dear and take the fastest that reaches `recall`.

    Without queries of one's own, random rows are held back: searched for among all other rows.

    Args:
        searcher: The index.
        recall: Wanted recall@K, above 0 and at most 1.
        k: K.
        queries: Unit vectors, (Q, D), or None.
        count: How many rows to hold back.
        seed: Of the choice of rows.

    Raises:
        TypeError: If `count` is no whole number.
        ValueError: If the index is flat (its recall is 1), there are no queries, or `recall`, `k` or `count` is out of
            range.
    """
    check_k(k)
    check_count("held_back", count)
    if not 0 < recall <= 1:
        raise ValueError(f"recall is above 0 and at most 1, got {recall}")
    shards = searcher.shards
    if not shards:
        raise ValueError("this index is flat: every search is exact, there is nothing to tune")
    snapshot = searcher.snapshot
    if queries is not None and not len(queries):
        raise ValueError("tuning needs queries, got none: give some, or leave them out, and rows are held back")
    if queries is None and len(snapshot) < 2:
        raise ValueError(f"the index has {len(snapshot)} entries: there is nothing to search for a held-back one")
    own: np.ndarray | None = None
    source = "given"
    if queries is None:
        queries, own = held_back_queries(searcher, count, seed)
        source = f"{len(own):,} rows of the index, each left out of its own results (seed {seed})"

    def run(exact: bool, parameters: dict[str, int] | None) -> tuple[np.ndarray, float]:
        began = time.perf_counter()
        wanted = k if own is None else k + 1
        # Through the index, however few rows are alive: the parameters are kept for when they are more.
        _, rows = searcher.search(queries, wanted, snapshot.alive, exact=exact, parameters=parameters, few_rows=0)
        seconds = time.perf_counter() - began
        if own is not None:
            others = min(k, len(snapshot) - 1)
            rows = np.stack([line[line != row][:others] for line, row in zip(rows, own)])
        return rows, len(queries) / seconds

    truth, flat_speed = run(True, None)
    trials: list[Trial] = []
    floor: dict[str, int] = {}
    for parameters in parameter_grid(shards[0][1], snapshot.stored_rows):
        main = next((value for name, value in parameters.items() if name != "rerank"), 0)
        best = max((t.queries_per_second for t in trials if t.recall >= recall), default=0.0)
        if best and main > 4 * floor.get("main", main):
            break
        found, speed = run(False, parameters)
        trials.append(Trial(parameters, recall_of(found, truth), speed))
        if trials[-1].recall >= recall and "main" not in floor:
            floor["main"] = main
    good = [trial for trial in trials if trial.recall >= recall]
    chosen = (
        max(good, key=lambda trial: trial.queries_per_second) if good else max(trials, key=lambda trial: trial.recall)
    )
    kind = snapshot.manifest.index.kind
    return TuningReport(kind, k, len(queries), source, recall, bool(good), chosen, flat_speed, trials)
