"""Whether a network is still as it was: asked for at every call, so it is quick."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Watch:
    """Whether a network still has the modules, their settings and parameters of before, and layers of it the values.

    A few numbers of each tensor tell what no version counter sees, as PEFT merges through `.data`, and the counter
    tells what changes other numbers. Weights that are not in main memory, or are packed, are known by address and
    counter alone. A setting is an attribute that is a plain value, or some of them: how a module pools, which adapter
    is active.

    Args:
        network: Of modules and parameters.
        layers: Those of its modules whose values matter. None: all.
    """

    def __init__(self, network: nn.Module, layers: Sequence[nn.Module] | None = None) -> None:
        modules = list(network.modules())
        self._network = network
        self._places: list[tuple[Any, str, Any]] = [
            (m._parameters, name, tensor) for m in modules for name, tensor in m._parameters.items()
        ]
        self._places += [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self._settings = [
            (vars(m), name, copy.copy(value))
            for m in modules
            for name, value in list(vars(m).items())
            if name != "training" and _is_setting(value)
        ]
        self._sizes = [(held, len(held)) for m in modules for held in (m._parameters, m._modules)]
        self._tensors = [t for layer in ([network] if layers is None else layers) for t in layer.parameters()]
        self._samples = [_few_numbers(tensor) for tensor in self._tensors]
        self._seen = self._now()

    def _now(self) -> tuple[list[tuple[int, int]], bytes]:
        marks = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in self._tensors]
        return marks, np.concatenate(self._samples or [np.zeros(0, np.int8)]).tobytes()

    def unchanged(self, network: nn.Module) -> bool:
        """Whether a network is the one of before, as it was."""
        same = network is self._network and all(place.get(name) is thing for place, name, thing in self._places)
        same = same and all(len(held) == size for held, size in self._sizes)
        same = same and all(place.get(name) == value for place, name, value in self._settings)
        return same and self._now() == self._seen


def all_modules(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all below it, a shared one as often as it is there; without names, so that it costs little."""
    waiting = [module]
    while waiting:
        found = waiting.pop()
        yield found
        waiting.extend(child for child in found._modules.values() if child is not None)


def own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of a module itself."""
    for held in (module._parameters, module._buffers):
        yield from (tensor for tensor in held.values() if tensor is not None)


def _is_setting(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    return len(parts) > 0 and all(isinstance(part, bool | int | float | str | None) for part in parts)


def _few_numbers(tensor: Tensor) -> np.ndarray:
    """Eight numbers of a tensor, in its own memory."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    packed = hasattr(tensor, "__tensor_flatten__") or tensor.is_quantized or tensor.element_size() not in bits
    if packed or tensor.device.type != "cpu":
        return np.zeros(0, np.int8)
    flat = tensor.detach().reshape(-1)
    return flat.view(bits[flat.element_size()])[:: max(1, flat.numel() // 8)][:8].numpy()
