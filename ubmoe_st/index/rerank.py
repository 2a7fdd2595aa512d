"""The first results of a search in another order: that of the model's own ranking of their texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .store import Entry


def check_rerank(rerank: Any, queries: Any, model: Any) -> list[str]:
    """The queries as texts, or a refusal of what cannot be reranked.

    Raises:
        TypeError: If queries are no texts, or the model has no `rank`.
        ValueError: If `rerank` is no number of results.
    """
    if isinstance(rerank, bool) or not isinstance(rerank, (int, np.integer)) or rerank < 1:
        raise ValueError(f"rerank is a whole number of at least 1, the results to put in a new order; got {rerank!r}")
    texts = [queries] if isinstance(queries, str) else queries
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"rerank needs queries as texts, got {type(queries).__name__}")
    if not callable(getattr(model, "rank", None)):
        raise TypeError(f"rerank needs a model with `rank`, such as UBMoE; this index has a {type(model).__name__}")
    return list(texts)


def reranked(
    model: Any,
    texts: Sequence[str],
    found: tuple[np.ndarray, np.ndarray],
    k: int,
    rerank: int,
    entry_at: Callable[[int], Entry],
) -> tuple[np.ndarray, np.ndarray]:
    """The first `rerank` results of each query in the order of `model.rank`, then the rest; the first `k` of these.

    Args:
        model: With `rank(query, documents)`, as of `UBMoE` and `CrossEncoder`.
        texts: The queries, Q.
        found: Scores and rows, (Q, N), best first; row -1 is none.
        k: How many to keep.
        rerank: How many to put in a new order.
        entry_at: Row to entry.

    Returns:
        Scores and rows, (Q, K); each row keeps its score.
    """
    scores, rows = found[0].copy(), found[1].copy()
    for number, text in enumerate(texts):
        first = [row for row in rows[number, :rerank].tolist() if row >= 0]
        if not first:
            continue
        ranked = model.rank(text, [_passage(entry_at(row)) for row in first])
        order = [result["corpus_id"] for result in ranked]
        rows[number, : len(first)] = rows[number, order]
        scores[number, : len(first)] = scores[number, order]
    return scores[:, :k], rows[:, :k]


def _passage(entry: Entry) -> str:
    return f"{entry.title}\n{entry.text}" if entry.title else entry.text
