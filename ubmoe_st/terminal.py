"""Between commands and a terminal: errors of one line, status, JSON, streams of text, files of texts."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer
from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError
from typer.models import OptionInfo

if TYPE_CHECKING:
    from ubmoe_st.model import UBMoE

# Without markup: what is printed holds paths and texts of others, in which `[...]` is no tag.
out = Console(markup=False, emoji=False, highlight=False)
err = Console(stderr=True, markup=False, emoji=False, highlight=False)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
RoutingOption = Annotated[
    Literal["uni", "bi", "router"] | None,
    typer.Option(help="Expert that generates: `uni` is the base model; default: that of the checkpoint, else `uni`."),
]
NewTokens = Annotated[int, typer.Option(min=1, help="Largest number of tokens to generate.")]
TruncateDim = Annotated[int | None, typer.Option(min=1, help="Number of leading dimensions to keep; by default all.")]
Overwrite = Annotated[bool, typer.Option(help="Replace what is there.")]

EXPECTED = (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, SafetensorError)
# Advice of the Python interface that is another command here.
_CALLS = {r"`upcycle\('([^']*)', out=\.\.\.\)`": r"`ubmoe build \1 --out DIR`"}
# What moves a terminal's cursor, colours it or turns the order of its letters.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
TEXT_SUFFIXES = (".txt", ".jsonl")
_KEYWORD = re.compile(r"""(?<![\w'"/.-])([a-z_]+)=(True|\.\.\.|'[^']*'|[^\s,;:()]+)""")
_NAME = re.compile(r"""(?<![\w'"`/.=-])([a-z]+_[a-z_]+)(?![\w'"`/.=(-])""")


def only_for(wanted: str, engine: str, **given: Any) -> None:
    """Refuse options that another engine than the one asked for would take.

    Args:
        wanted: The engine that takes them.
        engine: The one asked for.
        **given: Options by name; None where they were not given.

    Raises:
        ValueError: If one was given.
    """
    for name, value in given.items():
        if value is not None and engine != wanted:
            raise ValueError(
                f"--{name.replace('_', '-')} is for --engine {wanted}, got --engine {engine}: leave it out"
            )


def errors_in_one_line(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose expected errors are one line on standard error, which advises its options, and exit code 1."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            _quiet_libraries()
            _write_anything()
            function(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:  # as of `| head`, which has read enough: the command line ends quietly
            raise
        except KeyboardInterrupt:
            err.print("interrupted", style="red")
            raise typer.Exit(130) from None
        except EXPECTED as error:
            message = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
            err.print(f"error: {printable(with_flags(message, function))}", style="red", soft_wrap=True)
            raise typer.Exit(1) from None

    return run


def _quiet_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "" if err.is_terminal else "1")
    # Without the place in the code, which says nothing to who calls a command.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(str(message))}\n"


def _write_anything() -> None:
    """Let texts of others be written to streams that lack their letters, as those of an old terminal do."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """A text of others for a terminal: control characters, but for tabs and ends of lines, are shown and do nothing."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def with_flags(message: str, function: Callable[..., None]) -> str:
    """An error of the Python interface, with the options of a command in the place of keyword arguments.

    Args:
        message: Such as `replace it with overwrite=True`.
        function: The command; an option is known by the name of its parameter.
    """
    flags = {}
    for name, hint in get_type_hints(function, include_extras=True).items():
        for option in (entry for entry in getattr(hint, "__metadata__", ()) if isinstance(entry, OptionInfo)):
            # Within `Annotated`, the first name stands where a default would.
            given = [text for text in (option.default, *(option.param_decls or ())) if isinstance(text, str)]
            named = given or [f"--{name.replace('_', '-')}"]
            flags[name] = next((text for text in named if text.startswith("--")), named[0]).split("/")[0]

    def option_of(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name not in flags:
            return found[0]
        if value in ("True", "..."):
            return flags[name]
        return f"no {flags[name]}" if value == "None" else f"{flags[name]} {value.strip(chr(39))}"

    for call, other in _CALLS.items():
        message = re.sub(call, other, message)
    return _NAME.sub(lambda found: flags.get(found[1], found[0]), _KEYWORD.sub(option_of, message))


def say(text: str) -> None:
    """Print a line, which a narrow terminal does not cut into several."""
    out.print(printable(text), soft_wrap=True)


def say_json(value: object) -> None:
    """Print JSON for machines."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=not unicode) + "\n")


def say_stream(pieces: Iterable[str]) -> str:
    """Print a text piece by piece as it comes, and return it."""
    text = ""
    for piece in pieces:
        text += piece
        sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return text


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Show what is being waited for, where somebody looks."""
    if err.is_terminal:
        with err.status(Text(text)):
            yield
    else:
        yield


def converse(model: UBMoE, options: dict[str, Any]) -> None:
    """Talk with a model until an empty line.

    Args:
        model: The model.
        options: As for `UBMoE.generate`.
    """
    messages: list[dict[str, str]] = []
    err.print("chat; an empty line ends it", style="dim")
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        if not text:
            break
        messages.append({"role": "user", "content": text})
        pieces: Any = model.generate(messages, stream=True, **options)
        messages.append({"role": "assistant", "content": say_stream(pieces)})


def read_texts(source: Path) -> list[str]:
    """The texts of a .txt file, one a line, or of a .jsonl file of strings or of rows with a field `text`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is another kind of file, or a line is not valid; names it.
    """
    if not source.is_file():
        raise FileNotFoundError(f"{source} {'is no file' if source.exists() else 'does not exist'}")
    if source.suffix.lower() not in TEXT_SUFFIXES:
        raise ValueError(f"{source}: expected a {' or '.join(TEXT_SUFFIXES)} file")
    texts = []
    # Decoded line by line, so that a wrong byte has a place; bytes are split at `\n` alone.
    with open(source, "rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{source}, line {number}: not valid UTF-8 ({error.reason})") from error
            if source.suffix.lower() != ".jsonl":
                texts.append(line)
                continue
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{source}, line {number}: not valid JSON ({error.msg})") from error
            text = row.get("text") if isinstance(row, dict) else row
            if not isinstance(text, str):
                raise ValueError(f"{source}, line {number}: expected a field `text` with a string")
            texts.append(text)
    return texts


def check_out_file(path: Path, suffixes: Sequence[str]) -> None:
    """Refuse a file that could not be written, before the work for it is done.

    Raises:
        ValueError: If it ends otherwise, is a folder, or lies in a file.
    """
    if path.suffix not in suffixes:
        raise ValueError(f"--out must end in {' or '.join(suffixes)}, got {path.name}")
    if path.is_dir():
        raise ValueError(f"--out is a folder, {path}: name a file")
    if blocked := next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None):
        raise ValueError(f"--out lies in {blocked}, which is a file: give another path")


def megabytes(count: int) -> str:
    """Bytes in MB, for a person."""
    return f"{count / 1e6:,.1f} MB"


def load_model(path: str, **options: Any) -> UBMoE:
    """A checkpoint, with a status line while it is read."""
    with status(f"loading {path}"):
        from ubmoe_st.model import UBMoE

        return UBMoE(path, **options)
