"""Which prompt and which layers make a base its own best teacher, measured on the development sets.

    python -m training.teacher --choose training/recipes/X.yaml [--write]

reads a sample of the sets once with each prompt, scores combinations of layers, and prints a table. Nothing is stored;
`--write` puts the best prompt and layers into the recipe's file.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.data import data_folder, sts_pairs
from training.recipe import ContrastiveRecipe
from training.targets import teacher_targets
from training.teacher import PromptedBase
from training.teacher_settings import PromptedTeacher
from ubmoe_st.bases import Base
from ubmoe_st.files import replacing

_EXAMPLE = 'This sentence : "A man is playing a guitar." means in one word:"music". '
_ONE_WORD = '" means in one word:"'
_ESSENCE = (
    "The essence of a sentence is often captured by its main subjects and actions, while descriptive terms provide "
    "additional but less central details. With this in mind , this sentence : "
)

PROMPTS: dict[str, tuple[str, str]] = {
    "one word": ('This sentence : "', _ONE_WORD),
    "one word, example": (_EXAMPLE + 'This sentence : "', _ONE_WORD),
    "essence": (f'{_ESSENCE}"', _ONE_WORD),
    "essence, example": (
        f'{_ESSENCE}"A man is playing a guitar." means in one word:"music". This sentence : "',
        _ONE_WORD,
    ),
}
"""Prefix and suffix by name: Jiang et al. (2023); with an example; the knowledge of Zhang et al. (2024) before it."""

DEV_SETS = ("STSB-dev", "SICK-R-dev")
LOWEST = 0.5
"""Layers below this share of the depth are not tried: they lost by far on every base so far."""

STEPS = (1, 2, 3)
"""Distances, in layers, between the three of a combination."""


@dataclass(frozen=True)
class Choice:
    """A prompt, layers, and what their targets reach.

    Attributes:
        prompt: Name in `PROMPTS`, or `recipe`.
        teacher: The recipe's one with this prompt and these layers, as shares of the depth.
        layers: Their numbers.
        scores: Spearman correlation x 100 by development set.
    """

    prompt: str
    teacher: PromptedTeacher
    layers: tuple[int, ...]
    scores: dict[str, float]

    @property
    def mean(self) -> float:
        """Over the development sets."""
        return sum(self.scores.values()) / len(self.scores)


def choose(
    recipe: ContrastiveRecipe,
    base: Base,
    *,
    pairs: int = 300,
    tried: int = 5,
    device: str = "cpu",
    say: Callable[[str], None] = lambda _: None,
) -> list[Choice]:
    """Score prompts and layers for the recipe's prompted teacher.

    Every layer from `LOWEST` of the depth on, alone and in threes, is scored by the cosines of its centred states; the
    `tried` best of each prompt then become targets as in training, and are scored by these.

    Args:
        recipe: With a teacher of kind `prompted-base`; its dimension and whitening are kept, its own prompt is tried
            with the others.
        base: Its base model.
        pairs: Of each development set that `evaluate` names (all of `DEV_SETS` if it names none), a seeded sample.
        tried: Combinations of layers of each prompt that are scored in full.
        device: To compute on.
        say: Takes a line for each prompt that is done.

    Returns:
        The choices, best first.

    Raises:
        ValueError: If the recipe has no such teacher.
    """
    teacher = next((teacher for teacher in recipe.teachers if isinstance(teacher, PromptedTeacher)), None)
    if teacher is None:
        raise ValueError("--choose is for a recipe with a teacher of kind prompted-base; this one has none")
    names = [name for name in recipe.evaluate if name in DEV_SETS] or list(DEV_SETS)
    sets = {name: sts_pairs(name, data_folder(), pairs) for name in names}
    texts = list(dict.fromkeys(text for first, second, _ in sets.values() for text in [*first, *second]))
    rows = {text: row for row, text in enumerate(texts)}
    places = {
        name: (torch.tensor([rows[t] for t in first]), torch.tensor([rows[t] for t in second]), gold)
        for name, (first, second, gold) in sets.items()
    }
    loaded = PromptedBase.load(base, replace(teacher, layers=[1.0], scale=1.0), device)
    depth = loaded.depth
    numbers = list(range(max(1, int(LOWEST * depth)), depth + 1))
    choices = []
    for name, (prefix, suffix) in {"recipe": (teacher.prefix, teacher.suffix), **PROMPTS}.items():
        if name != "recipe" and (prefix, suffix) == (teacher.prefix, teacher.suffix):
            continue
        asked = replace(teacher, prefix=prefix, suffix=suffix, layers=list(numbers), scale=1.0)
        states = PromptedBase(loaded.model, loaded.tokenizer, asked).vectors(texts)  # (N, layers, D)
        centred = F.normalize(torch.from_numpy(states - states.mean(0)), dim=-1)
        quick = {
            layers: _mean(scores_of(centred[:, [numbers.index(n) for n in layers]].flatten(1), places))
            for layers in combinations(numbers)
        }
        for layers in sorted(quick, key=lambda found: -quick[found])[:tried]:
            kept = states[:, [numbers.index(n) for n in layers]]
            dimension = min(teacher.dimension, len(texts), kept.shape[1] * kept.shape[2])
            scores = scores_of(teacher_targets(kept, replace(asked, dimension=dimension)), places)
            shares: list[int | float] = [round(layer / depth, 3) for layer in layers]
            chosen = replace(teacher, prefix=prefix, suffix=suffix, layers=shares)
            choices.append(Choice(name, chosen, layers, scores))
        best = max((choice for choice in choices if choice.prompt == name), key=lambda choice: choice.mean)
        say(f"prompt {name!r}: {best.mean:.2f} with layers {list(best.layers)} of {depth}")
    return sorted(choices, key=lambda choice: -choice.mean)


def combinations(numbers: Sequence[int]) -> list[tuple[int, ...]]:
    """Each layer alone, and each three of them in equal steps."""
    threes = [(n - 2 * step, n - step, n) for step, n in itertools.product(STEPS, numbers)]
    return [*((n,) for n in numbers), *(three for three in threes if three[0] >= numbers[0])]


def scores_of(vectors: Tensor, places: Mapping[str, tuple[Tensor, Tensor, list[float]]]) -> dict[str, float]:
    """Spearman correlation x 100 of cosines and gold scores, by development set.

    Args:
        vectors: (N, K).
        places: Rows of both sides of the pairs, and gold scores, by set.
    """
    from scipy.stats import spearmanr

    found = {}
    for name, (first, second, gold) in places.items():
        cosines = F.cosine_similarity(vectors[first], vectors[second]).numpy()
        found[name] = 100 * float(np.nan_to_num(spearmanr(cosines, gold).statistic))
    return found


def _mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def table(choices: Sequence[Choice], most: int = 12) -> str:
    """Lines of the best choices, for a terminal."""
    sets = list(choices[0].scores)
    lines = ["  ".join([f"{'prompt':<20}", f"{'layers':<14}", *(f"{name:>10}" for name in sets), f"{'mean':>6}"])]
    for choice in choices[:most]:
        layers = ", ".join(map(str, choice.layers))
        values = [f"{choice.scores[name]:>10.2f}" for name in sets]
        lines.append("  ".join([f"{choice.prompt:<20}", f"{layers:<14}", *values, f"{choice.mean:>6.2f}"]))
    return "\n".join(lines)


def keys(choice: Choice) -> dict[str, str]:
    """Lines of YAML for the teacher of a recipe, by key."""
    values = {"prefix": choice.teacher.prefix, "suffix": choice.teacher.suffix, "layers": choice.teacher.layers}
    return {key: f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()}


def write(choice: Choice, file: Path) -> None:
    """Put prompt and layers into a recipe's file; comments and everything else stay as they are.

    Raises:
        ValueError: If the file does not have each key once, on a line of its own; nothing is written.
    """
    import yaml

    before = text = file.read_text(encoding="utf-8")
    lines = keys(choice)
    refused = ValueError(
        f"{file}: expected {', '.join(lines)} once, each on a line of its own; nothing was written, put in the "
        "printed lines"
    )
    for key, line in lines.items():
        found = list(re.finditer(rf"^( *){key}:[ \t]*\S.*$", text, re.MULTILINE))
        if len(found) != 1:
            raise refused
        comment = re.search(r"[ \t]+#.*$", found[0].group())
        # A number sign in a text begins no comment: then the line says something else without it.
        if comment and _read(found[0].group().strip()) == _read(found[0].group()[: comment.start()].strip()):
            line += comment.group()
        text = text[: found[0].start()] + found[0][1] + line + text[found[0].end() :]
    try:
        same = _others(yaml.safe_load(before), lines) == _others(yaml.safe_load(text), lines)
    except yaml.YAMLError:
        same = False
    if not same:  # a value went on over further lines
        raise refused
    with replacing(file, unique=True) as out:
        out.write(text.encode())


def _read(line: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(line)
    except yaml.YAMLError:
        return line


def _others(values: Any, left_out: Container[str]) -> Any:
    """Values of a recipe without those of some keys, however deep."""
    if isinstance(values, dict):
        return {key: _others(value, left_out) for key, value in values.items() if key not in left_out}
    return [_others(value, left_out) for value in values] if isinstance(values, list) else values
