"""Retrieve and answer: entries are numbered alike in tables and prompts, and nothing is answered from nothing."""

from __future__ import annotations

import io
import warnings
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import GenerationConfig

from ubmoe_st.answers import (
    ANSWER_TOKENS,
    ENTRY_CHARACTERS,
    VECTORS_SHARE,
    answer,
    answer_prompt,
    find,
    hit_table,
    search_options,
)


def hit(identity: str, text: str, title: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(id=identity, text=text, title=title, score=0.5)


HITS = [hit("usr", "binaries  are in\n[/usr/bin]"), hit("dict", "dict[str, int] :smile: {x}", title="a {title}")]


class Recorder:
    """An index and a model that keep what they are asked."""

    def __init__(self) -> None:
        self.asked: list = []

    def search_entries(self, queries, k, **options):
        self.asked.append((queries, k, options))
        return [HITS[:k]]

    def generate(self, prompt, **options):
        self.asked.append((prompt, options))
        return "an answer"


def test_more_than_the_model_holds_is_no_prompt():
    class Small(Recorder):
        tokenizer = SimpleNamespace(
            chat_template="", apply_chat_template=lambda prompt, **options: prompt[0]["content"], is_fast=True
        )
        generator = SimpleNamespace(
            config=SimpleNamespace(max_position_embeddings=60), generation_config=GenerationConfig()
        )

        @staticmethod
        def token_ids(text):
            return text.split()

    model = Small()
    assert answer(model, "where?", HITS, max_new_tokens=3) == "an answer"
    with pytest.raises(ValueError, match=r"2 entries have \d+ tokens, and the model holds 60"):
        answer(model, "where? " * 60, HITS, max_new_tokens=3)
    assert len(model.asked) == 1
    assert model.asked[0][1]["max_new_tokens"] == 3
    answer(model, "where?", HITS, max_new_tokens=55)
    size = len(model.asked[1][0][0]["content"].split())
    assert model.asked[1][1]["max_new_tokens"] == 60 - size < 55
    # Where no limit is given, neither that of `generate` itself nor one of the model goes beyond the context.
    answer(model, "where?", HITS)
    assert model.asked[2][1]["max_new_tokens"] == 60 - size
    for own, expected in (({"max_new_tokens": 4}, 4), ({"max_length": 999}, 60 - size)):
        model.generator.generation_config = GenerationConfig(**own)
        answer(model, "where?", HITS)
        assert model.asked[-1][1]["max_new_tokens"] == expected
    answer(model, "where?", HITS, generation_config=GenerationConfig(max_new_tokens=5))
    assert "max_new_tokens" not in model.asked[-1][1]


@pytest.mark.parametrize(
    ("held", "wanted", "told"), [(60, {}, True), (60, {"max_new_tokens": 3}, False), (400, {}, False)]
)
def test_little_room_for_an_answer_is_said(held, wanted, told):
    model = Recorder()
    model.tokenizer = SimpleNamespace(
        chat_template="", apply_chat_template=lambda prompt, **options: prompt[0]["content"], is_fast=True
    )
    config = SimpleNamespace(max_position_embeddings=held)
    model.generator = SimpleNamespace(config=config, generation_config=GenerationConfig())
    model.token_ids = str.split
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer(model, "where?", HITS, **wanted)
    prompt, options = model.asked[0]
    left = held - len(prompt[0]["content"].split())
    assert options["max_new_tokens"] == wanted.get("max_new_tokens", min(left, options["max_new_tokens"]))
    said = [str(one.message) for one in caught]
    assert said == (
        [
            f"the question and 2 entries leave {left} tokens for the answer, which may be cut short (expected at least "
            f"{ANSWER_TOKENS}): ask shorter, or of fewer entries with a smaller k"
        ]
        if told
        else []
    )


def test_find_passes_on_what_it_is_asked():
    index = Recorder()
    assert find(index, "where?", 1, filter={"a": 1}, mode="hybrid") == HITS[:1]
    assert index.asked == [(["where?"], 1, {"filter": {"a": 1}, "mode": "hybrid"})]


@pytest.mark.parametrize("question", ["", " \n"])
def test_an_empty_question_is_refused(question):
    index = Recorder()
    with pytest.raises(ValueError, match="question is empty"):
        find(index, question)
    assert index.asked == []


def test_an_answer_is_generated_from_the_entries():
    model = Recorder()
    assert answer(model, "where?", HITS, stream=True, max_new_tokens=3) == "an answer"
    assert model.asked == [(answer_prompt("where?", HITS), {"stream": True, "max_new_tokens": 3})]


def test_nothing_is_generated_from_no_entry():
    model = Recorder()
    with pytest.raises(ValueError, match="nothing to answer from"):
        answer(model, "where?", [])
    assert model.asked == []


def test_the_prompt_numbers_the_entries_and_asks_for_the_number():
    (message,) = answer_prompt("which {question}?", [*HITS, hit("long", "x" * 10_000)])
    lines = message["content"].splitlines()
    assert "by its number" in lines[0]
    assert lines[2:4] == ["[1] usr: binaries are in [/usr/bin]", "[2] a {title}: dict[str, int] :smile: {x}"]
    assert lines[4] == f"[3] long: {'x' * ENTRY_CHARACTERS} ..."
    assert lines[-1] == "Question: which {question}?"


def test_less_of_each_entry_is_read_where_the_context_is_small():
    long = [hit("a", "x" * 10_000), hit("b", "short")]
    (message,) = answer_prompt("which?", long, lambda prompt: len(prompt[0]["content"]) < 1500)
    assert f"[1] a: {'x' * (ENTRY_CHARACTERS // 2)} ...\n[2] b: short\n" in message["content"]
    (message,) = answer_prompt("which?", long, lambda prompt: False)
    assert f"[1] a: {'x' * (ENTRY_CHARACTERS // 8)} ...\n" in message["content"]


def test_a_table_shows_texts_of_others_as_they_are():
    """Brackets of a corpus are no markup, `:smile:` is no emoji, and the title is no markup either."""
    target = io.StringIO()
    Console(file=target, width=250).print(hit_table([*HITS, hit("[bold]", "y" * 500)], title="[/what] is it?"))
    shown = target.getvalue()
    for text in ("[/what] is it?", "binaries are in [/usr/bin]", "dict[str, int] :smile: {x}", "[bold]", "yyy..."):
        assert text in shown
    assert [f"[{number}]" in shown for number in (1, 2, 3, 4)] == [True, True, True, False]


def test_what_has_words_and_vectors_is_searched_by_both():
    pytest.importorskip("bm25s")
    both = SimpleNamespace(info={"bm25": {"folder": "bm25-000001"}})
    assert search_options(both) == {"mode": "hybrid", "weight": VECTORS_SHARE}
    assert search_options(SimpleNamespace(info={"bm25": None})) == {}
    assert search_options(SimpleNamespace(indexes=[both])) == {}
