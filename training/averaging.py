"""Average two folders of experts of one line: `python -m training.averaging FOLDER OTHER --share 0.7 --out OUT`.

The mean of the weights of a model and its further training is often better than either (Wortsman et al. 2022, "Model
soups"). The mean of two low-rank products has twice the rank: it is cut to the rank of the first by a singular value
decomposition. The projections are each turned to principal components of their own; before the mean, the second is
turned to the first (orthogonal Procrustes), which changes no cosine of it.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from training.command import RECIPE_FILE, one_line_errors
from training.labels import merged
from ubmoe_st.checkpoint import is_of_others, save_tensors
from ubmoe_st.experts import LowRank, load_low_rank, save_low_rank
from ubmoe_st.files import read_json, replacing_folder, write_json
from ubmoe_st.upcycling import DELTA_NAME, HEAD_NAME, PROJECTION_NAME

logger = logging.getLogger(__name__)

_LABEL = ("training", "teachers")
"""Keys of a recipe of experts that say who taught them."""


def average(folder: str | Path, other: str | Path, share: float, out: str | Path) -> float:
    """Write the weighted mean of two folders of experts; the rest of the folder is that of the first.

    What is said of their training is that of both. A warning is logged where they were trained with another pooling or
    other prompts.

    Args:
        folder: From `export_experts`.
        other: Of the same base, layers and dimensions; its rank may be another.
        share: Of the second, between 0 and 1.
        out: The new folder. It may be one of the two.

    Returns:
        How much of the mean the cut to the rank loses, as a share of its Frobenius norm.

    Raises:
        FileNotFoundError: If a folder holds no experts.
        ValueError: If the share is no share, or the folders do not fit each other.
    """
    folder, other = Path(folder), Path(other)
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    for one in (folder, other):
        if not (one / DELTA_NAME).is_file():
            raise FileNotFoundError(f"expected a folder with {DELTA_NAME}, got {one}; give folders of experts")
    first, metadata = load_low_rank(folder / DELTA_NAME)
    second, of_second = load_low_rank(other / DELTA_NAME)
    if metadata != of_second:
        raise ValueError(f"{folder} and {other} were trained on different weights; average experts of one base")
    widths = [{name: (a.shape[1], b.shape[0]) for name, (a, b) in one.items()} for one in (first, second)]
    if widths[0] != widths[1]:
        raise ValueError(f"{folder} and {other} differ in their layers; average experts of one base")
    for name in _differing(folder, other):
        logger.warning("%s and %s differ in %s; the mean has that of the first", folder, other, name)
    mean, lost = mean_of(first, second, share)
    projections = [one / PROJECTION_NAME for one in (folder, other)]
    if projections[0].is_file() != projections[1].is_file():
        raise ValueError(f"only one of {folder} and {other} has {PROJECTION_NAME}; give both or neither")
    projection = None
    if projections[0].is_file():
        projection = mean_projection(load_file(projections[0]), load_file(projections[1]), share)
    with replacing_folder(out, keep=is_of_others) as temporary:
        # Not the head, which was fitted to the first alone.
        shutil.copytree(folder, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns(HEAD_NAME))
        if (temporary / RECIPE_FILE).is_file() or (other / RECIPE_FILE).is_file():
            write_json(temporary / RECIPE_FILE, _recipe_of_mean(folder, other, share))
        save_low_rank(mean, temporary / DELTA_NAME, metadata)
        if projection is not None:
            save_tensors(projection, temporary / PROJECTION_NAME)
    return lost


def _told(folder: Path) -> dict[str, Any]:
    file = folder / RECIPE_FILE
    return read_json(file) if file.is_file() else {}


def _recipe_of_mean(folder: Path, other: Path, share: float) -> dict[str, Any]:
    """The recipe of the first folder, with the label of the experts that the mean is of."""
    first, second = _told(folder), _told(other)
    label = merged(first, second, " and ") if 0 < share < 1 else (first, second)[round(share)]
    rest = {key: value for key, value in first.items() if key not in _LABEL}
    return {**rest, **{key: label[key] for key in _LABEL if key in label}}


def _differing(folder: Path, other: Path) -> list[str]:
    """What two folders of experts say of how texts are read, where they say different things."""
    told = [_told(folder), _told(other)]
    return [name for name in ("pooling", "prompts", "default_prompt_name") if told[0].get(name) != told[1].get(name)]


def mean_of(first: LowRank, second: LowRank, share: float) -> tuple[LowRank, float]:
    """The mean of the products B A, cut to the rank of the first, and the share that the cut loses."""
    found: LowRank = {}
    lost = whole = 0.0
    for name, (a, b) in first.items():
        other_a, other_b = second[name]
        # The product of the thin factors' triangles has the singular values of the mean itself.
        left, l_small = torch.linalg.qr(torch.cat([(1 - share) * b.double(), share * other_b.double()], 1))
        right, r_small = torch.linalg.qr(torch.cat([a.double(), other_a.double()]).T)
        u, values, v = torch.linalg.svd(l_small @ r_small.T)
        rank = len(a)
        root = values[:rank].sqrt()
        found[name] = ((right @ v[:rank].T * root).T.to(a.dtype), (left @ u[:, :rank] * root).to(b.dtype))
        lost += float(values[rank:].square().sum())
        whole += float(values.square().sum())
    return found, (lost / whole) ** 0.5 if whole else 0.0


def mean_projection(first: dict[str, Tensor], second: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The mean of two linear layers behind the pooling, of the size of the first.

    Args:
        first: `weight` (K, D) and `bias` (K,).
        second: Of the same shape. The vectors are normalised behind it: its size and its rotation are free.
        share: Of the second.

    Raises:
        ValueError: If the shapes differ.
    """
    if {k: t.shape for k, t in first.items()} != {k: t.shape for k, t in second.items()}:
        raise ValueError("the projections differ in shape; average experts of as many dimensions")
    size, other_size = (one["weight"].double().norm() for one in (first, second))
    u, _, v = torch.linalg.svd(first["weight"].double() @ second["weight"].double().T)
    turn = u @ v * size / other_size
    return {
        key: ((1 - share) * tensor.double() + share * turn @ second[key].double()).to(tensor.dtype)
        for key, tensor in first.items()
    }


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Average two folders of experts."""
    parser = argparse.ArgumentParser(prog="python -m training.averaging", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--share", type=float, default=0.5, help="of the second folder")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    lost = average(options.folder, options.other, options.share, options.out)
    logger.info("%s: the cut to the rank loses %.1f %% of the mean", options.out, 100 * lost)


if __name__ == "__main__":
    main()
