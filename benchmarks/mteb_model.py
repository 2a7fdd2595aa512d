"""The released model for mteb: `ModelMeta` with a loader, so that `mteb.evaluate(model_meta(), tasks)` works.

Prompts are those of the checkpoint: mteb takes them from `SentenceTransformer.prompts`, and nothing is set here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mteb.models import ModelMeta

    from benchmarks.peers import Encoder

NAME = "ubmoe-st/ubmoe-135m"


def _load(model_name: str, revision: str | None = None, device: str | None = None, **kwargs: Any) -> Any:
    from mteb.models import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    path = kwargs.pop("path", None) or model_name
    return SentenceTransformerEncoderWrapper(SentenceTransformer(str(path), device=device, **kwargs))


def model_meta(path: str | Path | None = None, *, revision: str = "local", name: str = NAME) -> ModelMeta:
    """Metadata and loader of a UBMoE checkpoint for mteb.

    Args:
        path: Checkpoint folder; None: the Hub id in `name`.
        revision: Of the weights; results of mteb are stored under it.
        name: `organization/model`.

    Returns:
        What `mteb.evaluate` takes as its model; `.load_model()` opens it.
    """
    from mteb.models import ModelMeta
    from mteb.models.model_meta import ScoringFunction

    return ModelMeta.create_empty(
        overwrites={
            "loader": _load,
            "loader_kwargs": {"path": str(path)} if path else {},
            "name": name,
            "revision": revision,
            "languages": ["eng-Latn"],
            "license": "apache-2.0",
            "open_weights": True,
            "framework": ["Sentence Transformers", "PyTorch"],
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": False,
            "training_datasets": {"Tatoeba"},  # its English sentences, without their translations
            "adapted_from": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "modalities": ["text"],
        }
    )


def wrap(encoder: Encoder) -> Any:
    """An opened encoder for mteb, which encodes each different text once per prompt."""
    from mteb.models import SentenceTransformerEncoderWrapper

    wrapper = SentenceTransformerEncoderWrapper(encoder.model)
    organization = "peer" if encoder.supervision in ("1B pairs", "none") else "ubmoe-st"
    wrapper.mteb_model_meta = wrapper.mteb_model_meta.model_copy(
        update={"name": f"{organization}/{encoder.row}", "revision": encoder.fingerprint.replace("/", "-")}
    )
    wrapper.model = Remembering(encoder.model)
    return wrapper


class Remembering:
    """A `SentenceTransformer` that keeps its vectors by text and prompt: STS sets share many sentences.

    Args:
        model: The model; everything but the three encode methods is passed through to it.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
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
        return self._encode("encode", inputs, prompt, options)

    def encode_query(self, inputs: Any, prompt: str | None = None, **options: Any) -> Any:
        """As the model's `encode_query`, for a list of texts; numpy, (N, D)."""
        return self._encode("encode_query", inputs, prompt, options)

    def encode_document(self, inputs: Any, prompt: str | None = None, **options: Any) -> Any:
        """As the model's `encode_document`, for a list of texts; numpy, (N, D)."""
        return self._encode("encode_document", inputs, prompt, options)
