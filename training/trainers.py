"""What both stages share: recipes, trained-parameters-only checkpoints, batches of similar length."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import random
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch import nn
from transformers import TrainerCallback

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

TRAINED_FILE = "trained.safetensors"
RECIPE_FILE = "recipe.json"
WINDOW = 16

R = TypeVar("R")


def read_recipe(kind: type[R], file: str | Path, changes: Sequence[str] = ()) -> R:
    """Read a recipe.

    Args:
        kind: Dataclass of the recipe.
        file: YAML or JSON file.
        changes: `key=value`, with dots into sections (`trainer.max_steps=10`) and YAML values.

    Raises:
        ValueError: If a key is not known or a change is not of that form.
    """
    import yaml

    values = _with_floats(yaml.safe_load(Path(file).read_text(encoding="utf-8")))
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected `key: value` lines of a recipe, got {type(values).__name__}")
    for change in changes:
        path, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"expected key=value, got {change!r}; e.g. --set trainer.max_steps=10")
        *sections, key = path.split(".")
        inner = values
        for section in sections:
            if inner.get(section) is None:
                inner[section] = {}
            inner = inner[section]
        inner[key] = _with_floats(yaml.safe_load(value))
    return _fill(kind, values, str(file))


def recipe_of_command(kind: type[R], program: str, description: str | None, arguments: Sequence[str] | None) -> R:
    """The recipe that a command line `RECIPE [--set KEY=VALUE ...]` names; logging goes to the terminal.

    Args:
        kind: Dataclass of the recipe.
        program: How the command is called.
        description: What it does.
        arguments: None: those of the process.
    """
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return read_recipe(kind, options.recipe, options.set)


def _with_floats(value: Any) -> Any:
    """YAML 1.1 reads `1e-3` as a text; here it is a number."""
    if isinstance(value, dict):
        return {key: _with_floats(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_floats(inner) for inner in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?e[+-]?\d+", value, re.IGNORECASE):
        return float(value)
    return value


def _fill(kind: type[R], values: dict[str, Any], where: str) -> R:
    """A dataclass from plain values; nested dataclasses from nested mappings."""
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(hints)}")
    filled = {}
    for key, value in values.items():
        is_union = typing.get_origin(hints[key]) in (types.UnionType, typing.Union)
        options = typing.get_args(hints[key]) if is_union else (hints[key],)
        names = [name for option in options if typing.get_origin(option) is Literal for name in typing.get_args(option)]
        if names and value not in names and not (value is None and types.NoneType in options):
            raise ValueError(f"{where}: {key} must be one of {', '.join(map(str, names))}, got {value!r}")
        section = next((option for option in options if dataclasses.is_dataclass(option)), None)
        filled[key] = _fill(section, value, f"{where}: {key}") if section and isinstance(value, dict) else value  # type: ignore[arg-type]
    try:
        return kind(**filled)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


ORDER_KEYS = ("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps")
"""Keys of `trainer` that decide which batch comes when."""


def check_same_recipe(recipe: Any, out: Path) -> None:
    """Refuse to go on in a folder where another recipe was trained; write the recipe where nothing was trained yet.

    Of the section `trainer` all but `ORDER_KEYS` may change: more steps, other places to log to.

    Raises:
        ValueError: If the folder holds checkpoints or results of another recipe.
    """
    file = out / RECIPE_FILE
    now = json.loads(json.dumps(dataclasses.asdict(recipe)))
    trained = any(out.glob("checkpoints/checkpoint-*")) or any(out.glob("*.safetensors"))
    if file.is_file() and trained:
        before, wanted = _fixed(json.loads(file.read_text(encoding="utf-8"))), _fixed(now)
        other = next((key for key in wanted if before.get(key) != wanted[key]), None)
        if other is not None:
            raise ValueError(
                f"{out} holds a run with another {other!r} ({before.get(other)!r}, now {wanted[other]!r}); "
                "choose another folder (--set out=...), or delete it"
            )
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


def _fixed(recipe: dict[str, Any]) -> dict[str, Any]:
    """What of a recipe may not change between two starts of a run."""
    fixed = {key: value for key, value in recipe.items() if key not in ("trainer", "out")}
    return fixed | {f"trainer.{key}": recipe.get("trainer", {}).get(key) for key in ORDER_KEYS}


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint to go on from: `resume_from_checkpoint`, else the newest one that was written to its end.

    Raises:
        FileNotFoundError: If the checkpoint that was named is none.
    """
    named = args.resume_from_checkpoint
    if isinstance(named, str):
        if not _is_complete(Path(named)):
            raise FileNotFoundError(f"resume_from_checkpoint: expected a complete checkpoint folder, got {named}")
        return named
    found = [path for path in Path(str(args.output_dir)).glob("checkpoint-*") if path.name[11:].isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name[11:])):
        if _is_complete(path):
            return str(path)
        logger.warning("%s was not written to its end; it is passed over", path)
    return None


def arguments_of(kind: type[R], values: dict[str, Any]) -> R:
    """`TrainingArguments` of a recipe's section `trainer`.

    Raises:
        ValueError: If a key is not known.
    """
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"trainer: {error}; its keys are those of {kind.__name__}") from error


def _is_complete(folder: Path) -> bool:
    # The state is the last file that the trainer writes.
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (folder / TRAINED_FILE).is_file()


def one_line_errors(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose expected errors are one line on standard error and exit code 1."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        import yaml

        try:
            function(*args, **kwargs)
        except (OSError, ValueError, ImportError, yaml.YAMLError) as error:
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
            raise SystemExit(1) from error

    return run


class TrainedOnly:
    """Trainer mixin: checkpoints hold the parameters that are trained, by name, and nothing else of the model.

    The rest of the model is the base, which does not change; so a checkpoint is a few megabytes, and whatever
    trains (adapters, dense experts, a head, routers) comes back to the last bit.
    """

    model: Any
    args: Any
    state: Any

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained_parameters(self.model), folder / TRAINED_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def trained_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters that take a gradient, by name."""
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}


def load_trained(model: nn.Module, folder: Path) -> None:
    """Put back what `trained_parameters` gave.

    Raises:
        FileNotFoundError: If the folder holds no trained parameters.
        ValueError: If they are of another recipe.
    """
    if not (folder / TRAINED_FILE).is_file():
        raise FileNotFoundError(f"expected {TRAINED_FILE} of a finished training in {folder}; run that recipe first")
    stored = load_file(folder / TRAINED_FILE)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if set(own) != set(stored):
        odd = sorted(set(own) ^ set(stored))[0]
        raise ValueError(f"{folder / TRAINED_FILE} and the model differ in what they train: {odd}")
    for name, parameter in own.items():
        if parameter.shape != stored[name].shape:
            raise ValueError(
                f"{folder / TRAINED_FILE}: {name} has shape {tuple(stored[name].shape)}, expected "
                f"{tuple(parameter.shape)}; train with the same rank and teacher dimension"
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(stored[name])


class LengthBuckets(DefaultBatchSampler):
    """Batches of texts of similar length, so that little is padded.

    The shuffled rows are sorted by the length of their first text inside windows of `WINDOW` batches, and the
    batches of a window are shuffled again. The order depends on seed and epoch alone, so a resumed run sees the
    same batches. All are full and their number divides by the number of processes: none waits for another.
    """

    def __init__(self, dataset: Dataset, batch_size: int, drop_last: bool, **kwargs: Any) -> None:
        super().__init__(dataset, batch_size=batch_size, drop_last=True, **kwargs)
        self.lengths = [len(text) for text in dataset[dataset.column_names[0]]]
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        self.batches = len(self.lengths) // batch_size // processes * processes
        if self.batches == 0:
            raise ValueError(
                f"{len(self.lengths)} texts do not fill one batch of {batch_size} in each of {processes} processes"
            )

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(f"{self.seed}-{self.epoch}")
        rows = list(range(len(self.lengths)))
        rng.shuffle(rows)
        rows = rows[: self.batches * self.batch_size]
        for start in range(0, len(rows), self.batch_size * WINDOW):
            window = sorted(rows[start : start + self.batch_size * WINDOW], key=lambda row: self.lengths[row])
            batches = [window[i : i + self.batch_size] for i in range(0, len(window), self.batch_size)]
            rng.shuffle(batches)
            yield from batches


class TokenBudget(DefaultBatchSampler):
    """Batches of equal cost: as many texts of similar length as fit, padded, into a number of tokens.

    Short texts come in large batches and long ones in small ones, so no process waits for another one's long batch.
    All texts are sorted by length, equal lengths in the random order of the epoch, and cut where the budget is full;
    the batches are shuffled. Where the cuts are depends on the lengths alone: every epoch has as many batches, and a
    resumed run sees the same ones.

    Args:
        dataset: The texts.
        lengths: Of each of them, tokens.
        tokens: Most tokens of a batch, padding included; a longer text is a batch of its own.
        seed: Of the order.
    """

    def __init__(self, dataset: Dataset, lengths: Sequence[int], tokens: int, *, seed: int = 0) -> None:
        # Only the last, shorter batch of a sampler with a size may differ from it; this one has none.
        super().__init__(dataset, batch_size=1, drop_last=True, seed=seed)
        self.batch_size: Any = None
        self.lengths = list(lengths)
        self.cuts = [0]
        order = sorted(self.lengths)
        for end, length in enumerate(order, 1):
            if (end - self.cuts[-1]) * length > tokens and end - 1 > self.cuts[-1]:
                self.cuts.append(end - 1)
        self.cuts.append(len(order))
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        self.batches = (len(self.cuts) - 1) // processes * processes
        if not order or self.batches == 0:
            raise ValueError(
                f"{len(order)} texts do not fill one batch of {tokens} tokens in each of {processes} processes; "
                "lower batch_tokens"
            )

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(f"{self.seed}-{self.epoch}")
        rows = sorted(range(len(self.lengths)), key=lambda row: (self.lengths[row], rng.random()))
        batches = [rows[start:end] for start, end in pairwise(self.cuts)]
        rng.shuffle(batches)
        yield from batches[: self.batches]


class EpochCallback(TrainerCallback):
    """Tells sampler and collator the epoch; a resumed run wraps the sampler where the trainer does not reach it."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch before its first batch is drawn."""
        parts: list[Any] = [getattr(self.trainer, "sampler", None), self.trainer.data_collator]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(int((state.epoch or 0) + 1e-6))
