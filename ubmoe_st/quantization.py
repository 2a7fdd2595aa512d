"""Both views over a quantised base: the weights they share in few bits, the `bi` experts beside them as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ubmoe_st.transformer import UBMoETransformer


def quantize_base(views: UBMoETransformer, config: Any = None) -> None:
    """Quantise, by torchao, every linear layer that the base has below its head; low-rank experts stay.

    The generator is then the base with the same layers quantised alike. The head stays, as embeddings do: where the two
    are tied they are one tensor.

    Args:
        views: In low-memory form.
        config: Of torchao, e.g. `Int4WeightOnlyConfig()` on a GPU; for 4 bits on a CPU see docs/serving.md. None:
            `Int8WeightOnlyConfig()`.

    Raises:
        ImportError: If torchao is absent.
        ValueError: If the experts are merged, so that the base's FFNs are not what would be quantised, or the encoder
            computes in other numbers already.
    """
    if not views.is_low_memory:
        raise ValueError(
            "a quantised base needs low-rank experts beside it, and these are merged; load the checkpoint with "
            "low_memory=True"
        )
    if views.fast.active:
        raise ValueError(
            f"the encoder computes in {views.fast.report.used} already; load the checkpoint without compute"
        )
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ImportError("quantising the base needs torchao: pip install 'ubmoe-st[quantize]'") from error
    with torch.inference_mode(False):
        quantize_(views.model, config or Int8WeightOnlyConfig())
        views.forget_generators()
        # Now, because quantised tensors are not shared from within an inference mode that the caller may be in later.
        views.generator("uni")


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """The plain tensors of which a tensor is made: itself, or the numbers and scales of a quantised one."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [part for name in flatten()[0] for part in inner_tensors(getattr(tensor, name))]
