"""Checkpoints of a run: what trains and nothing else; where to go on."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import has_length

from ubmoe_st.files import replacing_by_name

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

TRAINED_FILE = "trained.safetensors"
PROCESSES_FILE = "processes.json"
"""Of a checkpoint: how many processes began the run, their `gradient_accumulation_steps`, how many wrote it."""


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint to go on from: `resume_from_checkpoint`, else the newest one that was written to its end.

    Raises:
        FileNotFoundError: If the checkpoint that was named is none.
        ValueError: If none is wanted where there are some.
    """
    named = args.resume_from_checkpoint
    if isinstance(named, str):
        if not _is_complete(Path(named)):
            raise FileNotFoundError(f"resume_from_checkpoint: expected a complete checkpoint folder, got {named}")
        return named
    found = [path for path in Path(str(args.output_dir)).glob("checkpoint-*") if path.name[11:].isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name[11:])):
        if _is_complete(path):
            if named is False:
                raise ValueError(
                    f"trainer.resume_from_checkpoint=false: {path} would stand among those of a new run; choose "
                    "another folder (--set out=...), or delete it"
                )
            return str(path)
        logger.warning("%s was not written to its end; it is passed over", path)
    return None


def _is_complete(folder: Path) -> bool:
    # The state is the last file that the trainer writes.
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (folder / TRAINED_FILE).is_file()


def keep_steps(args: TrainingArguments, last: str | None, *, streamed: bool = False) -> int:
    """Let a step read the texts of as many batches as before, although there are fewer or more processes now.

    The processes that began a run read n batches a step together, and process i of m every m-th batch. So any m that
    divides n, each of which then reads n / m batches a step (`gradient_accumulation_steps`), has the same batches, loss
    and gradient in each step of the rest. Noise differs: random states go with their processes.

    Args:
        args: Changed in place, before a trainer is made of them.
        last: The checkpoint to go on from.
        streamed: Whether the rows are not counted beforehand. Then it is not known whether the last batches of an epoch
            can be shared, and the processes that began must be a multiple of those of now.

    Returns:
        The number of processes that the batches of an epoch are counted for: those that began the run.

    Raises:
        ValueError: If the processes of now cannot share the batches of a step.
    """
    file = Path(last or "") / PROCESSES_FILE
    if last is None or not file.is_file():
        return args.world_size
    counts = json.loads(file.read_text(encoding="utf-8"))
    begun = counts["begun"]
    together = begun * counts.get("accumulation", args.gradient_accumulation_steps)
    shared = begun if streamed else together
    if shared % args.world_size:
        fitting = ", ".join(str(n) for n in range(1, shared + 1) if shared % n == 0)
        raise ValueError(
            f"{last} is of a run whose {begun} processes read {together} batches a step, and {args.world_size} cannot "
            f"share them; go on with {fitting} processes, or start another run from it (--set init_from={last} --set "
            "out=...)"
        )
    args.gradient_accumulation_steps = together // args.world_size
    if counts["processes"] != args.world_size:
        logger.info(
            "%s was written by %d processes; each of %d now reads %d batches a step",
            last, counts["processes"], args.world_size, args.gradient_accumulation_steps,
        )  # fmt: skip
    return begun


class TrainedOnly:
    """Trainer mixin: checkpoints hold the parameters that are trained, by name, and nothing else of the model.

    The rest of the model is the base, which does not change; so a checkpoint is a few megabytes, and whatever
    trains (adapters, dense experts, a head, routers) comes back to the last bit.
    """

    model: Any
    args: Any
    state: Any
    control: Any
    train_dataset: Any
    optimizer: Any
    lr_scheduler: Any
    begun: int | None = None
    """Processes that began the run, see `keep_steps`. None: those of now."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:  # every process is called, and they would write the same file
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.write(folder)

    def write(self, folder: Path) -> None:
        """Write what a checkpoint holds, in the one process that does."""
        save_trained(self.model, folder)
        now = self.args.world_size
        begun = self.begun or now
        accumulation = self.args.gradient_accumulation_steps * now // begun
        counts = {"begun": begun, "accumulation": accumulation, "processes": now}
        (folder / PROCESSES_FILE).write_text(json.dumps(counts) + "\n", encoding="utf-8")

    def get_train_dataloader(self) -> Any:
        """The stock one.

        Raises:
            ValueError: If it gives no batch: the stock trainer would end without a step, and without a word.
        """
        loader = super().get_train_dataloader()  # type: ignore[misc]
        if has_length(loader) and len(loader) == 0:
            size = self.args.per_device_train_batch_size
            raise ValueError(
                f"{len(self.train_dataset)} rows do not fill one batch of {size} in each of {self.args.world_size} "
                "processes; lower trainer.per_device_train_batch_size"
            )
        return loader

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The stock one; what the recipe says of the optimizer is as it is now, and rates are those of its schedule."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        now = [_settings(getattr(self.optimizer, "optimizer", self.optimizer), group) for group in groups]
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None or not all("initial_lr" in group for group in now):
            return
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        shares = [schedule(scheduler.last_epoch) for schedule in getattr(scheduler, "lr_lambdas", [])]
        for number, (group, settings) in enumerate(zip(self.optimizer.param_groups, now)):
            rate = settings["initial_lr"]
            # A longer run is at another place of its schedule than the end, where the rate may have been 0.
            group["lr"] = (
                rate * shares[number] if shares else group["lr"] * (rate / (group["initial_lr"] or rate or 1.0))
            )
            group.update(settings)
        scheduler.base_lrs = [group["initial_lr"] for group in now]
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The stock loop asks behind a step whether a run is over: a finished one would be a step longer each time.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


_HOW_IT_COMPUTES = ("params", "lr", "foreach", "fused", "capturable", "differentiable")
"""Keys of a group of an optimizer of torch that are no settings of a recipe."""


def _settings(optimizer: Any, group: dict[str, Any]) -> dict[str, Any]:
    """What a recipe says of a group; other optimizers than torch's keep what they have learned there as well."""
    if type(optimizer).__module__.startswith("torch.optim"):
        return {key: value for key, value in group.items() if key not in _HOW_IT_COMPUTES}
    return {key: group[key] for key in ("initial_lr", "weight_decay", "betas", "eps") if key in group}


def trained_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters that take a gradient, by name."""
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}


def save_trained(model: nn.Module, folder: Path) -> None:
    """Write what `trained_parameters` gives to a folder, all or nothing."""
    with replacing_by_name(folder / TRAINED_FILE) as temporary:
        save_file(trained_parameters(model), temporary)


def load_trained(
    model: nn.Module, folder: Path, optional: str | None = None, renamed: Mapping[str, str] | None = None
) -> set[str]:
    """Put back what `trained_parameters` gave.

    Args:
        model: What trains.
        folder: With `trained.safetensors`.
        optional: Pattern of the names of parameters that only one of both may have. None: they have the same.
        renamed: Other beginnings of the stored names, by those that they have.

    Returns:
        The names of the parameters that were put back.

    Raises:
        FileNotFoundError: If the folder holds no trained parameters.
        ValueError: If they are of another recipe.
    """
    if not (folder / TRAINED_FILE).is_file():
        raise FileNotFoundError(f"expected {TRAINED_FILE} of a finished training in {folder}; run that recipe first")
    stored = load_file(folder / TRAINED_FILE)
    moved: dict[str, torch.Tensor] = {}
    for old, new in (renamed or {}).items():
        moved |= {new + name.removeprefix(old): stored.pop(name) for name in list(stored) if name.startswith(old)}
    stored |= moved
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    odd = sorted(name for name in set(own) ^ set(stored) if optional is None or not re.match(optional, name))
    if odd:
        raise ValueError(f"{folder / TRAINED_FILE} and the model differ in what they train: {odd[0]}")
    common = set(own) & set(stored)
    for name in common:
        if own[name].shape != stored[name].shape:
            raise ValueError(
                f"{folder / TRAINED_FILE}: {name} has shape {tuple(stored[name].shape)}, expected "
                f"{tuple(own[name].shape)}; train with the same rank and teacher dimension"
            )
    with torch.no_grad():
        for name in common:
            own[name].copy_(stored[name])
    return common


def check_finite(model: nn.Module) -> None:
    """Refuse trained parameters that are no numbers.

    Raises:
        ValueError: If one is NaN or infinite.
    """
    for name, tensor in trained_parameters(model).items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"the training has diverged: {name} is NaN or infinite, so nothing is released; lower "
                "trainer.learning_rate, or set trainer.max_grad_norm"
            )


class StopEarly(EarlyStoppingCallback):
    """The stock callback, which goes on counting where a run goes on; one that had stopped trains no further step."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the count of the checkpoint."""
        super().on_train_begin(args, state, control)
        stored: Any = state.stateful_callbacks  # as it was read: states by name
        kept = stored.get(type(self).__name__) or {}
        attributes = (kept[0] if isinstance(kept, list) else kept).get("attributes", {})
        self.early_stopping_patience_counter = attributes.get("early_stopping_patience_counter", 0)
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience


class SaveWhenEvaluated(TrainerCallback):
    """Asks for a checkpoint at each evaluation: the best parameters can only be those of a step that was saved."""

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for one."""
        control.should_save = True


class SaveByTime(TrainerCallback):
    """Asks for a checkpoint at least every so many minutes, by the clock of the first process.

    Args:
        minutes: Between two checkpoints.
        clock: Seconds.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.minutes = minutes
        self.clock = clock
        self.last = clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for one when it is time."""
        due = self.clock() - self.last >= 60 * self.minutes
        if torch.distributed.is_initialized():  # all processes must save at the same step
            said = torch.tensor(float(due), device=args.device)
            torch.distributed.broadcast(said, src=0)
            due = bool(said)
        control.should_save = control.should_save or due

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count from here."""
        self.last = self.clock()
