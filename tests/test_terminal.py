"""Errors of the Python interface advise a command's own options on the command line."""

from __future__ import annotations

import io
from typing import Annotated, Literal

import pytest
import typer
from rich.console import Console

from ubmoe_st import terminal
from ubmoe_st.terminal import errors_in_one_line, read_texts, with_flags


def command(
    overwrite: Annotated[bool, typer.Option(help="x")] = False,
    memory_budget: Annotated[str, typer.Option("--memory", help="x")] = "",
    faiss_file: Annotated[bool, typer.Option("--faiss/--no-faiss", help="x")] = False,
    on_duplicate: Annotated[Literal["skip"], typer.Option(help="x")] = "skip",
    model: Annotated[str, typer.Option(help="x")] = "",
    k: Annotated[int, typer.Option("-k", help="x")] = 1,
    corpus: Annotated[str, typer.Argument(help="x")] = "",
) -> None:
    raise ValueError(corpus)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("begin again with overwrite=True", "begin again with --overwrite"),
        ("replace it (overwrite=True).", "replace it (--overwrite)."),
        ("do not fit in memory_budget=64 MB: allow more", "do not fit in --memory 64 MB: allow more"),
        ("memory_budget is at least 64 MB", "--memory is at least 64 MB"),
        ("make it with faiss_file=True", "make it with --faiss"),
        ("the last one with on_duplicate='upsert'", "the last one with --on-duplicate upsert"),
        ("open it with model=...", "open it with --model"),
        ("try again with model=None", "try again with no --model"),
        ("too many for k=3", "too many for -k 3"),
        ("Make one with `upcycle('a/b', out=...)`, or", "Make one with `ubmoe build a/b --out DIR`, or"),
        # What is no option of this command, or was typed by somebody, stays.
        ("the model has no corpus=x and no max_row_bytes=3", "the model has no corpus=x and no max_row_bytes=3"),
        ("got 'overwrite=True' in runs/on_duplicate/x", "got 'overwrite=True' in runs/on_duplicate/x"),
        ("no field 'memory_budget'", "no field 'memory_budget'"),
    ],
)
def test_keyword_arguments_become_options(message, expected):
    assert with_flags(message, command) == expected


def test_an_expected_error_is_one_line(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(terminal, "err", Console(file=shown, markup=False, emoji=False, width=20))
    with pytest.raises(typer.Exit) as raised:
        errors_in_one_line(command)(corpus="[/usr/bin] is\n  there: replace it with overwrite=True")
    assert raised.value.exit_code == 1
    assert shown.getvalue() == "error: [/usr/bin] is there: replace it with --overwrite\n"


def test_texts_of_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n"two"\n')
    assert read_texts(tmp_path / "a.txt") == ["one", "", "two"]
    assert read_texts(tmp_path / "a.jsonl") == ["one", "two"]
    (tmp_path / "a.jsonl").write_text('"one"\n{"text": 3}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected a field `text`"):
        read_texts(tmp_path / "a.jsonl")
