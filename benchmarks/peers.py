"""Encoders and generators the benchmarks compare: a checkpoint, the untouched base, open embedders.

Every encoder is a `SentenceTransformer`, so mteb, `EmbeddingIndex` and the speed test treat all of them alike:

| name | what |
|---|---|
| a folder or Hub id | that model through stock sentence-transformers |
| `all-MiniLM-L6-v2`, `all-mpnet-base-v2` | open embedders, see `training.embedders` |
| `base-causal` | base model as it is, mean pooling, no prompt |
| `base-bidirectional` | the same with full attention, untrained |
| `base-prompted` | base model as it is, one-word prompt with a worked example, last token, no training |
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.results import fingerprint, relative
from training.embedders import NAMED, embedder_path
from training.prompted import PromptedReader
from ubmoe_st.bases import SHORT_NAMES, resolve_base
from ubmoe_st.checkpoint import is_checkpoint, read_config
from ubmoe_st.compute import Compute
from ubmoe_st.lossless import recorded_base

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PEERS = (*NAMED, "base-causal", "base-bidirectional", "base-prompted")
MAX_TOKENS = 512
"""Longest input of the base peers, tokens. all-MiniLM and all-mpnet keep those of their own configuration."""

PROMPT_PREFIX = 'This sentence : "A man is playing a guitar." means in one word:"music". This sentence : "'
PROMPT_SUFFIX = '" means in one word:"'


class OneWordPrompt(InputModule):
    """Causal sentence vector from a one-word prompt, see `PromptedReader`: its last token's hidden state, no training.

    Args:
        model: Decoder without its head, left causal.
        tokenizer: Its tokenizer.
        prefix: Text before the input.
        suffix: Text after the input.
        max_seq_length: Longest input with suffix, tokens; longer inputs lose their end, never the suffix.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prefix: str = PROMPT_PREFIX,
        suffix: str = PROMPT_SUFFIX,
        max_seq_length: int = MAX_TOKENS,
    ) -> None:
        super().__init__()
        self.auto_model = model
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        self._reader = PromptedReader(model, tokenizer, prefix, suffix, max_seq_length)

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Token ids of text and suffix, right-padded, (B, T), and the mask that says where each ends.

        Raises:
            TypeError: If an input is not a string.
        """
        for position, text in enumerate(inputs):
            if not isinstance(text, str):
                raise TypeError(f"Expected strings, got {type(text).__name__} at position {position}. Pass plain text.")
        rows = [torch.tensor(row) for row in self._reader.tokens([f"{prompt or ''}{text}" for text in inputs])]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return {"input_ids": pad_sequence(rows, batch_first=True), "attention_mask": mask}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add `sentence_embedding`, (B, D)."""
        lengths = features["attention_mask"].sum(dim=1).tolist()
        rows = [row[:length] for row, length in zip(features["input_ids"].tolist(), lengths)]
        features["sentence_embedding"] = self._reader.states(rows)[:, 0]
        return features

    def get_embedding_dimension(self) -> int:
        """Width of the vectors."""
        return int(self.auto_model.config.hidden_size)

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Not possible: this peer is built from the base model each time.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("Expected no save of the prompted peer; it is the base model itself. Save that one.")


@dataclass
class Encoder:
    """An opened encoder with what the result file says about it."""

    row: str
    label: str
    supervision: str
    model: SentenceTransformer
    fingerprint: str
    prompt: str
    pooling: str
    task: str | None = None
    """Given to `encode`, where a checkpoint has vectors for a task."""

    @property
    def dtype(self) -> str:
        """Type of the weights, such as `float32`, and that of the matrix products where it is another."""
        stored = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        used = getattr(getattr(self.model, "compute", None), "used", "stored")
        return stored if used == "stored" else f"{stored}, products in {used}"


def base_folder(given: str | None = None, model: str | Path | None = None) -> str:
    """The base model: the one given, else `$UBMOE_BASE`, else that of the checkpoint `model`, else SmolLM2-135M.

    Returns:
        A folder for a GGUF, a short name or the base of a checkpoint, else the name as it is.

    Raises:
        ValueError: If the checkpoint names no base, or that is not found here.
    """
    name = given or os.environ.get("UBMOE_BASE")
    if not name and model is not None and is_checkpoint(model):
        return str(recorded_base(read_config(model)).path)
    name = name or "smollm2-135m"
    return str(resolve_base(name).path) if name in SHORT_NAMES or name.endswith(".gguf") else name


def _training(name: str) -> str:
    """How a checkpoint says it was trained; other models say nothing."""
    return (read_config(name).training if is_checkpoint(name) else None) or "unknown"


def _fingerprint(name: str) -> str:
    """Of what an encoder reads: the generator view of a checkpoint does not count."""
    return fingerprint(name, without="generator") if Path(name).is_dir() else name


def _describe_prompts(model: SentenceTransformer) -> str:
    used = {name: text for name, text in (model.prompts or {}).items() if text}
    if not used:
        return "none"
    default = f"; default: {model.default_prompt_name}" if model.default_prompt_name else ""
    return "; ".join(f"{name}: {text!r}" for name, text in sorted(used.items())) + default


def _describe_pooling(model: SentenceTransformer) -> str:
    parts = [type(module).__name__ for module in list(model)[1:] if type(module).__name__ != "Pooling"]
    pooling: Any = next((module for module in model if type(module).__name__ == "Pooling"), None)
    mode = str(pooling.get_config_dict().get("pooling_mode")) if pooling is not None else "in the model"
    return ", ".join([mode, *parts])


def open_encoder(
    name: str,
    *,
    base: str | None = None,
    row: str | None = None,
    device: str = "cpu",
    compute: Compute = "stored",
    task: str | None = None,
) -> Encoder:
    """Open one of `PEERS` or a model folder.

    Args:
        name: Name of a peer, a folder, or a Hub id.
        base: Base model of the `base-*` peers, see `base_folder`.
        row: Name of the row in the tables; None: the name, or the last part of the path.
        device: Where to run.
        compute: Of a checkpoint, see `UBMoE`; peers compute as they are.
        task: For which a checkpoint has vectors of their own; a row of its own.

    Raises:
        FileNotFoundError: If `name` looks like a folder and is not there.
        ValueError: If `name` is no peer and no model, has no vectors for the task, or this machine cannot compute so.
    """
    if task is not None and not is_checkpoint(name):
        raise ValueError(f"Expected a checkpoint for vectors of a task, got {name}; leave the task out for others.")
    from sentence_transformers import SentenceTransformer

    if name in NAMED:
        folder = embedder_path(name)
        model = SentenceTransformer(folder, device=device)
        return Encoder(row or name, name, "1B pairs", model, _fingerprint(folder), "none", _describe_pooling(model))
    if name.startswith("base-"):
        return _base_encoder(name, base_folder(base), row or name, device)
    if not Path(name).is_dir() and (name.startswith((".", "/")) or name.count("/") != 1 or "models/" in name):
        from benchmarks.results import nearest

        raise FileNotFoundError(
            f"Expected a peer or a model folder, got {relative(name)!r} ({nearest(name, PEERS)}). "
            "`make model` builds models/ubmoe-135m."
        )
    if compute == "stored" and task is None:
        model = SentenceTransformer(name, device=device)
    else:
        from ubmoe_st import UBMoE

        model = UBMoE(name, device=device, compute=compute)
    row = row or Path(name).name
    found = Encoder(
        row, row, _training(name), model, _fingerprint(name), _describe_prompts(model), _describe_pooling(model)
    )
    return found if task is None else _for_task(found, name, task)


def _for_task(encoder: Encoder, name: str, task: str) -> Encoder:
    encoder.model.encode(["a text"], task=task)  # raises where it has none
    return replace(
        encoder,
        row=f"{encoder.row}-{task}",
        label=f'{encoder.label}, task="{task}"',
        fingerprint=fingerprint(name),
        task=task,
    )


def _base_encoder(name: str, base: str, row: str, device: str) -> Encoder:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoModel, AutoTokenizer

    if name == "base-prompted":
        decoder = AutoModel.from_pretrained(base, dtype=torch.float32).eval()
        module = OneWordPrompt(decoder, AutoTokenizer.from_pretrained(base))
        model = SentenceTransformer(modules=[module], device=device)
        label, prompt, pooling = "base, causal, prompted", PROMPT_PREFIX + "{text}" + PROMPT_SUFFIX, "last token"
    elif name in ("base-causal", "base-bidirectional"):
        causal = name == "base-causal"
        transformer = Transformer(
            base,
            max_seq_length=MAX_TOKENS,
            model_kwargs={"dtype": torch.float32},
        )
        backbone: Any = transformer.model
        if not causal:
            backbone.config.is_causal = False  # as a config_kwarg it would be dropped without a word
        if transformer.tokenizer.pad_token is None:
            transformer.tokenizer.pad_token = transformer.tokenizer.eos_token
        model = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), "mean")])
        model.to(device)
        label, prompt, pooling = f"base, {'causal' if causal else 'bidirectional'}", "none", "mean"
    else:
        raise ValueError(f"Expected one of {', '.join(PEERS)}, got {name!r}. Check the name of the peer.")
    return Encoder(row, label, "none", model.eval(), f"{_fingerprint(base)}/{name}", prompt, pooling)


def open_generator(name: str, *, routing: str = "uni") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Causal language model and tokenizer of a checkpoint's generator view, or of a plain decoder folder.

    Args:
        name: Folder or Hub id.
        routing: `uni`, `router`, or `base` for a plain decoder through `AutoModelForCausalLM`.

    Raises:
        ValueError: If the model has no generator, or no trained routers for `router`.
    """
    if routing == "base":
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(name)
    if Path(name).is_dir() and not (Path(name) / "generator").is_dir():
        raise ValueError(
            f"Expected a checkpoint with a generator, got {relative(name)!r} without a `generator` folder. "
            "Build one with `ubmoe build`, or give a plain decoder with --base."
        )
    from ubmoe_st import UBMoE

    checkpoint: Any = UBMoE(name)
    if routing == "uni":
        return checkpoint.generator, checkpoint.tokenizer
    build = getattr(checkpoint, "generator_for", None)
    if build is None:
        raise ValueError(
            f"Expected a UBMoE with `generator_for(routing)`, got none; cannot measure routing {routing!r}."
        )
    return build(routing), checkpoint.tokenizer
