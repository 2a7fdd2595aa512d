"""Retrieve and answer: entries that an index finds, and a text generated from them by the same weights."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from ubmoe_st.terminal import printable

if TYPE_CHECKING:
    from ubmoe_st.index import EmbeddingIndex, Hit, IndexGroup
    from ubmoe_st.model import UBMoE

ENTRY_CHARACTERS = 2000
"""How much of an entry is put into the prompt, where the context holds it: a chunk of 200 tokens has half of that."""
_FEWEST_CHARACTERS = 250
ANSWER_TOKENS = 160
"""Room that is kept for an answer, as long as the entries can be read shorter; of less a warning tells."""
SHOWN_CHARACTERS = 160
"""How much of an entry is shown in a table."""
VECTORS_SHARE = 0.7
"""Share of the vectors in the search for an answer, beside BM25; see docs/experiments.md."""
_PROMPT = (
    "Answer the question with the help of the numbered entries. Cite the entry you used by its number in square "
    "brackets, like [1].\n\n{entries}\n\nQuestion: {question}"
)


def find(index: EmbeddingIndex | IndexGroup, question: str, k: int = 3, **options: Any) -> list[Hit]:
    """The entries nearest to a question, best first; the first is number 1 in tables, prompts and citations.

    Args:
        index: An open index, or several as one.
        question: What to look for.
        k: How many.
        **options: As for `EmbeddingIndex.search_entries`, such as `filter` and `mode`.

    Raises:
        ValueError: If the question is empty.
    """
    if not question.strip():
        raise ValueError("the question is empty: say what to look for")
    return index.search_entries([question], k, **options)[0]


def search_options(index: EmbeddingIndex | IndexGroup) -> dict[str, Any]:
    """How to look for an answer: by vectors and words together, where the index has both."""
    info = getattr(index, "info", None)  # a group has none: it searches by vectors
    both = info is not None and info["bm25"] is not None and importlib.util.find_spec("bm25s") is not None
    return {"mode": "hybrid", "weight": VECTORS_SHARE} if both else {}


def answer(
    model: UBMoE, question: str, hits: Sequence[Hit], *, stream: bool = False, **options: Any
) -> str | Iterator[str]:
    """An answer generated from entries, which it is asked to cite by their numbers.

    Where the context is small, less of each entry is read; where that does not leave `ANSWER_TOKENS`, or what
    `max_new_tokens` asks for, the answer gets the tokens that are left, and a warning tells how many.

    Args:
        model: Both views.
        question: What to answer.
        hits: The entries, of `find`; the first is number 1.
        stream: Return an iterator over pieces of text.
        **options: As for `UBMoE.generate`, such as `max_new_tokens` and `routing`.

    Raises:
        ValueError: If there are no entries, or question and entries are more than the model holds; nothing is
            generated then.
    """
    if not hits:
        raise ValueError("no entry was found, so there is nothing to answer from")

    def fits(prompt: list[dict[str, str]]) -> bool:
        room = _room(model, prompt)
        return room is None or room >= ANSWER_TOKENS

    prompt = answer_prompt(question, hits, fits)
    room = _room_for_answer(model, prompt, len(hits))
    if room is not None and not {"max_length", "generation_config"} & options.keys():
        limit = options.get("max_new_tokens")
        limit = _own_limit(model) if limit is None else limit
        if room < (wanted := min(limit, ANSWER_TOKENS)):
            warnings.warn(
                f"the question and {len(hits)} entries leave {room} tokens for the answer, which may be cut short "
                f"(expected at least {wanted}): ask shorter, or of fewer entries with a smaller k",
                stacklevel=2,
            )
        options["max_new_tokens"] = min(limit, room)
    text: Any = model.generate(prompt, stream=stream, **options)
    return text


def _own_limit(model: UBMoE) -> float:
    """New tokens that `generate` would stop after by itself; infinite where its config counts the prompt, too."""
    from ubmoe_st.generation import DEFAULT_NEW_TOKENS

    own = model.generator.generation_config.to_diff_dict()
    return own.get("max_new_tokens") or (math.inf if own.get("max_length") else DEFAULT_NEW_TOKENS)


def _room(model: UBMoE, prompt: list[dict[str, str]]) -> int | None:
    """Tokens that the model holds behind the prompt, or lacks; None where it has no chat template to count with."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    from ubmoe_st.generation import ChatOptions, chat_text

    text = chat_text(tokenizer, prompt, ChatOptions())
    return int(model.generator.config.max_position_embeddings) - len(model.token_ids(text))


def _room_for_answer(model: UBMoE, prompt: list[dict[str, str]], entries: int) -> int | None:
    """As `_room`.

    Raises:
        ValueError: If there is none.
    """
    room = _room(model, prompt)
    if room is not None and room <= 0:
        most = model.generator.config.max_position_embeddings
        raise ValueError(
            f"the question and {entries} entries have {most - room} tokens, and the model holds {most} with its "
            "answer: ask shorter, or of fewer entries with a smaller k"
        )
    return room


def answer_prompt(
    question: str, hits: Sequence[Hit], fits: Callable[[list[dict[str, str]]], bool] = lambda prompt: True
) -> list[dict[str, str]]:
    """A chat that asks for an answer from search results, numbered from 1.

    Args:
        question: What to answer.
        hits: The entries. Of each, the first `ENTRY_CHARACTERS` are read; what is left out is marked by dots.
        fits: Whether a prompt leaves room for an answer; else less of each entry is read, down to an eighth.
    """
    characters = ENTRY_CHARACTERS
    while True:
        entries = "\n".join(
            f"[{number}] {_words(hit.title or hit.id)}: {_beginning(_words(hit.text), characters)}"
            for number, hit in enumerate(hits, 1)
        )
        prompt = [{"role": "user", "content": _PROMPT.format(entries=entries, question=question)}]
        if characters <= _FEWEST_CHARACTERS or fits(prompt):
            return prompt
        characters //= 2


def _beginning(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[:characters]} ..."


def hit_table(hits: Sequence[Hit], title: str | None = None) -> Table:
    """Search results for a person, under the numbers by which answers cite them.

    Args:
        hits: Of `find`.
        title: Above the table.
    """
    table = Table(title=Text(title, style="bold") if title else None, title_justify="left", show_lines=False)
    table.add_column("", justify="right", min_width=3)
    table.add_column("score", justify="right", min_width=5)
    table.add_column("id", style="cyan", overflow="fold")
    table.add_column("text", ratio=1)
    for number, hit in enumerate(hits, 1):
        text = one_line(hit.text)
        shown = text if len(text) < SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
        # As `Text`: a string would be read as markup, in which `[...]` is a tag.
        table.add_row(Text(f"[{number}]"), f"{hit.score:.3f}", Text(one_line(hit.id)), Text(shown))
    return table


def one_line(text: str) -> str:
    """A text of others as one line that a terminal can be given."""
    return printable(_words(text))


def _words(text: str) -> str:
    return " ".join(text.split())
