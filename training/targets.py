"""What a loss compares with: the stored vectors of the teachers as unit vectors of all texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.recipe import ContrastiveRecipe
from training.teacher import CHUNK, asked_about, teacher_keys, teacher_vectors
from training.teacher_settings import EmbedderTeacher, PromptedTeacher, Teacher
from training.texts import Corpus
from ubmoe_st.bases import Base

_FIT_ROWS = 6000


def targets(
    recipe: ContrastiveRecipe,
    base: Base,
    corpus: Corpus,
    *,
    compute: bool = True,
    device: str = "cpu",
    of_all_kinds: bool = False,
) -> list[Tensor]:
    """What a loss compares with: by teacher, unit vectors of all texts, (N, K); zeros of those it was not asked about.

    Args:
        recipe: Names the teachers.
        base: Its base model.
        corpus: Its texts.
        compute: False: raise if vectors are missing on disk.
        device: To compute missing ones on.
        of_all_kinds: Pass over teachers that leave a kind of text out.
    """
    found = []
    for key, teacher in zip(teacher_keys(recipe), recipe.teachers, strict=True):
        if of_all_kinds and teacher.left_out:
            continue
        vectors = teacher_vectors(base, teacher, corpus.texts, corpus.kinds, compute=compute, device=device, key=key)
        known = asked_about(teacher, corpus.kinds)
        if len(known) == len(vectors) or not teacher.target_settings:
            found.append(targets_of(vectors, teacher, key))
            continue
        own = targets_of(vectors[known], teacher, key)
        whole = own.new_zeros(len(vectors), own.shape[1])
        whole[known] = own
        found.append(whole)
    return found


def targets_of(vectors: np.ndarray, teacher: Teacher, key: str) -> Tensor:
    """Targets of the texts that a teacher was asked about: unit vectors, (n, K).

    Args:
        vectors: As they are stored, (n, ...), fp16.
        teacher: Its target settings; without any the vectors are the targets.
        key: As for `teacher_vectors`.
    """
    if isinstance(teacher, PromptedTeacher):
        return teacher_targets(vectors, teacher, key=key)
    if isinstance(teacher, EmbedderTeacher) and teacher.center:
        mean = torch.from_numpy(vectors.mean(0, dtype=np.float64)).float()
        return F.normalize(torch.from_numpy(np.asarray(vectors, np.float32)) - mean, dim=-1)
    return torch.from_numpy(vectors)  # as they are stored; they stay on disk until a row is asked for


def teacher_targets(vectors: np.ndarray, teacher: PromptedTeacher, *, seed: int = 0, key: str = "teacher") -> Tensor:
    """Targets as described in `PromptedTeacher`.

    The components come from a seeded sample of 6,000 sentences, the means from all.

    Args:
        vectors: (N, layers, D).
        teacher: Its `dimension` K and `whitening`.
        seed: Of the sample.
        key: As for `teacher_vectors`.

    Returns:
        Unit vectors, (N, K), fp32.

    Raises:
        ValueError: If there are fewer sentences or features than components.
    """
    count, features = len(vectors), vectors.shape[1] * vectors.shape[2]
    if teacher.dimension > min(count, features, _FIT_ROWS):
        raise ValueError(
            f"{teacher.dimension} principal components need as many sentences and features, got {count} and "
            f"{features}; lower {key}.dimension"
        )
    blocks = [slice(start, start + 4 * CHUNK) for start in range(0, count, 4 * CHUNK)]
    layer_mean = torch.zeros(vectors.shape[1:], dtype=torch.float64)
    for block in blocks:
        layer_mean += torch.from_numpy(vectors[block].astype(np.float64)).sum(0) / count

    def unit(rows: Any) -> Tensor:  # (n, layers * D)
        raw = torch.from_numpy(np.asarray(vectors[rows], np.float32))
        return F.normalize(raw - layer_mean.float(), dim=-1).flatten(1)

    mean = torch.zeros(features, dtype=torch.float64)
    for block in blocks:
        mean += unit(block).double().sum(0) / count
    sample = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:_FIT_ROWS]
    _, values, components = torch.linalg.svd(unit(sample.numpy()) - mean.float(), full_matrices=False)
    # The sign of a component is arbitrary; fixed, so that every process gets the same targets.
    signs = components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
    components = (components * signs)[: teacher.dimension]
    weights = (values[: teacher.dimension] / values[0]).clamp_min(1e-6) ** -teacher.whitening
    return torch.cat([F.normalize((unit(b) - mean.float()) @ components.T * weights, dim=-1) for b in blocks])
