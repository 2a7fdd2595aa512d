"""Batches: which texts come together, in which order, and how they are read."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch.utils.data import BatchSampler
from transformers import TrainerCallback

from training.variants import roughen

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

WINDOW = 16
"""Batches whose texts are sorted by length together."""

PROMPT_CHARACTERS = "prompt_characters"
"""Column of how many characters of the anchor are its prompt; the model does not get it."""


class SharedAmong(DefaultBatchSampler):
    """A sampler whose epochs give each process as many batches, so that none waits for another.

    `whole` are the batches that an epoch fills, `batches` those of them that the processes can share.
    """

    whole: int
    batches: int
    filling: str
    """Which rows are to fill which batch, for an error."""
    key: str
    """Of the recipe, to lower then."""

    def share_among(self, processes: int) -> None:
        """Give so many processes the same number of batches.

        Raises:
            ValueError: If there is not one batch for each of them.
        """
        self.batches = self.whole // processes * processes
        if self.batches == 0:
            raise ValueError(f"{self.filling} in each of {processes} processes; lower {self.key}")

    def __len__(self) -> int:
        return self.batches


_MANY = 0.03
"""Share of the texts that may come with too few to compare with before it is said."""


def _warn_of_lonely(lonely: int, texts: int, tokens: int) -> None:
    """Say how many texts have too few others in their batch, where they are many."""
    if lonely > _MANY * texts:
        logger.warning(
            "batch_tokens=%d: %d of %d texts (%.0f %%) have hardly another text in their batch and teach little or "
            "nothing; raise it, or draw shorter texts",
            tokens, lonely, texts, 100 * lonely / texts,
        )  # fmt: skip


def _processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


class LengthBuckets(SharedAmong):
    """Batches of texts of similar length, so that little is padded.

    The shuffled rows are sorted by the length of their first text inside windows of `WINDOW` batches, and the
    batches of a window are shuffled again. The order depends on seed and epoch alone, so a resumed run sees the
    same batches. All are full and their number divides by the number of processes: none waits for another.
    """

    def __init__(self, dataset: Dataset, batch_size: int, drop_last: bool, **kwargs: Any) -> None:
        super().__init__(dataset, batch_size=batch_size, drop_last=True, **kwargs)
        self.lengths = [len(text) for text in dataset[dataset.column_names[0]]]
        self.whole = len(self.lengths) // batch_size
        self.filling = f"{len(self.lengths)} texts do not fill one batch of {batch_size}"
        self.key = "trainer.per_device_train_batch_size"
        self.share_among(_processes())

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


class TokenBudget(SharedAmong):
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
        if len(order) > 1 and len(self.cuts) - 1 == len(order):
            raise ValueError(
                f"batch_tokens={tokens} holds one text at a time, which has nothing to compare with; raise it"
            )
        _warn_of_lonely(sum(end - start == 1 for start, end in pairwise(self.cuts)), len(order), tokens)
        self.whole = len(self.cuts) - 1 if order else 0
        self.filling = f"{len(order)} texts do not fill one batch of {tokens} tokens"
        self.key = "batch_tokens"
        self.share_among(_processes())

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(f"{self.seed}-{self.epoch}")
        rows = sorted(range(len(self.lengths)), key=lambda row: (self.lengths[row], rng.random()))
        batches = [rows[start:end] for start, end in pairwise(self.cuts)]
        rng.shuffle(batches)
        yield from batches[: self.batches]


class GroupBudget(SharedAmong):
    """Batches of whole groups, as many as fit into a number of tokens.

    The groups of an epoch come in random order, so that each batch holds several kinds and lengths; padding is avoided
    in the forward pass, see `forward_in_parts`. How many batches an epoch fills depends on its order; all epochs are
    given the number of the first one (a few batches are left out or come twice), so a resumed run finds its place.

    Args:
        dataset: The texts.
        lengths: Of each of them, tokens.
        groups: Rows of each group.
        tokens: Most tokens of a batch; a larger group is a batch of its own.
        seed: Of the order.

    Raises:
        ValueError: If the groups do not fill a batch in each process.
    """

    def __init__(
        self, dataset: Dataset, lengths: Sequence[int], groups: Sequence[Sequence[int]], tokens: int, *, seed: int = 0
    ) -> None:
        super().__init__(dataset, batch_size=1, drop_last=True, seed=seed)
        self.batch_size: Any = None
        self.groups = [list(group) for group in groups]
        self.costs = [sum(lengths[row] for row in group) for group in groups]
        self.tokens = tokens
        first = self._epoch(0)
        self.whole = len(first)
        texts = sum(map(len, groups))
        self.filling = f"{texts} texts in groups do not fill one batch of {tokens} tokens"
        self.key = "batch_tokens"
        self.share_among(_processes())
        _warn_of_lonely(texts - sum(map(len, first)), texts, tokens)

    def _epoch(self, epoch: int) -> list[list[int]]:
        """Batches of an epoch; one of fewer than three texts has nothing to compare and is left out."""
        order = list(range(len(self.groups)))
        random.Random(f"{self.seed}-{epoch}").shuffle(order)
        found: list[list[int]] = [[]]
        cost = 0
        for group in order:
            if found[-1] and cost + self.costs[group] > self.tokens:
                found.append([])
                cost = 0
            found[-1] += self.groups[group]
            cost += self.costs[group]
        return [batch for batch in found if len(batch) > 2]

    def __iter__(self) -> Iterator[list[int]]:
        found = self._epoch(self.epoch)
        yield from islice(cycle(found), self.batches)


class AsBegun(BatchSampler):
    """The batches of a stock sampler as so many processes had them, in their order, for another number of processes.

    Of several processes sentence-transformers leaves the last, smaller batch out, and accelerate what is not one each.

    Args:
        sampler: Of the trainer.
        rows: Of the data.
        begun: How many processes there were.
    """

    drop_last = True

    def __init__(self, sampler: Any, rows: int, begun: int) -> None:
        self.inner = sampler
        self.begun = begun
        self.batch_size = sampler.batch_size
        self.batches = rows // self.batch_size // begun * begun

    @property
    def sampler(self) -> Any:
        """Of the rows; accelerate puts a seeded one in its place."""
        return self.inner.sampler

    @sampler.setter
    def sampler(self, sampler: Any) -> None:
        self.inner.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Of the inner one."""
        self.inner.set_epoch(epoch)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        full = (batch for batch in self.inner if len(batch) == self.batch_size)
        while len(together := list(islice(full, self.begun))) == self.begun:
            yield from together


def as_begun(sampler: Any, rows: int, begun: int, processes: int, *, drop_last: bool) -> Any:
    """A sampler whose batches can be shared by processes so that each step is what it was.

    Args:
        sampler: Of the trainer.
        rows: Of the data.
        begun: How many processes began the run, see `training.resume.keep_steps`.
        processes: How many there are now.
        drop_last: What the recipe says of the last batch, where it is smaller.

    Raises:
        ValueError: If an epoch has batches that they cannot share.
    """
    if isinstance(sampler, SharedAmong):
        sampler.share_among(begun)
    elif begun == processes:
        return sampler
    else:
        sampler = AsBegun(sampler, rows, begun)
        if begun == 1 and not drop_last and rows % sampler.batch_size:
            raise ValueError(
                f"the run began in one process, where the last batch of an epoch is smaller ({rows} rows in batches of "
                f"{sampler.batch_size}); go on with 1 process"
            )
    if len(sampler) % processes:
        fitting = ", ".join(str(n) for n in range(1, begun + 1) if begun % n == 0)
        raise ValueError(
            f"an epoch of {len(sampler)} batches, as the run began with, cannot be shared by {processes} processes; go "
            f"on with {fitting} processes"
        )
    return sampler


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


@dataclass
class RoughCollator(SentenceTransformerDataCollator):
    """The stock collator, before which some of the anchors become fragments: others in every epoch.

    Where a row has `PROMPT_CHARACTERS`, so many at the start of its anchor are a prompt and stay as they are.

    Attributes:
        share: Of the anchors that are changed, see `roughen`.
        seed: Of the choice, which depends on seed, epoch and text alone.
    """

    share: float = 0.0
    seed: int = 0
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose anew."""
        self.epoch = epoch

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch, some anchors changed."""
        rows = []
        for row in features:
            rng = random.Random(f"{self.seed}-{self.epoch}-{row['anchor']}")
            changed, lower = rng.random() < self.share, rng.random() < 0.5
            row = dict(row)
            start = row.pop(PROMPT_CHARACTERS, 0)
            if changed:
                row["anchor"] = row["anchor"][:start] + roughen(row["anchor"][start:], lower)
            rows.append(row)
        return super().__call__(rows)
