"""Reranking by the generator view: documents ordered by how well a language model sees a query in them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ubmoe_st.configuration import check_count
from ubmoe_st.generation import ChatOptions, chat_text
from ubmoe_st.generator import explained
from ubmoe_st.transformer import UBMoETransformer

Method = Literal["likelihood", "yes_no"]
Scored = Callable[[list[list[int]]], Tensor]
"""From B rows to their scores, (B,)."""

DOCUMENT_CUE = "Passage: "
"""Before the document, for `likelihood`."""
QUERY_CUE = "\nQuestion:"
"""Between document and query, for `likelihood`."""
YES_NO_PROMPT = (
    "Does the document answer the query? Reply with yes or no.\n\nQuery: {query}\n\nDocument: {document}\n\n"
    "Reply with yes or no."
)
ANSWERS = ("yes", "no")
LOGITS_BYTES = 256 * 1024**2
"""Logits in float32 that are computed at a time; those of a long query over a large vocabulary are many times that."""


def rank(
    views: UBMoETransformer,
    query: str,
    documents: Sequence[str],
    top_k: int | None,
    return_documents: bool,
    *,
    method: Method,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Documents by relevance, best first; see `UBMoE.rank`."""
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value is not None:
            check_count(name, value)
    reading = read(views, query, documents, method)
    if reading.cut:
        warnings.warn(
            f"{len(reading.cut)} of {len(documents)} documents do not fit into the {reading.room} tokens that this "
            "model has for them and are ranked by their beginning; rank shorter passages to avoid it",
            stacklevel=3,
        )
    scores = score(views, reading, batch_size)
    results: list[dict[str, Any]] = [
        {"corpus_id": number, "score": value, **({"text": documents[number]} if return_documents else {})}
        for number, value in enumerate(scores)
    ]
    return sorted(results, key=lambda result: result["score"], reverse=True)[:top_k]


@dataclass(frozen=True)
class Reading:
    """What the base model reads to rank documents.

    Attributes:
        rows: Token ids for each of the documents, at least one token each.
        tail: Token ids that follow each row, whose likelihood counts. None: the answer that follows a row counts.
        asked: How many of the last tokens of `tail` are the query's.
        cut: Positions of the documents that were too long and are read in part.
        room: Tokens that there are for a row.
    """

    rows: list[list[int]]
    tail: list[int] | None
    asked: int
    cut: list[int]
    room: int

    @property
    def tokens(self) -> int:
        """How many tokens are read in all."""
        return sum(len(row) + len(self.tail or ()) for row in self.rows)


def read(views: UBMoETransformer, query: str, documents: Sequence[str], method: Method) -> Reading:
    """What is read to rank documents.

    Args:
        views: The model.
        query: One text.
        documents: At least one.
        method: See `UBMoE.rank`.

    Raises:
        TypeError: If query or documents are no texts.
        ValueError: If one of them is empty, the query leaves no room for a document, or `yes_no` meets a base without
            chat template.
    """
    _check(query, documents, method)
    return (_read_to_continue if method == "likelihood" else _read_to_answer)(views, query, list(documents))


def score(
    views: UBMoETransformer, reading: Reading, batch_size: int, go_on: Callable[[], bool] = lambda: True
) -> list[float]:
    """The score of each document, in their order.

    Args:
        views: The model.
        reading: What `read` gave.
        batch_size: Documents computed together; fewer where their logits would be more than `LOGITS_BYTES`.
        go_on: Asked before each batch.

    Raises:
        CancelledError: If `go_on` says no.
    """
    lm = views.generator("uni")
    positions = max(1, LOGITS_BYTES // (4 * lm.config.vocab_size))
    batch_size = min(batch_size, max(1, positions // max(1, reading.asked)))
    scored = _mean_log_probabilities(views, reading, positions // batch_size) if reading.tail else _log_odds(views)
    return _in_batches(lm, reading.rows, batch_size, scored, go_on)


def _check(query: object, documents: object, method: str) -> None:
    if not isinstance(query, str):
        raise TypeError(f"query must be one text, got {type(query).__name__}")
    if not query.strip():
        raise ValueError("the query is empty: say what to rank by")
    if isinstance(documents, (str, bytes)) or not isinstance(documents, Sequence):
        raise TypeError(f"documents must be a list of texts, got {type(documents).__name__}")
    if not documents:
        raise ValueError("documents is empty: there is nothing to rank")
    for position, document in enumerate(documents):
        if not isinstance(document, str):
            raise TypeError(f"the document at position {position} must be a text, got {type(document).__name__}")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")


def _read_to_continue(views: UBMoETransformer, query: str, documents: list[str]) -> Reading:
    limit = _context(views.generator("uni"))
    cue = views.token_ids(QUERY_CUE, add_special_tokens=False)
    asked = views.token_ids(query, add_special_tokens=False)
    room = limit - len(cue) - len(asked)
    if not asked:
        raise ValueError(f"the tokenizer of this checkpoint has no tokens for the query {query!r}; rank by another one")
    if room < len(views.token_ids(DOCUMENT_CUE)) + 1:
        raise ValueError(
            f"the query has {len(asked)} tokens, which leaves no room for a document in the {limit} tokens of this "
            "model; shorten the query"
        )
    whole = [views.token_ids(DOCUMENT_CUE + document) for document in documents]
    cut = [position for position, ids in enumerate(whole) if len(ids) > room]
    return Reading([ids[:room] for ids in whole], cue + asked, len(asked), cut, room)


def _mean_log_probabilities(views: UBMoETransformer, reading: Reading, step: int) -> Scored:
    """Mean log-probability of a token of the query after each document.

    A document is computed once and leaves its keys and values; the query, which is the same for all, goes through
    behind them without padding, and only its positions meet the vocabulary, at most `step` of a document at a time.
    """
    lm: Any = views.generator("uni")
    tail = torch.tensor([reading.tail], device=lm.device)  # (1, C + Q)
    cue = tail.shape[1] - reading.asked

    def scored(rows: list[list[int]]) -> Tensor:
        ids, mask, positions = _left_padded(rows, lm.device)
        past = lm(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
        ).past_key_values
        lengths = mask.sum(1, keepdim=True)
        total = torch.zeros(len(rows), device=lm.device)
        for first in range(cue, tail.shape[1], step):
            # A token is predicted where the one before it is read; with the first one, the cue is read.
            stop = min(first + step, tail.shape[1])
            begin, end = (0 if first == cue else first - 1), stop - 1
            follow = tail[:, begin:end].expand(len(rows), -1)  # (B, T)
            mask = torch.cat([mask, torch.ones_like(follow)], 1)
            logits = lm(
                input_ids=follow,
                attention_mask=mask,
                position_ids=lengths + torch.arange(begin, end, device=lm.device),
                past_key_values=past,
                use_cache=True,
                logits_to_keep=stop - first,
            ).logits.float()  # (B, P, V)
            wanted = tail[:, first:stop, None].expand(len(rows), -1, -1)
            total += (logits.gather(2, wanted)[..., 0] - logits.logsumexp(-1)).sum(1)
        return total / reading.asked

    return scored


def _read_to_answer(views: UBMoETransformer, query: str, documents: list[str]) -> Reading:
    limit = _context(views.generator("uni"))
    answer_tokens(views)
    _check_chat(views)
    rows, cut = [], []
    for position, document in enumerate(documents):
        ids = _asked(views, query, document)
        if len(ids) > limit:
            cut.append(position)
            ids = _asked_shorter(views, query, document, limit)
        rows.append(ids)
    return Reading(rows, None, 0, cut, limit)


def _log_odds(views: UBMoETransformer) -> Scored:
    """How much likelier the base model answers yes than no, as difference of the two logits."""
    lm: Any = views.generator("uni")
    yes, no = answer_tokens(views)

    def scored(batch: list[list[int]]) -> Tensor:
        ids, mask, positions = _left_padded(batch, lm.device)
        logits = lm(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
        ).logits[:, -1]  # (B, V)
        return (logits[:, yes] - logits[:, no]).float()

    return scored


def answer_tokens(views: UBMoETransformer) -> tuple[int, int]:
    """The first tokens of yes and of no.

    Raises:
        ValueError: If they are the same.
    """
    yes, no = (views.token_ids(answer, add_special_tokens=False)[0] for answer in ANSWERS)
    if yes == no:
        raise ValueError("the tokenizer of this checkpoint does not tell yes from no; use method='likelihood'")
    return yes, no


def pair_template(views: UBMoETransformer) -> str:
    """The chat template that makes the prompt of `yes_no` from messages with the roles `query` and `document`.

    Raises:
        ValueError: If the base has no chat template, or one that changes what is said.
    """
    _check_chat(views)
    marks = {role: f"[[the {role} stands here]]" for role in ("query", "document")}
    content = YES_NO_PROMPT.format(**marks)
    rest = chat_text(views.tokenizer, [{"role": "user", "content": content}], ChatOptions())
    template = ""
    for role, mark in marks.items():
        before, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise ValueError("the chat template of this checkpoint changes what the user says, so no pairs fit into it")
        said = f"messages | selectattr('role', 'eq', '{role}') | map(attribute='content') | first"
        template += f"{{{{ {_literal(before)} }}}}{{{{ {said} }}}}"
    return f"{template}{{{{ {_literal(rest)} }}}}"


def _check_chat(views: UBMoETransformer) -> None:
    tokenizer: Any = views.tokenizer
    if not tokenizer.chat_template:
        raise ValueError(
            "yes_no asks in a chat, and the tokenizer of this checkpoint has no chat template; use method='likelihood'"
        )


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _asked(views: UBMoETransformer, query: str, document: str) -> list[int]:
    content = YES_NO_PROMPT.format(query=query, document=document)
    text = chat_text(views.tokenizer, [{"role": "user", "content": content}], ChatOptions())
    return views.token_ids(text, add_special_tokens=False)


def _asked_shorter(views: UBMoETransformer, query: str, document: str, limit: int) -> list[int]:
    tokenizer: Any = views.tokenizer
    tokens = views.token_ids(document, add_special_tokens=False)
    # By how much the whole is too long; a cut text may be tokenised into more tokens than it was cut to.
    while tokens:
        ids = _asked(views, query, tokenizer.decode(tokens))
        if len(ids) <= limit:
            return ids
        tokens = tokens[: max(0, len(tokens) - (len(ids) - limit))]
    raise ValueError(f"the query leaves no room for a document in the {limit} tokens of this model; shorten the query")


def _context(lm: Any) -> int:
    return int(lm.config.max_position_embeddings)


def _left_padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and positions, (B, T) each. Padding on the left: what follows stands at one place for all."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def _in_batches(
    lm: Any, rows: list[list[int]], batch_size: int, scored: Scored, go_on: Callable[[], bool]
) -> list[float]:
    """Scores in the order of `rows`, computed with rows of similar length together."""
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    scores = [0.0] * len(rows)
    with torch.inference_mode(), explained(lm):
        for start in range(0, len(order), batch_size):
            if not go_on():
                raise CancelledError
            batch = order[start : start + batch_size]
            for number, value in zip(batch, scored([rows[number] for number in batch]).tolist()):
                scores[number] = value
    return scores
