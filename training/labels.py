"""How tables and cards call experts: by whom they were taught, over all phases of their training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.command import BEGUN_FILE, RECIPE_FILE, read_recipe
from training.recipe import SELF_DISTILLED, SUPERVISED, UNSUPERVISED, ContrastiveRecipe
from training.resume import TRAINED_FILE
from training.teacher import other_models
from training.teacher_settings import Teacher
from ubmoe_st.bases import Base
from ubmoe_st.checkpoint import is_checkpoint, read_config
from ubmoe_st.files import read_json

UNKNOWN = "unknown"
"""How experts are called of whose training nothing is said."""
_ALONE = (SELF_DISTILLED, UNSUPERVISED)
"""Labels of what no other model and no labels have taught."""
_DISTILLED = "distilled from "


def taught(recipe: ContrastiveRecipe, base: Base, kinds: Sequence[str] = ()) -> dict[str, Any]:
    """What a card says of a training: its kind (`training`), and the other models that taught (`teachers`).

    The phases before, which `init_from` names, are part of it. A share is that among the teachers of the last phase
    that a model taught in, as the mean over the texts; a teacher that was asked about no text is none.

    Args:
        recipe: Of this phase.
        base: Its base model.
        kinds: Of its texts. Empty: they are not known, and of one kind.
    """
    shares = _shares(recipe.teachers, kinds)
    found: list[dict[str, Any]] = [
        {"name": teacher.label, "share": round(shares[teacher.folder], 3), "trained_on": teacher.trained_on}
        for teacher in other_models(recipe, base)
        if shares[teacher.folder]
    ]
    now = _entry(recipe.supervision_of([entry["name"] for entry in found]), found)
    return now if recipe.init_from is None else merged(label_of(Path(recipe.init_from), base), now)


def merged(first: Mapping[str, Any], second: Mapping[str, Any], word: str = ", then ") -> dict[str, Any]:
    """What a card says of experts of two trainings, each as `taught` gives it.

    They are self-distilled or unsupervised only if both trainings are one of these. Else all other models are named
    that taught in one of them.

    Args:
        first: Empty where nothing is said of it.
        second: As well.
        word: Between the two, where one is in words that are not known here.
    """
    one, other = (entry.get("training") or UNKNOWN for entry in (first, second))
    teachers = {entry["name"]: entry for side in (first, second) for entry in side.get("teachers") or []}
    parts = [_parts(label) for label in (one, other)]
    if one == other == UNKNOWN:
        return {}
    if one in _ALONE and other in _ALONE:
        return _entry(other, [])
    if parts[0] is None or parts[1] is None:
        return _entry(one if one == other else f"{one}{word}{other}", list(teachers.values()))
    names = list(dict.fromkeys([*parts[0][1], *parts[1][1]]))
    told = [SUPERVISED] if parts[0][0] or parts[1][0] else []
    told += [_DISTILLED + " and ".join(names)] if names else []
    return _entry(" and ".join(told), list(teachers.values()))


def label_of(folder: Path, base: Base) -> dict[str, Any]:
    """What is said of the experts that a training starts from, as `taught` gives it; empty where nothing is.

    Args:
        folder: As for `init_from`: of a run, of one of its checkpoints, or of experts.
        base: The base model of a run that has left no label.
    """
    if (folder / TRAINED_FILE).is_file():
        run = folder if (folder / RECIPE_FILE).is_file() else folder.parent.parent
        return _label_of_run(run, base)
    if is_checkpoint(folder.parent):  # the folder `generator` of a checkpoint
        return _entry(read_config(folder.parent).training, [])
    return _said(folder / RECIPE_FILE)


def _label_of_run(run: Path, base: Base) -> dict[str, Any]:
    if (run / BEGUN_FILE).is_file():
        return read_json(run / BEGUN_FILE)["taught"]
    if found := _said(run / "experts" / RECIPE_FILE):
        return found
    # Of a run from before the label was written at the start, which has left no experts.
    try:
        return taught(read_recipe(ContrastiveRecipe, run / RECIPE_FILE, finished=True), base)
    except (OSError, ValueError):
        return {}


def _said(file: Path) -> dict[str, Any]:
    """What the `recipe.json` beside experts says of their training."""
    found = read_json(file) if file.is_file() else {}
    return _entry(found.get("training"), found.get("teachers") or [])


def _entry(label: str | None, teachers: list[Any]) -> dict[str, Any]:
    return {**({"training": label} if label else {}), **({"teachers": teachers} if teachers else {})}


def _parts(label: str) -> tuple[bool, list[str]] | None:
    """Whether labels taught, and the names of other models. None: the label is in other words."""
    if label in _ALONE or label == SUPERVISED:
        return label == SUPERVISED, []
    rest = label.removeprefix(f"{SUPERVISED} and ")
    if not rest.startswith(_DISTILLED) or "," in rest:
        return None
    return rest != label, rest.removeprefix(_DISTILLED).split(" and ")


def _shares(teachers: Sequence[Teacher], kinds: Sequence[str]) -> dict[str, float]:
    """By folder of its vectors, the share of each teacher among the weights of a text, as the mean over the texts."""
    counts = Counter(kinds) or Counter(sentences=1)
    shares = dict.fromkeys((teacher.folder for teacher in teachers), 0.0)
    for kind, count in counts.items():
        weights = [teacher.weight_of(kind) if kinds else teacher.weight for teacher in teachers]
        for teacher, weight in zip(teachers, weights):
            shares[teacher.folder] += (weight / sum(weights) if sum(weights) else 0.0) * count / counts.total()
    return shares
