"""A tiny data folder, recipe and teacher for the tests of `training`."""

from __future__ import annotations

import numpy as np

from helpers.models import WORDS
from training.mixtures import Mixture
from training.recipe import ContrastiveRecipe
from training.teacher_settings import PromptedTeacher


def make_training_data(folder):
    """A data folder: 60 sentences and a development set."""
    rng = np.random.default_rng(0)
    words = [w for w in WORDS if w not in ("user", "assistant")]
    lines = [" ".join(rng.choice(words, rng.integers(4, 12))) for _ in range(60)]
    (folder / "sentences.txt").write_text("\n".join(lines) + "\n")
    (folder / "eval" / "sts").mkdir(parents=True)
    rows = [f"{number % 6}\t{a}\t{b}\tx" for number, (a, b) in enumerate(zip(lines[:20], lines[20:40]))]
    (folder / "eval" / "sts" / "STSB-dev.tsv").write_text("score\ts1\ts2\tgenre\n" + "\n".join(rows) + "\n")
    return folder


def make_recipe(base, data, out):
    """A function that makes a recipe of a few steps, with changes."""

    def make(**changes):
        trainer = {
            "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True, "seed": 3,
            "logging_steps": 1, "save_strategy": "no", **changes.pop("trainer", {}),
        }  # fmt: skip
        values = {
            "base": str(base),
            "out": str(out),
            "rank": 2,
            "ffn_dropout": 0.2,
            "sentences": Mixture({str(data / "sentences.txt"): 1.0}, words=(1, 30)),
        }
        return ContrastiveRecipe(**{**values, **changes, "trainer": trainer})

    return make


def make_teacher(folder):
    return PromptedTeacher(
        prefix="the cat sits on the ", suffix=" in the", layers=[1, 2, 3], folder=str(folder), dimension=16
    )
