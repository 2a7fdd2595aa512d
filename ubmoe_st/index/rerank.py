"""The first results of a search in another order: that of the model's own reading of their texts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from .embedder import Embedder, plain_texts
from .search import Searcher, check_k
from .store import Entry

Method = Literal["likelihood", "yes_no", "maxsim"]
CANDIDATES = 20
"""Results that are put in a new order, where a search does not say how many."""


@dataclass(frozen=True)
class Reranking:
    """How the first results of a search get their order."""

    method: Method
    candidates: int

    @classmethod
    def of(cls, rerank: Any, candidates: Any) -> Reranking | None:
        """From the arguments of a search; None where nothing is reranked.

        Raises:
            ValueError: If `rerank` is neither a method nor a number, or `candidates` no number or given in vain.
        """
        for name, value in (("rerank", rerank), ("candidates", candidates)):
            number = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            if value is None or (number and value >= 1) or (name == "rerank" and value in get_args(Method)):
                continue
            methods = f", or one of {', '.join(get_args(Method))}" if name == "rerank" else ""
            raise ValueError(
                f"{name} is a whole number of at least 1, the results to put in a new order{methods}; got {value!r}"
            )
        if isinstance(rerank, str):
            return cls(rerank, CANDIDATES if candidates is None else int(candidates))  # type: ignore[arg-type]
        if candidates is not None:
            raise ValueError(f"candidates={candidates} needs rerank={' or '.join(map(repr, get_args(Method)))}")
        return None if rerank is None else cls("likelihood", int(rerank))

    def check(self, queries: Any, model: Any) -> list[str]:
        """The queries as texts, or a refusal of what cannot be reranked.

        Raises:
            TypeError: If queries are no texts, or the model cannot rank so.
            ValueError: If a query is empty.
        """
        texts = plain_texts(queries)
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"rerank needs queries as texts, got {type(queries).__name__}")
        for position, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"query {position} is empty: say what to rank by")
        if self.method != "maxsim" and not callable(getattr(model, "rank", None)):
            raise TypeError(f"rerank needs a model with `rank`, such as UBMoE; this index has a {type(model).__name__}")
        return list(texts)

    def order(
        self, embedder: Embedder, texts: Sequence[str], candidates: Sequence[Sequence[Entry]], width: int
    ) -> np.ndarray:
        """Where the results of each query come from, best first: the candidates in their new order, then the rest.

        Args:
            embedder: With the model.
            texts: The queries, Q.
            candidates: The first results of each, at most `self.candidates`.
            width: Results of each query, N.

        Returns:
            Old places, int64, (Q, N).
        """
        places = np.tile(np.arange(width), (len(texts), 1))
        passages = [[_passage(entry) for entry in line] for line in candidates]
        orders = self._by_tokens(embedder, texts, passages) if self.method == "maxsim" else None
        for number, text in enumerate(texts):
            if not passages[number]:
                continue
            if orders is not None:
                order = orders[number]
            else:
                # A model's own default is not asked for by name: whatever has the signature of `CrossEncoder.rank` may
                # rank.
                options: dict[str, Any] = {} if self.method == "likelihood" else {"method": self.method}
                ranked = embedder.model.rank(text, passages[number], **options)
                order = [result["corpus_id"] for result in ranked]
            places[number, : len(order)] = order
        return places

    def _by_tokens(
        self, embedder: Embedder, texts: Sequence[str], passages: Sequence[Sequence[str]]
    ) -> list[list[int]]:
        """Positions of the passages of each query by falling MaxSim, equal ones in the order they had."""
        import torch

        encoder: Any = embedder.token_encoder()
        counter = embedder.counter()
        found: list[list[int]] = []
        cut = total = 0
        for query, documents in zip(texts, passages):
            if not documents:
                found.append([])
                continue
            cut += sum(counter.limit is not None and size > counter.limit for size in counter.sizes(documents))
            total += len(documents)
            with torch.inference_mode():
                asked = encoder.encode_query([query], show_progress_bar=False)
                said = encoder.encode_document(list(documents), show_progress_bar=False)
                scores = encoder.similarity(asked, said)[0]  # (N,)
            found.append(torch.argsort(scores, descending=True, stable=True).tolist())
        if cut:
            warnings.warn(
                f"{cut} of {total} candidates are longer than the {embedder.max_tokens} tokens the model reads and are "
                "compared by their beginning; cut documents into chunks with chunk_tokens",
                stacklevel=4,
            )
        return found


def search_rows(
    searcher: Searcher,
    embedder: Callable[[], Embedder],
    to_vectors: Callable[[Any], np.ndarray],
    queries: Any,
    k: int,
    rerank: Any,
    candidates: int | None,
    *first: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores, float32, (Q, K), and rows, (Q, K), of a search that may be reranked; -1 is no row.

    Args:
        searcher: Finds the results.
        embedder: Gives the model, asked for where it reranks.
        to_vectors: Queries to unit vectors, (Q, D).
        queries: As in `EmbeddingIndex.search`, like the rest.
        k: How many.
        rerank: The method, or a number.
        candidates: Results to rerank.
        *first: What `Searcher.find` takes behind `k`.
    """
    order = Reranking.of(rerank, candidates)
    if order is None:
        return searcher.find(queries, to_vectors, k, *first)
    check_k(k)
    asked = order.check(queries, embedder().model)
    scores, rows = searcher.find(queries, to_vectors, max(k, order.candidates), *first)
    lists = [[row for row in line if row >= 0] for line in rows[:, : order.candidates].tolist()]
    entries = [[searcher.snapshot.entry_at(row) for row in line] for line in lists]
    places = order.order(embedder(), asked, entries, rows.shape[1])[:, :k]
    return np.take_along_axis(scores, places, 1), np.take_along_axis(rows, places, 1)


def _passage(entry: Entry) -> str:
    return f"{entry.title}\n{entry.text}" if entry.title else entry.text
