"""How much each token would attend to itself, to earlier and to later tokens: the dependence of the UBMoE paper.

The forward pass stays causal. In every layer the same attention scores go through a second softmax *without* the
mask; averaged over heads and layers it is a matrix A (T, T) whose rows add to 1. In percent of T:

    main = sum of the diagonal,  before = sum below it,  after = sum above it;   main + before + after = 100.

The scores come from the stock attention classes: a function registered with transformers' `AttentionInterface` gets
each layer's queries and keys after the rotary embedding. It is set in the config of a copy that shares the
parameters, so the model itself is not touched and other threads may use it meanwhile.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import eager_mask

from ubmoe_st.configuration import Routing
from ubmoe_st.experts import share_copy
from ubmoe_st.model import UBMoE

BUCKETS: tuple[tuple[int, int], ...] = ((0, 256), (256, 512), (512, 1024), (1024, 2048))
"""Document lengths in tokens: more than the first number, at most the second."""

ATTENTION = "ubmoe_dependence"
_QUERY_BLOCK = 256
_MIN_TOKENS = 2

Parts = tuple[float, float, float]
"""main, before, after; they add to 100."""


@dataclass(frozen=True)
class BucketDependence:
    """The mean over the documents of one length bucket.

    Attributes:
        documents: How many they are.
        main: Percent on the token itself.
        before: Percent on earlier tokens.
        after: Percent on later tokens.
        layers: The three parts of each layer.
    """

    documents: int
    main: float
    before: float
    after: float
    layers: list[Parts]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


def dependence(
    model: UBMoE | PreTrainedModel,
    documents: Iterable[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    routing: Routing = "bi",
    buckets: Sequence[tuple[int, int]] = BUCKETS,
    per_bucket: int | None = None,
) -> dict[str, BucketDependence]:
    """Dependence of a causal model by document length.

    Memory grows with `heads * 256 * T`, not with T squared: the scores are taken in blocks of queries.

    Args:
        model: A UBMoE, or any causal language model of transformers.
        documents: Texts. One longer than the last bucket is cut to it.
        tokenizer: Of a plain causal language model; a UBMoE has its own.
        routing: Which experts of a UBMoE run, causally: `uni` is the base model.
        buckets: Lengths in tokens, see `BUCKETS`.
        per_bucket: Stop when every bucket has so many documents. None: read all.

    Returns:
        By bucket (`0-256`), those without a document left out.

    Raises:
        ValueError: If a tokenizer is missing, the buckets are not in order, or the architecture does not run its
            attention through `AttentionInterface`.
        TypeError: If a document is not a text.
    """
    if isinstance(documents, str):
        raise TypeError("documents must be a list of texts, got one text")
    ids_of: Callable[[str], list[int]]
    if isinstance(model, UBMoE):
        lm, ids_of = model.generator_for(routing), model.token_ids
    elif tokenizer is None:
        raise ValueError("dependence of a plain causal language model needs tokenizer=...")
    else:
        lm, ids_of = model, partial(_plain_ids, tokenizer)
    buckets = [(low, high) for low, high in buckets]
    flat = [end for bucket in buckets for end in bucket]
    if not flat or flat != sorted(flat) or any(low >= high for low, high in buckets):
        raise ValueError(f"buckets must be (more than, at most) in ascending order, got {list(buckets)}")
    measured = _measuring_copy(lm)
    sums: dict[tuple[int, int], Tensor] = {}
    counts: dict[tuple[int, int], int] = dict.fromkeys(buckets, 0)
    for text in documents:
        if not isinstance(text, str):
            raise TypeError(f"documents must be texts, got {type(text).__name__}")
        ids = torch.tensor([ids_of(text)[: buckets[-1][1]]])  # (1, T)
        bucket = next((b for b in buckets if b[0] < ids.shape[1] <= b[1]), None)
        full = bucket is not None and per_bucket is not None and counts[bucket] >= per_bucket
        if bucket is None or full or ids.shape[1] < _MIN_TOKENS:
            continue
        parts = _document_parts(measured, ids.to(lm.device))  # (layers, 3)
        sums[bucket] = sums[bucket] + parts if bucket in sums else parts
        counts[bucket] += 1
        if per_bucket is not None and min(counts.values()) >= per_bucket:
            break
    return {f"{low}-{high}": _mean(sums[low, high], counts[low, high]) for low, high in buckets if (low, high) in sums}


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # Cut by the caller: `truncation=True` would stay in the tokenizer as state.
    return tokenizer(text, truncation=False, verbose=False)["input_ids"]


def _mean(total: Tensor, count: int) -> BucketDependence:
    layers = total / count
    main, before, after = layers.mean(0).tolist()
    return BucketDependence(count, main, before, after, [(m, b, a) for m, b, a in layers.tolist()])


def _measuring_copy(lm: PreTrainedModel) -> PreTrainedModel:
    AttentionInterface.register(ATTENTION, _attend_and_measure)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    copied = share_copy(lm)
    if not isinstance(copied, PreTrainedModel):
        raise TypeError(f"expected a transformers model, got {type(lm).__name__}")
    # Not by the setter, which refuses some architectures' non-eager functions.
    copied.config._attn_implementation_internal = ATTENTION
    return copied.eval()


@torch.inference_mode()
def _document_parts(lm: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Parts of one document, input_ids (1, T), in percent: (layers, 3)."""
    found: dict[int, Tensor] = {}
    for module in lm.modules():
        if hasattr(module, "layer_idx"):
            holder: Any = module
            holder.dependence_parts = found
    backbone = getattr(lm, lm.base_model_prefix)
    backbone(input_ids=input_ids, use_cache=False)
    if not found:
        raise ValueError(
            f"{type(lm).__name__} does not run its attention through transformers' AttentionInterface, "
            "so its attention scores cannot be read"
        )
    return torch.stack([found[index] for index in sorted(found)])


def _attend_and_measure(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Eager causal attention, and the parts of its scores without the mask.

    Args:
        module: The attention layer.
        query: (1, heads, T, d).
        key: (1, key heads, T, d).
        value: (1, key heads, T, d).
        attention_mask: Added to the scores, (1, 1, T, T).
        scaling: Of the scores. None: one over the root of d.
        softcap: Bound of the scores (Gemma 2).
        **kwargs: What other attention functions take.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    length = query.shape[2]
    outputs = []
    main, after = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for start in range(0, length, _QUERY_BLOCK):
        block = slice(start, start + _QUERY_BLOCK)
        scores = query[:, :, block] @ key.transpose(2, 3) * scale  # (1, heads, block, T)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        free = scores.softmax(-1, dtype=torch.float32).mean((0, 1))  # (block, T)
        main += free.diagonal(start).sum().cpu()
        after += free.triu(start + 1).sum().cpu()
        mask = _causal_block(attention_mask, block, length, scores)
        weights = (scores + mask).softmax(-1, dtype=torch.float32).to(query.dtype)
        outputs.append(weights @ value)
    parts: dict[int, Tensor] | Any = module.dependence_parts
    if not isinstance(module.layer_idx, int):
        raise TypeError(f"expected the number of the layer, got {module.layer_idx!r}")
    parts[module.layer_idx] = torch.stack([main, length - main - after, after]) * (100 / length)
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _causal_block(attention_mask: Tensor | None, block: slice, length: int, scores: Tensor) -> Tensor:
    if attention_mask is not None:
        return attention_mask[:, :, block, :length]
    lowest = torch.finfo(scores.dtype).min
    return torch.full((scores.shape[2], length), lowest, dtype=scores.dtype, device=scores.device).triu(block.start + 1)


def plot_dependence(
    results: Mapping[str, Mapping[str, BucketDependence]], file: str | os.PathLike[str], *, title: str | None = None
) -> None:
    """Draw the three parts by layer as SVG: a row of panels for each length bucket.

    Args:
        results: What `dependence` gave, by name of the model.
        file: SVG file to write.
        title: Above the panels.

    Raises:
        ImportError: If matplotlib is absent.
        ValueError: If there is nothing to draw.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'ubmoe-st[bench]'") from error
    names = list(dict.fromkeys(bucket for result in results.values() for bucket in result))
    if not names:
        raise ValueError("there is no dependence to plot: no document fell into a bucket")
    # A fixed hash salt: the same numbers give the same bytes.
    with rc_context({"svg.hashsalt": "ubmoe", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 2.2 * len(names)), layout="constrained")
        panels = figure.subplots(len(names), 3, sharex=True, squeeze=False)
        for row, bucket in enumerate(names):
            for column, part in enumerate(("main", "before", "after")):
                axes = panels[row, column]
                for label, result in results.items():
                    if bucket in result:
                        axes.plot([parts[column] for parts in result[bucket].layers], label=label, linewidth=1.3)
                axes.set_title(f"{part}, {bucket} tokens", fontsize=9)
                axes.grid(alpha=0.3)
            panels[row, 0].set_ylabel("percent")
        for axes in panels[-1]:
            axes.set_xlabel("layer")
        panels[0, 0].legend(fontsize=8)
        if title:
            figure.suptitle(title)
        figure.savefig(file, format="svg", metadata={"Date": None})


class _CallableModule(ModuleType):
    """This module and its function have one name in the package: whichever an import finds can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, BucketDependence]:
        return dependence(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
