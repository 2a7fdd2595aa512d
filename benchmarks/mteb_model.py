"""The released model for mteb: `ModelMeta` with a loader, so that `mteb.evaluate(model_meta(), tasks)` works.

Prompts are those of the checkpoint: mteb takes them from `SentenceTransformer.prompts`, and nothing is set here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.embedders import NAMED
from ubmoe_st import checkpoint

if TYPE_CHECKING:
    from mteb.models import ModelMeta

    from benchmarks.peers import Encoder

NAME = "ubmoe-st/ubmoe-135m"


def _load(model_name: str, revision: str | None = None, device: str | None = None, **kwargs: Any) -> Any:
    from mteb.models import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    path = kwargs.pop("path", None) or model_name
    return SentenceTransformerEncoderWrapper(SentenceTransformer(str(path), device=device, **kwargs))


def model_meta(
    path: str | Path | None = None,
    *,
    revision: str = "local",
    name: str | None = None,
    release_date: str | None = None,
    training_datasets: frozenset[str] = frozenset({"Tatoeba"}),  # its English sentences, without their translations
    code: str | None = None,
    data: str | None = None,
) -> ModelMeta:
    """Metadata and loader of a UBMoE checkpoint for mteb.

    Sizes, base and licence are read from the checkpoint, and the data that its teachers were trained on from mteb's own
    list; without a folder they stay empty, which mteb's list of models does not take.

    Args:
        path: Checkpoint folder; None: the Hub id in `name`.
        revision: Of the weights; results of mteb are stored under it.
        name: `organization/model`. None: the folder's name, where it is a checkpoint, else the released one.
        release_date: Of the revision, like 2026-11-25.
        training_datasets: Names that mteb gives the data of training, without that of the teachers.
        code: Address of the training code.
        data: Address of the training data.

    Returns:
        What `mteb.evaluate` takes as its model; `.load_model()` opens it.
    """
    from mteb.models import ModelMeta
    from mteb.models.model_meta import ScoringFunction

    own, taught = _read(Path(path)) if path and checkpoint.is_checkpoint(path) else ({}, set())
    named = {"name": name} if name else {}
    return ModelMeta.create_empty(
        overwrites={
            "loader": _load,
            "loader_kwargs": {"path": str(path)} if path else {},
            "name": NAME,
            "revision": revision,
            "languages": ["eng-Latn"],
            "license": "apache-2.0",
            "open_weights": True,
            "framework": ["Sentence Transformers", "PyTorch", "Transformers", "safetensors"],
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": False,
            "training_datasets": training_datasets | taught,
            "adapted_from": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "modalities": ["text"],
            "model_type": ["dense"],
            "release_date": release_date,
            "public_training_code": code,
            "public_training_data": data,
            **own,
            **named,
        }
    )


def _read(path: Path) -> tuple[dict[str, Any], set[str]]:
    """What mteb lists of a checkpoint's encoder, from its files, and the data that its teachers were trained on."""
    import mteb
    from huggingface_hub import ModelCard

    card = ModelCard.load(path / "README.md").data
    training = checkpoint.read_config(path).training or ""
    teachers = [mteb.get_model_meta(f"sentence-transformers/{teacher}") for teacher in NAMED if teacher in training]
    facts = checkpoint.facts(path)
    stock = json.loads((path / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {
        "name": f"ubmoe-st/{path.resolve().name}",
        "license": card.license,
        "n_parameters": facts["parameters"]["active_encoding"],
        "n_embedding_parameters": stock["vocab_size"] * stock["hidden_size"],
        "memory_usage_mb": round((facts["bytes"]["shared"] + facts["bytes"]["bi"]) / 2**20),
        "embed_dim": facts["dimension"],
        "max_tokens": min(tokenizer.get("model_max_length") or 10**30, stock["max_position_embeddings"]),
    }
    base = facts["base"]["name"]
    if "/" in base:
        found["adapted_from"] = base
    return found, {dataset for teacher in teachers for dataset in teacher.training_datasets or ()}


def wrap(encoder: Encoder) -> Any:
    """An opened encoder for mteb, which encodes each different text once per prompt."""
    from mteb.models import SentenceTransformerEncoderWrapper

    wrapper = SentenceTransformerEncoderWrapper(encoder.model)
    organization = "peer" if encoder.supervision in ("1B pairs", "none") else "ubmoe-st"
    wrapper.mteb_model_meta = wrapper.mteb_model_meta.model_copy(
        update={"name": f"{organization}/{encoder.row}", "revision": encoder.fingerprint.replace("/", "-")}
    )
    wrapper.model = Remembering(encoder.model, encoder.task)
    return wrapper


class Remembering:
    """A `SentenceTransformer` that keeps its vectors by text and prompt: STS sets share many sentences.

    Args:
        model: The model; everything but the three encode methods is passed through to it.
        task: Given to its `encode`.
    """

    def __init__(self, model: Any, task: str | None = None) -> None:
        self._model, self._task = model, {"task": task} if task else {}
        self._vectors: dict[tuple[str, str | None, str], Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _encode(self, method: str, inputs: Any, prompt: str | None, options: dict[str, Any]) -> Any:
        import numpy as np

        wanted = [(method, prompt, text) for text in inputs]
        missing = list(dict.fromkeys(key for key in wanted if key not in self._vectors))
        if missing:
            vectors = getattr(self._model, method)([key[2] for key in missing], prompt=prompt, **options)
            self._vectors.update(zip(missing, np.asarray(vectors)))
        return np.stack([self._vectors[key] for key in wanted])

    def encode(self, inputs: Any, prompt: str | None = None, **options: Any) -> Any:
        """As the model's `encode`, for a list of texts; numpy, (N, D)."""
        return self._encode("encode", inputs, prompt, {**options, **self._task})

    def encode_query(self, inputs: Any, prompt: str | None = None, **options: Any) -> Any:
        """As the model's `encode_query`, for a list of texts; numpy, (N, D)."""
        return self._encode("encode_query", inputs, prompt, options)

    def encode_document(self, inputs: Any, prompt: str | None = None, **options: Any) -> Any:
        """As the model's `encode_document`, for a list of texts; numpy, (N, D)."""
        return self._encode("encode_document", inputs, prompt, options)
