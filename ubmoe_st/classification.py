"""Vectors for classifiers: beside the text's own, what the last token of an inner layer holds of its kind."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from ubmoe_st import shards

logger = logging.getLogger(__name__)

TASK = "classification"
"""Value of `task` that asks `encode` for these vectors."""
OUTPUT = "classification_embedding"
"""Where the features of a batch carry the added part, (B, K)."""
_FORMAT = "ubmoe-classification"

_heard = threading.local()


@dataclass(frozen=True)
class _Keeper:
    """Forward hook of a layer: quiet but in the thread, and while states of this very layer are asked for."""

    layer: int

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        asked = getattr(_heard, "asked", None)
        if asked is not None and asked[0] == self.layer:
            asked[1].append(output[0] if isinstance(output, tuple) else output)


class ClassificationHead(nn.Module):
    """A linear layer on the last token's state behind an inner layer of the encoder.

    A mean over tokens is mostly about topics. With full attention, the last token of a middle layer has gathered what
    kind of text it stands at the end of, a question for a place or a bad review, and later layers use it up.

    Args:
        layer: How many layers are computed before; at least 1.
        share: Length of the added part, where the text's own vector has 1.
        linear: From the encoder's width D to K dimensions.
        length: Of the joined vectors. Classifiers penalise weights, and for unit vectors weights have to be large: with
            the default penalty of scikit-learn they learn too little from few examples.
        fitted_to: SHA-256 of the file of experts that it was fitted to. None: not known.

    Raises:
        ValueError: If the layer, the share or the length is out of range.
    """

    def __init__(
        self, layer: int, share: float, linear: nn.Linear, length: float = 1.0, fitted_to: str | None = None
    ) -> None:
        super().__init__()
        if layer < 1 or not (0 < share < float("inf") and 0 < length < float("inf")):
            raise ValueError(f"expected a layer from 1, share and length above 0, got {layer}, {share} and {length}")
        self.layer, self.share, self.length = layer, share, length
        self.linear, self.fitted_to = linear.requires_grad_(False), fitted_to

    def attach(self, encoder: Any) -> None:
        """Listen to the layer of an encoder, as often as it is called.

        Raises:
            ValueError: If there is no such layer, or it has another width.
        """
        check_fit(self, encoder.config.num_hidden_layers, encoder.config.hidden_size)
        layer = encoder.get_submodule(f"layers.{self.layer - 1}")
        if _Keeper(self.layer) not in layer._forward_hooks.values():
            layer.register_forward_hook(_Keeper(self.layer))

    def attached(self, encoder: Any) -> ClassificationHead:
        """A copy that listens to an encoder, where and in what numbers its weights are; see `attach`."""
        self.attach(encoder)
        return copy.deepcopy(self).to("cpu" if encoder.device.type == "meta" else encoder.device, encoder.dtype)

    @contextlib.contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """The states that the layer gives in this thread during the block, one (B, T, D) a pass."""
        before = getattr(_heard, "asked", None)
        states: list[Tensor] = []
        _heard.asked = (self.layer, states)
        try:
            yield states
        finally:
            _heard.asked = before

    def forward(self, states: Tensor, features: Mapping[str, Any]) -> Tensor:
        """The added part of the vectors of a batch, (B, K), of length `share`.

        Args:
            states: Behind the layer, (B, T, D), or (1, all tokens, D) where the batch is flat.
            features: `attention_mask`, (B, T); or `cu_seq_lens_q` of a flat batch.
        """
        found = self.linear(last_states(states, features).to(self.linear.weight.dtype))
        return self.share * F.normalize(found, dim=-1)

    def join(self, own: Tensor, added: Tensor) -> Tensor:
        """The vectors for classifiers, (B, D + K), of length `length`.

        Args:
            own: Vectors of the texts, (B, D), of any length.
            added: What `forward` gave, (B, K).
        """
        return self.length * F.normalize(torch.cat([F.normalize(own, dim=-1), added.to(own.dtype)], -1), dim=-1)

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return f"layer={self.layer}, share={self.share}, length={self.length}"


def last_states(states: Tensor, features: Mapping[str, Any]) -> Tensor:
    """The state of each text's last token, (B, D), whichever side the batch is padded on; see `ClassificationHead`."""
    if "cu_seq_lens_q" in features:
        return states[0, features["cu_seq_lens_q"][1:].long() - 1]
    mask = features["attention_mask"].bool()
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    return states[torch.arange(len(mask), device=mask.device), last]


def check_fit(head: ClassificationHead, layers: int, width: int) -> None:
    """Refuse a head that is not one of an encoder.

    Args:
        head: The head.
        layers: Of the encoder.
        width: Of its states.

    Raises:
        ValueError: Saying what fits.
    """
    shape = tuple(head.linear.weight.shape)
    if head.layer > layers or shape[1] != width:
        raise ValueError(
            f"the classification head reads layer {head.layer} with a weight of shape {shape}, and the encoder has "
            f"{layers} layers of width {width}: fit one for it by `python -m training.classification`"
        )


def take_away(views: Any, why: str) -> None:
    """Leave an encoder without its head, which was fitted to the states of before; says so where there was one.

    Args:
        views: The encoder, a `UBMoETransformer`.
        why: What changes its states.
    """
    if views.classification is not None:
        logger.warning(
            'the classification head was fitted to the encoder as it was before %s, and is taken away: task="%s" needs '
            "one fitted anew by `python -m training.classification`",
            why,
            TASK,
        )
        views.set_classification_head(None)


def is_training(views: Any) -> bool:
    """Whether a pass of a `UBMoETransformer` now is one of a training of its encoder."""
    trained = views.training and torch.is_grad_enabled()
    return bool(trained and any(p.requires_grad for p in views.model.parameters()))


def save_head(head: ClassificationHead, file: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write a head as one safetensors file.

    Args:
        head: The head.
        file: Path of the file.
        dtype: Of the stored numbers. None: as they are.

    Raises:
        ValueError: If a number is not finite, or out of the range of `dtype`.
    """
    tensors = {name: tensor.detach().cpu().to(dtype or tensor.dtype) for name, tensor in head.linear.named_parameters()}
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError(
            f"numbers of the classification head are not finite in {tensors['weight'].dtype}: fit it anew, or leave it "
            "out by `set_classification_head(None)`"
        )
    facts = {"format": _FORMAT, "layer": str(head.layer), "share": repr(head.share), "length": repr(head.length)}
    if head.fitted_to is not None:
        facts["experts_sha256"] = head.fitted_to
    shards.write_with_metadata(Path(file), tensors, facts)


def read_head(file: str | os.PathLike[str]) -> ClassificationHead:
    """Read what `save_head` wrote; the numbers as they are stored.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or holds anything else.
    """
    shards.read_header(Path(file))
    with safe_open(file, framework="pt") as stored:
        header = stored.metadata() or {}
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}
    weight, bias = tensors.get("weight"), tensors.get("bias")
    try:
        layer, share, length = int(header.get("layer", "")), *(float(header.get(k, "")) for k in ("share", "length"))
        if header.get("format") != _FORMAT or set(tensors) != {"weight", "bias"} or weight is None or bias is None:
            raise ValueError("other tensors")
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or weight.dtype != bias.dtype:
            raise ValueError("shapes that do not go together")
        if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
            raise ValueError("numbers that are not finite")
        linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
        return ClassificationHead(layer, share, linear, length, header.get("experts_sha256"))
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{Path(file).name} holds no classification head ({error}): expected `weight` (K, D) and `bias` (K,), and "
            "layer, share and length in its header"
        ) from error
