"""From a command line to a recipe: YAML, `--set`, one-line errors, and whether a folder holds another run.

`recipe.py` says what a recipe may hold; this file reads it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from training.recipe import ContrastiveRecipe, RouterRecipe
from ubmoe_st.bases import Base
from ubmoe_st.files import read_json, write_json

RECIPE_FILE = "recipe.json"
BASE_FILE = "base.json"
BEGUN_FILE = "begun.json"
"""Of a run: the SHA-256 of its texts, and what a card says of its training."""
INTERRUPTED = 130
"""Exit code of a command that was stopped by hand, as shells have it."""

R = TypeVar("R")


# --- reading ----------------------------------------------------------------------------------------------------


def read_recipe(kind: type[R], file: str | Path, changes: Sequence[str] = (), *, finished: bool = False) -> R:
    """Read a recipe.

    Args:
        kind: Dataclass of the recipe.
        file: YAML or JSON file.
        changes: `key=value`, with dots into sections (`trainer.max_steps=10`, `teacher.0.folder=x`) and YAML values.
        finished: Whether it is that of a finished run, where a key that did nothing does not matter.

    Raises:
        ValueError: If it is not YAML, a key is not known, a value has the wrong type, a change is not of that form, or
            a key would do nothing.
    """
    import yaml

    try:
        values = _apart(_yaml(Path(file).read_text(encoding="utf-8")))
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected `key: value` lines of a recipe, got {type(values).__name__}")
    for change in changes:
        _change(values, change)
    recipe = _fill(kind, values, str(file))
    if isinstance(recipe, ContrastiveRecipe | RouterRecipe) and not finished:
        try:
            recipe.refuse_idle()
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    return recipe


def recipe_of_command(kind: type[R], program: str, description: str | None, arguments: Sequence[str] | None) -> R:
    """The recipe that a command line `RECIPE [--set KEY=VALUE ...]` names; logging goes to the terminal.

    Args:
        kind: Dataclass of the recipe.
        program: How the command is called.
        description: What it does.
        arguments: None: those of the process.
    """
    options = recipe_parser(program, description).parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return read_recipe(kind, options.recipe, options.set)


def recipe_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of `RECIPE [--set KEY=VALUE ...]`."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    return parser


def _yaml(text: str) -> Any:
    """YAML with the words and numbers of YAML 1.2: `no`, `12:30` and `010` are texts, `1e-3` is a number.

    Raises:
        ValueError: If a key stands twice in a section; YAML would keep the last one without a word.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: typing.ClassVar = {
            first: [(tag, pattern) for tag, pattern in found if tag not in _YAML_11]
            for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ValueError(f"the key {twice!r} stands twice in one section, near line {node.start_mark.line + 1}")
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    whole = re.compile(r"^[+-]?(0|[1-9][0-9_]*)$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", whole, list("+-0123456789"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$", re.IGNORECASE), list("tTfF"))
    number = re.compile(r"^[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?$|^[+-]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("+-.0123456789"))
    return yaml.load(text, Loader)


def _apart(value: Any) -> Any:
    """Plain values in which nothing stands twice, as what a YAML alias repeats does: a change is of one place."""
    if isinstance(value, dict):
        return {key: _apart(inner) for key, inner in value.items()}
    return [_apart(inner) for inner in value] if isinstance(value, list) else value


_YAML_11 = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "int", "timestamp")}


def _change(values: Any, change: str) -> None:
    """Set one key of plain values in place."""
    import yaml

    path, equals, text = change.partition("=")
    if not equals:
        raise ValueError(f"expected key=value, got {change!r}; e.g. --set trainer.max_steps=10")
    quoted = f"--set '{path}={json.dumps(text)}'"
    try:
        value = _yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {change}: the value is not YAML; quote a text: {quoted}") from error
    if isinstance(value, dict) and not text.lstrip().startswith("{"):
        raise ValueError(f"--set {change}: YAML reads the `:` as a mapping; quote a text: {quoted}")
    *sections, key = path.split(".")
    inner = values
    for section in sections:
        if isinstance(inner, list):
            inner = inner[_position(inner, section, change)]
            continue
        if inner.get(section) is None:
            inner[section] = {}
        inner = inner[section]
        if not isinstance(inner, dict | list):
            raise ValueError(f"--set {change}: {section} is a single value ({inner!r}) and has no keys of its own")
    if isinstance(inner, list):
        inner[_position(inner, key, change)] = value
    else:
        inner[key] = value


def _position(values: list[Any], text: str, change: str) -> int:
    if not text.isdigit() or int(text) >= len(values):
        raise ValueError(f"--set {change}: expected a number from 0 to {len(values) - 1} in a list, got {text!r}")
    return int(text)


def _fill(kind: type[R], values: dict[str, Any], where: str) -> R:
    """A dataclass from plain values."""
    hints = typing.get_type_hints(kind)
    unknown = [key for key in values if key not in hints]
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(hints)}")
    filled = {key: _value(hints[key], value, where, key) for key, value in values.items()}
    try:
        return kind(**filled)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    """A value of a type hint from a plain one; sections become dataclasses.

    Raises:
        ValueError: If it is of none of the hint's types.
    """
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    options = typing.get_args(hint) if is_union else (hint,)
    if value is None and types.NoneType in options:
        return None
    words = [word for o in options if typing.get_origin(o) is Literal for word in typing.get_args(o)]
    if words:
        if value in words:
            return value
        raise ValueError(f"{where}: {key} must be one of {', '.join(map(str, words))}, got {value!r}")
    sections = [option for option in options if dataclasses.is_dataclass(option)]
    if sections and isinstance(value, dict):
        return _fill(_section(sections, value, f"{where}: {key}"), value, f"{where}: {key}")
    if sections and any(isinstance(value, section) for section in sections):  # type: ignore[arg-type]
        return value
    for option in options:
        origin, inner = typing.get_origin(option) or option, typing.get_args(option)
        if origin is Any:
            return value
        if origin in (list, tuple) and isinstance(value, list | tuple):
            if origin is tuple and Ellipsis not in inner and len(value) != len(inner):
                raise ValueError(f"{where}: {key} must have {len(inner)} values, got {value!r}")
            return origin(_value(inner[0], item, where, f"{key}.{n}") for n, item in enumerate(value))
        if origin is dict and isinstance(value, dict):
            return {name: _value(inner[1], item, where, f"{key}.{name}") for name, item in value.items()}
        if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise ValueError(f"{where}: {key} must be a finite number, got {value!r}")
            return value
        if origin in (str, int, bool) and type(value) is origin:
            return value
    wanted = " or ".join(dict.fromkeys(_plain(option) for option in options))
    raise ValueError(f"{where}: {key} must be {wanted}, got {value!r}")


def _section(sections: Sequence[Any], value: dict[str, Any], where: str) -> type:
    """Of several dataclasses the one that the value's `kind` names; the first one where it names none."""
    kinds = {typing.get_args(typing.get_type_hints(s).get("kind"))[:1]: s for s in sections} if sections[1:] else {}
    if not kinds or "kind" not in value:
        return sections[0]
    if not isinstance(value["kind"], str) or (value["kind"],) not in kinds:
        known = ", ".join(name for (name,) in kinds)
        raise ValueError(f"{where}: kind must be one of {known}, got {value['kind']!r}")
    return kinds[(value["kind"],)]


def _plain(hint: Any) -> str:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null"}
    if dataclasses.is_dataclass(hint):
        return "a section"
    return names.get(hint) or {list: "a list", tuple: "a list", dict: "a mapping"}.get(
        typing.get_origin(hint) or hint, str(hint)
    )


_LEAST = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 0}


def arguments_of(kind: type[R], values: dict[str, Any]) -> R:
    """`TrainingArguments` of a recipe's section `trainer`, where `bf16: auto` stands for what the processor can.

    Raises:
        ValueError: If a key is not known, or a number is none that trains: a `max_steps` of 0 would be three epochs.
    """
    if values.get("bf16") == "auto":
        values = {**values, "bf16": has_bf16(on_cpu=values.get("use_cpu", False))}
    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key, value in values.items():
        default, hint = (known[key].default, str(known[key].type)) if key in known else (None, "")
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            whole = hint in ("int", "<class 'int'>")
            if value is None and "None" in hint:
                continue
            if not isinstance(value, int if whole else (int, float)) or isinstance(value, bool):
                raise ValueError(f"trainer: {key} must be a number,{' a whole one,' * whole} got {value!r}")
        truth = isinstance(default, bool) or ("bool" in hint and "str" not in hint)
        if truth and isinstance(value, str):  # any text would count as true, `no` as well
            raise ValueError(f"trainer: {key} must be true or false, got {value!r}")
        if key in _LEAST and value < _LEAST[key]:
            raise ValueError(f"trainer: {key} must be at least {_LEAST[key]}, got {value}")
    if values.get("max_steps", -1) < 1 and values.get("max_steps", -1) != -1:
        raise ValueError(f"trainer: max_steps must be at least 1, or -1 for whole epochs, got {values['max_steps']}")
    if values.get("num_train_epochs", 1) <= 0:
        raise ValueError(f"trainer: num_train_epochs must be above 0, got {values['num_train_epochs']}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"trainer: {error}; its keys are those of {kind.__name__}") from error


def has_bf16(*, on_cpu: bool) -> bool:
    """Whether the processor multiplies in bf16: a GPU that says so, a CPU with AVX512_BF16 or AMX.

    Args:
        on_cpu: Whether to train on the CPU although there may be a GPU.
    """
    import torch

    if torch.cuda.is_available() and not on_cpu:
        return torch.cuda.is_bf16_supported()
    try:
        found = torch.cpu.get_capabilities()
    except AttributeError:  # older torch does not say it in public
        return False
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


# --- running ----------------------------------------------------------------------------------------------------


def one_line_errors(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose expected errors are one line on standard error and exit code 1; stopped by hand, 130."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        import yaml

        try:
            function(*args, **kwargs)
        except (OSError, ValueError, ImportError, yaml.YAMLError) as error:
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
            raise SystemExit(1) from error
        except KeyboardInterrupt as interrupt:
            sys.stderr.write("stopped; run the same command again to go on\n")
            raise SystemExit(INTERRUPTED) from interrupt

    return run


# --- comparing --------------------------------------------------------------------------------------------------

ORDER_KEYS = (
    "seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_drop_last",
    "batch_sampler",
)  # fmt: skip
"""Keys of `trainer` that decide which batch comes when."""

_FREE = ("trainer", "out", "save_minutes", "components")
"""Keys that may change: `components` acts when the training is done."""


def check_same_recipe(recipe: Any, out: Path) -> None:
    """Refuse to go on in a folder where another recipe was trained; write the recipe where nothing was trained yet.

    Of the section `trainer` all but `ORDER_KEYS` may change: more steps, other places to log to.

    Raises:
        ValueError: If the folder holds checkpoints or results of another recipe.
    """
    file = out / RECIPE_FILE
    now = json.loads(json.dumps(dataclasses.asdict(recipe)))
    if file.is_file() and _was_trained(out):
        before, wanted = _fixed(_with_defaults(type(recipe), file)), _fixed(_plain_of(recipe))
        other = next((key for key in wanted if before.get(key) != wanted[key]), None)
        if other is not None:
            raise ValueError(
                f"{out} holds a run with another {other!r} ({before.get(other)!r}, now {wanted[other]!r}); "
                "choose another folder (--set out=...), or delete it"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, now, unique=True)  # other processes may write the same


def check_same_base(base: Base, out: Path) -> None:
    """Refuse to go on over other weights than those the run began with; write which they are where it begins.

    Called after `check_same_recipe`, which knows the base by its name.

    Raises:
        ValueError: If the folder holds a run over other weights.
    """
    file = out / BASE_FILE
    if file.is_file() and _was_trained(out):
        before = json.loads(file.read_text(encoding="utf-8"))["sha256"]
        if not base.has_weights(before):
            raise ValueError(
                f"{out} holds a run over other weights of {base.name} (sha256 {_short(before)}, now "
                f"{_short(base.sha256)}); choose another folder (--set out=...), or delete it"
            )
        return
    write_json(file, {"name": base.name, "origin": base.origin, "sha256": base.sha256}, unique=True)


def check_same_texts(sha256: str | None, out: Path, taught: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Refuse to go on with other texts than those the run began with; write which they are where it begins.

    Called after `check_same_base`.

    Args:
        sha256: Of the texts. None: they are not known beforehand.
        out: Folder of the run.
        taught: What a card says of the training; asked where a run begins, since what it starts from may go.

    Returns:
        What `taught` gave when the run began. None: the run is from before it was kept.

    Raises:
        ValueError: If the folder holds a run with other texts.
    """
    file = out / BEGUN_FILE
    if not _was_trained(out):
        label = taught()
        write_json(file, {"texts_sha256": sha256, "taught": label}, unique=True)
        return label
    if not file.is_file():
        return None
    before = read_json(file)
    if None not in (sha256, before["texts_sha256"]) and sha256 != before["texts_sha256"]:
        raise ValueError(
            f"{out} holds a run with other texts (sha256 {before['texts_sha256'][:12]}, now {str(sha256)[:12]}): a "
            "file has changed since; put it back, choose another folder (--set out=...), or delete it"
        )
    return before["taught"]


def _short(sha256: Mapping[str, str]) -> str:
    return ", ".join(digest[:12] for digest in sorted(sha256.values()))


def _was_trained(out: Path) -> bool:
    return any(out.glob("checkpoints/checkpoint-*")) or any(out.glob("*.safetensors"))


def _with_defaults(kind: type, file: Path) -> dict[str, Any]:
    """A stored recipe; keys that came after it have their defaults."""
    stored = json.loads(file.read_text(encoding="utf-8"))
    known = {key: value for key, value in stored.items() if key in typing.get_type_hints(kind)}
    try:
        return _plain_of(_fill(kind, known, str(file)))
    except ValueError:
        return stored


def _plain_of(recipe: Any) -> dict[str, Any]:
    """A recipe as plain values, in which a key that does nothing has its default."""
    idle = recipe.idle if isinstance(recipe, ContrastiveRecipe) else {}
    return json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(recipe, **idle))))


def _fixed(recipe: dict[str, Any]) -> dict[str, Any]:
    """What of a recipe may not change between two starts of a run."""
    fixed = {key: value for key, value in recipe.items() if key not in _FREE}
    teachers = recipe.get("teacher") or []
    # Layer 1 and 1.0, the last one, are equal as numbers.
    layers = [one.get("layers") for one in (teachers if isinstance(teachers, list) else [teachers])]
    fixed["teacher.layers"] = json.dumps(layers)
    if isinstance(texts := fixed.get("texts"), dict):
        fixed["texts"] = {**texts, "sources": [_without_idle(source) for source in texts.get("sources") or []]}
        if all(source.get("share") is None for source in fixed["texts"]["sources"]):
            fixed["texts"]["count"] = None
    return fixed | {f"trainer.{key}": recipe.get("trainer", {}).get(key) for key in ORDER_KEYS}


def _without_idle(source: dict[str, Any]) -> dict[str, Any]:
    """A source of texts without the keys that `TextSource.refuse_idle` refuses: a run that goes on may drop them."""
    idle = [] if source.get("kind") in ("corruptions", "contrasts") else ["corruptions"]
    idle += [] if source.get("titled") or source.get("title_apart") else ["title"]
    return {key: value for key, value in source.items() if key not in idle}
