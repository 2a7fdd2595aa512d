"""The teachers: the base itself, run causally with a one-word prompt, sentence-transformers models, overlap of letters.

    python -m training.teacher training/recipes/ubmoe-135m-self.yaml [--shard 0/2] [--set key=value ...]

computes the vectors of all texts once and keeps them on disk; an interrupted run goes on, and shards may run side by
side. `training.targets` makes of them what a loss compares with.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.command import has_bf16, one_line_errors, read_recipe, recipe_parser
from training.data import texts_sha256
from training.embedders import embedder_path
from training.lexical import LexicalOverlap
from training.prompted import PromptedReader, special_start
from training.recipe import SELF_DISTILLED, ContrastiveRecipe
from training.teacher_settings import EmbedderTeacher, LexicalTeacher, PromptedTeacher, Teacher
from training.texts import read_corpus
from ubmoe_st.bases import Base, resolve_base
from ubmoe_st.checkpoint import is_checkpoint, read_config
from ubmoe_st.files import sha256_of, write_json

logger = logging.getLogger(__name__)

MANIFEST = "teacher.json"
VECTORS = "vectors.f16"
DONE = "done.u8"
CHUNK = 1024
_PASS_TOKENS = 8192
"""Most tokens of a batch of several texts that a prompted base reads: all its hidden states are in memory."""
_READ_BESIDE = (".json", ".txt", ".model", ".bin")
"""What else of an embedder's folder decides its vectors: modules, pooling, tokenizer, weights of another form."""
_LARGEST = float(np.finfo(np.float16).max)


# --- who answers ------------------------------------------------------------------------------------------------


@dataclass
class PromptedBase:
    """The base model as a causal reader of `prefix + sentence + suffix`."""

    model: Any
    tokenizer: Any
    teacher: PromptedTeacher
    _reader: PromptedReader = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._reader = PromptedReader(self.model, self.tokenizer, self.teacher.prefix, self.teacher.suffix)

    @classmethod
    def load(cls, base: Base, teacher: PromptedTeacher, device: str = "cpu") -> PromptedBase:
        """Load the base without the layers behind the last one that is asked for."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        lm = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
        model = getattr(lm, lm.base_model_prefix).to(device).eval()
        count = len(model.layers)
        numbers = layer_numbers(teacher.layers, count)
        # The last hidden state of a model has passed its final norm: one layer more keeps it raw.
        kept = min(max(numbers) + 1, count)
        model.layers = model.layers[:kept]
        model.config.num_hidden_layers = kept
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:kept]
        return cls(model, AutoTokenizer.from_pretrained(base.path), replace(teacher, layers=list(numbers)))

    @property
    def depth(self) -> int:
        """Layers that were loaded."""
        return len(self.model.layers)

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str], kinds: Sequence[str] | None = None) -> np.ndarray:
        """Hidden states at the last prompt token, (N, layers, D), fp32.

        Args:
            texts: N texts.
            kinds: Not used: the prompt is the same for all.
        """
        teacher = self.teacher
        layers = layer_numbers(teacher.layers, self.depth)
        rows = self._reader.tokens(texts)
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        out = np.zeros((len(rows), len(layers), self.model.config.hidden_size), np.float32)
        with _autocast(teacher, self.model.device):
            while order:  # the longest first
                count = min(teacher.batch_size, max(1, _PASS_TOKENS // max(1, len(rows[order[0]]))))
                batch, order = order[:count], order[count:]
                out[batch] = self._reader.states([rows[i] for i in batch], layers).float().cpu().numpy()
        return out * np.float32(teacher.scale)


def _autocast(teacher: PromptedTeacher | EmbedderTeacher, device: torch.device) -> torch.autocast:
    """Products in bf16 where the teacher's `bf16` says so."""
    wanted = has_bf16(on_cpu=device.type == "cpu") if teacher.bf16 == "auto" else teacher.bf16
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def layer_numbers(layers: Sequence[int | float], depth: int) -> list[int]:
    """Numbers of the hidden states that a recipe means.

    Args:
        layers: Numbers (0 is the embedding), or shares of the depth: 0.8 of 30 layers is layer 24, 1.0 the last one.
        depth: Layers of the base.

    Raises:
        ValueError: If there are none, or the base has no such layer.
    """
    numbers = [round(layer * depth) if isinstance(layer, float) else layer for layer in layers]
    if not numbers or min(numbers) < 0 or max(numbers) > depth:
        raise ValueError(
            f"teacher layers must be between 0 and {depth}, or shares of the depth from 0.0 to 1.0, got {list(layers)}"
        )
    return numbers


@dataclass
class Embedder:
    """A sentence-transformers model that encodes texts with the prompt of their kind."""

    model: Any
    teacher: EmbedderTeacher
    _batch_size: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._batch_size = self.teacher.batch_size

    @classmethod
    def load(cls, teacher: EmbedderTeacher, device: str = "cpu") -> Embedder:
        """Open the model.

        Raises:
            ValueError: If it is no sentence-transformers model.
        """
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.util import is_sentence_transformer_model

        name = embedder_path(teacher.model)
        # Without modules.json SentenceTransformer would put mean pooling on any model, without a word.
        if not is_sentence_transformer_model(name):
            raise ValueError(
                f"teacher {teacher.model}: expected a sentence-transformers model (a folder or Hub id with "
                "modules.json), got none; check the name, HF_HUB_OFFLINE and the network"
            )
        return cls(SentenceTransformer(name, device=device).eval(), teacher)

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str], kinds: Sequence[str] | None = None) -> np.ndarray:
        """Unit vectors, (N, D), fp32.

        Args:
            texts: N texts.
            kinds: Of each of them; choose the prompts. None: all have the prompt `default`.
        """
        with _autocast(self.teacher, self.model.device):
            return self._vectors(texts, kinds)

    def _vectors(self, texts: Sequence[str], kinds: Sequence[str] | None) -> np.ndarray:
        prompts = [self.prompt(kind) for kind in kinds or ["default"] * len(texts)]
        out: np.ndarray | None = None
        for prompt in dict.fromkeys(prompts):
            rows = [row for row, own in enumerate(prompts) if own == prompt]
            found = self._encode([texts[row] for row in rows], prompt).astype(np.float32)
            if out is None:
                out = np.zeros((len(texts), found.shape[1]), np.float32)
            out[rows] = found
        return out if out is not None else np.zeros((0, self.model.get_embedding_dimension()), np.float32)

    def _encode(self, texts: list[str], prompt: str | None) -> np.ndarray:
        """The stock one; where memory runs out, in batches of half as many texts from then on."""
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        while True:
            try:
                return self.model.encode(
                    texts,
                    prompt=prompt,
                    batch_size=self._batch_size,
                    normalize_embeddings=True,
                    show_progress_bar=False,
                )
            except RuntimeError as error:
                if self._batch_size == 1 or not should_reduce_batch_size(error):
                    raise
            self._batch_size //= 2
            clear_device_cache(garbage_collection=True)
            logger.warning("%s ran out of memory: batches of %d texts now", self.teacher.label, self._batch_size)

    def prompt(self, kind: str) -> str | None:
        """The prompt of a kind of text; None: the model's own default."""
        return self.teacher.prompts.get(kind, self.teacher.prompts.get("default"))

    def _put_before(self, kind: str) -> str:
        """The text of the prompt, the model's own default one included."""
        prompt = self.prompt(kind)
        if prompt is None:
            prompt = (self.model.prompts or {}).get(self.model.default_prompt_name or "")
        return prompt or ""

    def count_cut(self, texts: Sequence[str], kinds: Sequence[str]) -> int:
        """How many texts, with their prompts, are longer than the model reads."""
        most, tokenizer = self.model.max_seq_length, self.model.tokenizer
        if most is None or most == float("inf") or not callable(tokenizer):
            return 0
        cut = 0
        for start in range(0, len(texts), CHUNK):
            block = range(start, min(start + CHUNK, len(texts)))
            ids = tokenizer([self._put_before(kinds[n]) + texts[n] for n in block], verbose=False)["input_ids"]
            cut += sum(len(row) > most for row in ids)
        return cut


# --- vectors on disk --------------------------------------------------------------------------------------------


def teacher_vectors(
    base: str | os.PathLike[str] | Base,
    teacher: Teacher,
    texts: Sequence[str],
    kinds: Sequence[str] | None = None,
    *,
    shard: tuple[int, int] = (0, 1),
    compute: bool = True,
    device: str = "cpu",
    key: str = "teacher",
) -> np.ndarray:
    """Teacher vectors of the texts, from disk where they are there already.

    `folder` gets `teacher.json` (what they are of), `vectors.f16` and `done.u8`, a byte for each chunk of 1,024 texts
    that is complete.

    Args:
        base: The base model, which a prompted teacher asks.
        teacher: Who answers, and how.
        texts: N texts.
        kinds: Of each of them. None: all are sentences.
        shard: (k, n): compute chunks k, k + n, ... only.
        compute: False: raise if something is missing.
        device: To compute on.
        key: Of the teacher in its recipe, for messages: `teacher`, or `teacher.0` of several.

    Returns:
        A memory map whose changes stay in memory, fp16; (N, layers, D) of a prompted base, (N, D) of an embedder.

    Raises:
        ValueError: If the folder holds vectors of something else, some are missing and `compute` is False, the
            teacher cannot be used, its limit is shorter than the texts, or it gives what fp16 cannot hold.
    """
    folder = Path(teacher.folder)
    chunks = -(-len(texts) // CHUNK)
    kinds = kinds if kinds is not None else ["sentences"] * len(texts)
    known = asked_about(teacher, kinds)
    asked = _asked(base, teacher, texts, kinds)
    stored = _stored(folder, asked, key)
    done: Any = _open(folder / DONE, np.uint8, (chunks,)) if stored else np.zeros(chunks, np.uint8)
    if stored and done.any() and not _holds(folder / VECTORS, stored):
        logger.warning("%s is not whole: all teacher vectors are computed anew", folder / VECTORS)
        done = np.zeros(chunks, np.uint8)
        if compute:
            (folder / DONE).unlink()
    missing = [chunk for chunk in range(chunks) if not done[chunk] and chunk % shard[1] == shard[0]]
    if missing and not compute:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {chunks} chunks of teacher vectors; run `python -m training.teacher` "
            "on this recipe first"
        )
    shape = stored
    vectors: Any = None
    model: Any = None
    if missing:
        model = _load(base, teacher, [texts[row] for row in known], [kinds[row] for row in known], device)
    for chunk in missing:
        rows = slice(chunk * CHUNK, min((chunk + 1) * CHUNK, len(texts)))
        own = known[(known >= rows.start) & (known < rows.stop)]
        start = time.perf_counter()
        given = model.vectors([texts[row] for row in own], [kinds[row] for row in own])
        found = np.zeros((rows.stop - rows.start, *given.shape[1:]), np.float16)
        if len(own):
            found[own - rows.start] = to_half(given, [texts[row] for row in own], teacher, key)
        if vectors is None:  # nothing is written before the teacher has given something that can be
            shape = (len(texts), *found.shape[1:])
            _write_manifest(folder, {**asked, "shape": list(shape)})
            vectors, done = _open(folder / VECTORS, np.float16, shape), _open(folder / DONE, np.uint8, (chunks,))
        vectors[rows] = found
        vectors.flush()
        done[chunk] = 1
        done.flush()
        rate = len(own) / (time.perf_counter() - start)
        logger.info("teacher vectors: chunk %d of %d, %.1f texts/s", chunk + 1, chunks, rate)
    if shape is None:  # fewer chunks than shards
        return np.zeros((len(texts), 0), np.float16)
    return np.memmap(folder / VECTORS, np.float16, "c", shape=shape)


def asked_about(teacher: Teacher, kinds: Sequence[str]) -> np.ndarray:
    """Rows of the texts that the teacher has a weight for, (n,); the vectors of the others are zeros.

    Args:
        teacher: With its weights.
        kinds: Of the texts.
    """
    left_out = teacher.left_out
    return np.array([row for row, kind in enumerate(kinds) if kind not in left_out], np.int64)


def to_half(vectors: np.ndarray, texts: Sequence[str], teacher: Teacher, key: str = "teacher") -> np.ndarray:
    """The vectors in fp16.

    Args:
        vectors: (n, ...), fp32.
        texts: Of the rows, for the message.
        teacher: Who gave them.
        key: As for `teacher_vectors`.

    Raises:
        ValueError: If one is NaN or infinite, or out of the range of fp16.
    """
    largest = np.abs(vectors).reshape(len(vectors), -1).max(1)  # NaN stays NaN
    for row in np.flatnonzero(~np.isfinite(largest)).tolist():
        raise ValueError(f"the teacher of {teacher.folder} gives NaN or infinite values for {texts[row][:60]!r}")
    for row in np.flatnonzero(largest > _LARGEST).tolist():
        hint = ""
        if isinstance(teacher, PromptedTeacher):
            fitting = 2.0 ** np.floor(np.log2(teacher.scale * _LARGEST / 4 / largest.max()))
            hint = f"; set {key}.scale={fitting:g}, or choose other layers"
        raise ValueError(
            f"the teacher of {teacher.folder} gives {largest[row]:.3g} for {texts[row][:60]!r}, beyond the "
            f"{_LARGEST:.0f} of fp16{hint}"
        )
    return vectors.astype(np.float16)


def _load(
    base: str | os.PathLike[str] | Base, teacher: Teacher, texts: Sequence[str], kinds: Sequence[str], device: str
) -> PromptedBase | Embedder | LexicalOverlap:
    if isinstance(teacher, LexicalTeacher):
        return LexicalOverlap(teacher, texts)
    if isinstance(teacher, PromptedTeacher):
        return PromptedBase.load(base if isinstance(base, Base) else resolve_base(base), teacher, device)
    model = Embedder.load(teacher, device)
    cut = model.count_cut(texts, kinds)
    if cut:
        said = f"{cut} of {len(texts)} texts are longer than the {model.model.max_seq_length} tokens of {teacher.label}"
        if not teacher.cut:
            raise ValueError(f"{said}; lower the most `words` or `lengths` of the texts, or set `cut: true` of it")
        logger.warning("%s: it sees their beginnings", said)
    return model


def _asked(
    base: str | os.PathLike[str] | Base, teacher: Teacher, texts: Sequence[str], kinds: Sequence[str]
) -> dict[str, Any]:
    """What vectors are of: whoever asks the same of the same texts gets the same."""
    asked: dict[str, Any] = {"sentences_sha256": texts_sha256(texts)}
    if teacher.left_out:
        asked["left_out"] = sorted(teacher.left_out)
    if teacher.left_out or (isinstance(teacher, EmbedderTeacher) and set(teacher.prompts) - {"default"}):
        asked["kinds_sha256"] = texts_sha256(kinds)
    if isinstance(teacher, LexicalTeacher):
        return asked | {"ngrams": list(teacher.ngrams), "least": teacher.least, "dimension": teacher.dimension}
    if isinstance(teacher, EmbedderTeacher):
        asked |= {"model": teacher.model, "prompts": teacher.prompts}
        path = Path(embedder_path(teacher.model))
        weights = [Base(path, teacher.model, "folder", (file,)) for file in sorted(path.rglob("*.safetensors"))]
        # None of a Hub id: its name stands for it.
        asked["model_sha256"] = [digest for weight in weights for digest in weight.sha256.values()]
        settings = hashlib.sha256()
        for file in sorted(file for file in path.rglob("*") if file.suffix in _READ_BESIDE):
            settings.update(f"{file.relative_to(path)} {sha256_of(file)}\n".encode())
        asked["settings_sha256"] = settings.hexdigest()
        return asked
    from transformers import AutoTokenizer

    found = base if isinstance(base, Base) else resolve_base(base)
    asked |= {"prefix": teacher.prefix, "suffix": teacher.suffix, "layers": teacher.layers}
    asked["base_sha256"] = found.sha256
    # Only where they are something, so that folders from before these keys stay good.
    extra = {"scale": teacher.scale, "special_start": special_start(AutoTokenizer.from_pretrained(found.path))}
    return asked | {key: value for key, value in extra.items() if value not in (1.0, [])}


def _stored(folder: Path, asked: dict[str, Any], key: str) -> tuple[int, ...] | None:
    """Shape of the vectors in a folder. None: there are none.

    Raises:
        ValueError: If there are vectors of something else.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    old = json.loads(file.read_text(encoding="utf-8"))
    shape = tuple(old.pop("shape"))
    if "settings_sha256" not in old:  # of a folder from before this key
        asked = {name: value for name, value in asked.items() if name != "settings_sha256"}
    # Numbers as JSON writes them: layer 1 is not 1.0, the last one.
    layers = [json.dumps(one.get("layers")) for one in (old, asked)]
    other = "layers" if layers[0] != layers[1] else None
    other = next((name for name in (*asked, *old) if old.get(name) != asked.get(name)), other)
    if other is not None:
        raise ValueError(
            f"{folder} holds teacher vectors of another {other}; choose another folder "
            f"(--set {key}.folder=...), or delete it"
        )
    return shape


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    file = folder / MANIFEST
    if file.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, manifest, unique=True)  # shards may write the same


def _holds(file: Path, shape: tuple[int, ...]) -> bool:
    """Whether a file of vectors has its size, which it gets before its first chunk counts as done."""
    return file.is_file() and file.stat().st_size >= int(np.prod(shape)) * np.dtype(np.float16).itemsize


def _open(file: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not file.exists():
        # Appending nothing leaves a file alone that another shard has just made.
        file.open("ab").close()
    if file.stat().st_size < size:
        os.truncate(file, size)
    return np.memmap(file, dtype, "r+", shape=shape)


def other_models(recipe: ContrastiveRecipe, base: Base) -> list[EmbedderTeacher]:
    """The embedders among the teachers that know more than the base itself.

    A checkpoint that the same base alone has taught is none: what it teaches is self-distilled as well.

    Args:
        recipe: Names the teachers.
        base: Its base model.
    """
    found = []
    for teacher in recipe.teachers:
        if not isinstance(teacher, EmbedderTeacher):
            continue
        path = embedder_path(teacher.model)
        config = read_config(path) if is_checkpoint(path) else None
        if config is None or config.training != SELF_DISTILLED or not base.has_weights(config.base_sha256):
            found.append(teacher)
    return found


def teacher_keys(recipe: ContrastiveRecipe) -> list[str]:
    """What `--set` calls each of the recipe's teachers."""
    if isinstance(recipe.teacher, list):
        return [f"teacher.{number}" for number in range(len(recipe.teachers))]
    return ["teacher"] * len(recipe.teachers)


def _choose(recipe: ContrastiveRecipe, file: Path, pairs: int, device: str, *, write: bool) -> None:
    from training import choosing

    found = choosing.choose(recipe, resolve_base(recipe.base), pairs=pairs, device=device, say=logger.info)
    logger.info("\n%s\n\n%s", choosing.table(found), "\n".join(choosing.keys(found[0]).values()))
    if write:
        choosing.write(found[0], file)
        logger.info("\nwritten to %s", file)


def read_shard(text: str) -> tuple[int, int]:
    """Number of a shard and how many there are, of `k/n`.

    Raises:
        ValueError: If it is not of that form with 0 <= k < n.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise ValueError(f"--shard: expected k/n with k from 0 to n - 1, e.g. 0/2 and 1/2, got {text!r}")
    return int(found[1]), int(found[2])


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Compute the teacher vectors of a recipe."""
    parser = recipe_parser("python -m training.teacher", main.__doc__)
    own = f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"
    parser.add_argument("--shard", default=own, help="k/n: every n-th chunk, from chunk k; torchrun sets it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--choose", action="store_true", help="find the best prompt and layers on the development sets")
    parser.add_argument("--pairs", type=int, default=300, help="with --choose: pairs of each development set")
    parser.add_argument("--write", action="store_true", help="with --choose: put them into the recipe's file")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    shard = read_shard(options.shard)
    recipe = read_recipe(ContrastiveRecipe, options.recipe, options.set)
    if options.choose:
        _choose(recipe, Path(options.recipe), options.pairs, options.device, write=options.write)
        return
    if options.write:
        parser.error("--write goes with --choose")
    corpus = read_corpus(recipe)
    if not recipe.teachers or corpus is None:
        parser.error(f"{options.recipe} has no `teacher` with a loss that uses it")
    for key, teacher in zip(teacher_keys(recipe), recipe.teachers, strict=True):
        teacher_vectors(recipe.base, teacher, corpus.texts, corpus.kinds, shard=shard, device=options.device, key=key)


if __name__ == "__main__":
    main()
