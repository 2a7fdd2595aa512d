"""The teacher of the self-distilled recipe: the same base model, run causally with a one-word prompt.

    python -m training.teacher training/recipes/ubmoe-135m.yaml [--shard 0/2] [--set key=value ...]

computes the vectors once and keeps them on disk; an interrupted run goes on, and shards may run side by side.
No label, no pair and no other model is involved.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.data import texts_sha256
from training.prompted import PromptedReader
from training.trainers import one_line_errors, read_recipe
from ubmoe_st.bases import Base, resolve_base

logger = logging.getLogger(__name__)

MANIFEST = "teacher.json"
VECTORS = "vectors.f16"
DONE = "done.u8"
CHUNK = 1024
_FIT_ROWS = 6000


@dataclass
class Teacher:
    """How the base is asked, and how its answer becomes a target.

    The target of a sentence: its hidden states of some layers at the last prompt token, each minus its mean over
    the sentences and normalised, concatenated, minus the mean, projected on the first principal components, each
    component weighed by (singular value / largest) ** -whitening, normalised.

    Attributes:
        prefix: Text before the sentence; computed once, as a key-value cache.
        suffix: Text after the sentence.
        layers: Numbers of the hidden states (0 is the embedding).
        folder: Where the vectors are kept.
        dimension: Principal components.
        whitening: 0 leaves the components as they are, 1 gives all the same variance.
        batch_size: Sentences per forward pass.
    """

    prefix: str
    suffix: str
    layers: list[int]
    folder: str
    dimension: int = 384
    whitening: float = 0.25
    batch_size: int = 64


@dataclass
class PromptedBase:
    """The base model as a causal reader of `prefix + sentence + suffix`."""

    model: Any
    tokenizer: Any
    teacher: Teacher
    _reader: PromptedReader = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._reader = PromptedReader(self.model, self.tokenizer, self.teacher.prefix, self.teacher.suffix)

    @classmethod
    def load(cls, base: Base, teacher: Teacher, device: str = "cpu") -> PromptedBase:
        """Load the base without the layers behind the last one that is asked for."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        lm = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
        model = getattr(lm, lm.base_model_prefix).to(device).eval()
        count = len(model.layers)
        if not teacher.layers or min(teacher.layers) < 0 or max(teacher.layers) > count:
            raise ValueError(f"teacher layers must be between 0 and {count}, got {teacher.layers}")
        # The last hidden state of a model has passed its final norm: one layer more keeps it raw.
        kept = min(max(teacher.layers) + 1, count)
        model.layers = model.layers[:kept]
        model.config.num_hidden_layers = kept
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:kept]
        return cls(model, AutoTokenizer.from_pretrained(base.path), teacher)

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """Hidden states at the last prompt token, (N, layers, D), fp16."""
        teacher = self.teacher
        rows = self._reader.tokens(texts)
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        out = np.zeros((len(rows), len(teacher.layers), self.model.config.hidden_size), np.float16)
        for start in range(0, len(order), teacher.batch_size):
            batch = order[start : start + teacher.batch_size]
            picked = self._reader.states([rows[i] for i in batch], teacher.layers)
            out[batch] = picked.cpu().numpy().astype(np.float16)
        return out


def teacher_vectors(
    base: str | os.PathLike[str] | Base,
    teacher: Teacher,
    sentences: Sequence[str],
    *,
    shard: tuple[int, int] = (0, 1),
    compute: bool = True,
    device: str = "cpu",
) -> np.ndarray:
    """Teacher vectors of the sentences, from disk where they are there already.

    `folder` gets `teacher.json` (what they are of), `vectors.f16` (N, layers, D) and `done.u8`, a byte for each
    chunk of 1,024 sentences that is complete.

    Args:
        base: The base model.
        teacher: How it is asked.
        sentences: N texts.
        shard: (k, n): compute chunks k, k + n, ... only.
        compute: False: raise if something is missing.
        device: To compute on.

    Returns:
        A read-only memory map, (N, layers, D), fp16.

    Raises:
        ValueError: If the folder holds vectors of something else, or some are missing and `compute` is False.
    """
    from transformers import AutoConfig

    found = base if isinstance(base, Base) else resolve_base(base)
    folder = Path(teacher.folder)
    width = AutoConfig.from_pretrained(found.path).hidden_size
    shape = (len(sentences), len(teacher.layers), width)
    chunks = -(-len(sentences) // CHUNK)
    _check_manifest(folder, teacher, found, sentences, shape)
    vectors, done = _open(folder / VECTORS, np.float16, shape), _open(folder / DONE, np.uint8, (chunks,))
    missing = [chunk for chunk in range(chunks) if not done[chunk] and chunk % shard[1] == shard[0]]
    if missing and not compute:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {chunks} chunks of teacher vectors; run `python -m training.teacher` "
            "on this recipe first"
        )
    if missing:
        model = PromptedBase.load(found, teacher, device)
    for chunk in missing:
        rows = slice(chunk * CHUNK, min((chunk + 1) * CHUNK, len(sentences)))
        start = time.perf_counter()
        vectors[rows] = model.vectors(sentences[rows])
        vectors.flush()
        done[chunk] = 1
        done.flush()
        rate = (rows.stop - rows.start) / (time.perf_counter() - start)
        logger.info("teacher vectors: chunk %d of %d, %.1f sentences/s", chunk + 1, chunks, rate)
    return np.memmap(folder / VECTORS, np.float16, "r", shape=shape)


def _check_manifest(
    folder: Path, teacher: Teacher, base: Base, sentences: Sequence[str], shape: tuple[int, ...]
) -> None:
    asked = {key: value for key, value in asdict(teacher).items() if key in ("prefix", "suffix", "layers")}
    manifest = {**asked, "base_sha256": base.sha256, "sentences_sha256": texts_sha256(sentences), "shape": list(shape)}
    file = folder / MANIFEST
    if file.is_file():
        old = json.loads(file.read_text(encoding="utf-8"))
        for key, value in manifest.items():
            if old.get(key) != value:
                raise ValueError(
                    f"{folder} holds teacher vectors of another {key}; choose another folder "
                    "(--set teacher.folder=...), or delete it"
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def _open(file: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not file.exists():
        # Appending nothing leaves a file alone that another shard has just made.
        file.open("ab").close()
    if file.stat().st_size < size:
        os.truncate(file, size)
    return np.memmap(file, dtype, "r+", shape=shape)


def teacher_targets(vectors: np.ndarray, teacher: Teacher, *, seed: int = 0) -> Tensor:
    """Targets as described in `Teacher`.

    The components come from a seeded sample of 6,000 sentences, the means from all.

    Args:
        vectors: (N, layers, D).
        teacher: Its `dimension` K and `whitening`.
        seed: Of the sample.

    Returns:
        Unit vectors, (N, K), fp32.

    Raises:
        ValueError: If there are fewer sentences or features than components.
    """
    count, features = len(vectors), vectors.shape[1] * vectors.shape[2]
    if teacher.dimension > min(count, features, _FIT_ROWS):
        raise ValueError(
            f"{teacher.dimension} principal components need as many sentences and features, got {count} and "
            f"{features}; lower teacher.dimension"
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


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Compute the teacher vectors of a recipe."""
    from training.contrastive import ContrastiveRecipe
    from training.data import read_sentences

    parser = argparse.ArgumentParser(prog="python -m training.teacher", description=main.__doc__)
    parser.add_argument("recipe", help="YAML file with a section `teacher`")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    shard = f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"
    parser.add_argument("--shard", default=shard, help="k/n: every n-th chunk, from chunk k; torchrun sets it")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = read_recipe(ContrastiveRecipe, options.recipe, options.set)
    if recipe.teacher is None or recipe.sentences is None:
        parser.error(f"{options.recipe} has no `teacher` or no `sentences`")
    first, _, count = options.shard.partition("/")
    sentences = read_sentences(recipe.sentences)
    teacher_vectors(recipe.base, recipe.teacher, sentences, shard=(int(first), int(count or 1)), device=options.device)


if __name__ == "__main__":
    main()
