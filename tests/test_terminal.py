"""Errors of the Python interface advise a command's own options on the command line."""

from __future__ import annotations

import io
import json
import sys
from typing import Annotated, Literal

import pytest
import typer
from rich.console import Console

from ubmoe_st import terminal
from ubmoe_st.answers import hit_table
from ubmoe_st.index import Hit
from ubmoe_st.terminal import check_out_file, errors_in_one_line, printable, read_texts, say, say_json, with_flags


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


def test_other_files_than_texts_are_refused_and_signs_of_an_encoding_left_out(tmp_path):
    (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbfone\r\ntwo \xe2\x80\xa8 three\n")
    assert read_texts(tmp_path / "a.TXT") == ["one", "two \u2028 three"]
    (tmp_path / "a.csv").write_text("id,text\n")
    with pytest.raises(ValueError, match=r"a\.csv: expected a \.txt or \.jsonl file"):
        read_texts(tmp_path / "a.csv")
    (tmp_path / "a.txt").write_bytes(b"one\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 2: not valid UTF-8"):
        read_texts(tmp_path / "a.txt")


EVIL = "\x1b]0;title\x07 \x1b[2J[/usr/bin] \u202eabc \x9b31m"


def test_control_characters_of_others_do_nothing_to_a_terminal(capsys, monkeypatch):
    hit = Hit(f"an id\n{EVIL}", 0.5, f"{EVIL}\r\n{EVIL}", None, None, 0, 1, {}, 0, "i")
    shown = Console(width=400, markup=False, file=io.StringIO())
    shown.print(hit_table([hit], title="results"))
    say(EVIL)
    text = shown.file.getvalue() + capsys.readouterr().out
    assert not set(text) & set("\x1b\x07\u202e\x9b\r")
    assert text.count("[/usr/bin]") == 4
    assert text.count(r"\x1b[2J") == 4
    assert printable("tab\tand\nline é 数") == "tab\tand\nline é 数"


def test_a_narrow_table_keeps_numbers_and_scores():
    hit = Hit("an id", 0.5, "some text", None, None, 0, 1, {}, 0, "i")
    shown = Console(width=30, file=io.StringIO())
    shown.print(hit_table([hit]))
    assert "[1]" in shown.file.getvalue()
    assert "0.500" in shown.file.getvalue()


def test_a_terminal_without_the_letters_gets_text_and_json(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))

    def shows() -> None:
        say("é")
        say_json({"a": "é\u202e"})

    errors_in_one_line(shows)()
    first, rest = raw.getvalue().decode("ascii").split("\n", 1)
    assert first == r"\xe9"
    assert json.loads(rest) == {"a": "é\u202e"}


def test_a_closed_pipe_is_no_error_of_ours(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(terminal, "err", Console(file=shown))

    def closed() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):  # which the command line ends quietly
        errors_in_one_line(closed)()
    assert shown.getvalue() == ""


def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.npy").mkdir()
    for name, said in (("x.txt", "must end in"), ("folder.npy", "is a folder"), ("file/a/x.npy", "which is a file")):
        with pytest.raises(ValueError, match=said):
            check_out_file(tmp_path / name, (".npy", ".parquet"))
    check_out_file(tmp_path / "new" / "x.npy", (".npy", ".parquet"))
