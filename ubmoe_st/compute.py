"""The encoder's matrix products in other numbers than its weights: bf16, or int8 with a scale for every token.

Only the encoder view computes so. Its linear layers are copied into the other form; the weights themselves, and with
them the generator, saving and training, stay as they are. Beside it: which rows of a batch are computed together.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ubmoe_st.experts import LowRankLinear, merged, replace_module, share_copy
from ubmoe_st.forking import ForkSafeLock
from ubmoe_st.watch import Watch

Compute = Literal["stored", "auto", "bf16", "int8"]

KEPT_ERROR = 0.08
"""A layer whose int8 outputs are off by more than so much of their length, in the mean over tokens, stays as it is."""
_CALIBRATION_TEXTS = 16


@dataclass(frozen=True)
class ComputeReport:
    """How an encoder computes.

    Attributes:
        asked: What was asked for.
        used: `stored` (in the dtype of the weights), `bf16` or `int8`.
        reason: Why it is not what was asked for, or in how many bits; empty where there is nothing to say.
        kept: Linear layers that compute in the dtype of the weights all the same.
    """

    asked: Compute
    used: Literal["stored", "bf16", "int8"]
    reason: str = ""
    kept: tuple[str, ...] = ()


STORED = ComputeReport("stored", "stored")


def processor_flags() -> dict[str, bool]:
    """Which instructions for small numbers this processor has: `avx2`, `avx512_vnni`, `avx512_bf16`, `amx`."""
    found = Path("/proc/cpuinfo")
    if found.is_file():
        words = set(found.read_text(encoding="utf-8", errors="replace").split())
        return {
            "avx2": "avx2" in words,
            "avx512_vnni": bool({"avx512_vnni", "avx_vnni"} & words),
            "avx512_bf16": "avx512_bf16" in words,
            "amx": "amx_bf16" in words,
        }
    asked = {
        "avx2": "_is_avx2_supported",
        "avx512_vnni": "_is_vnni_supported",
        "avx512_bf16": "_is_avx512_bf16_supported",
        "amx": "_is_amx_tile_supported",
    }
    return {name: bool(getattr(torch.cpu, function, bool)()) for name, function in asked.items()}


def choose(asked: str, device: torch.device) -> ComputeReport:
    """How an encoder computes that is asked for `asked`.

    Args:
        asked: A `Compute`.
        device: Where its weights are.

    Raises:
        ValueError: If it is no `Compute`, or this machine lacks the instructions.
    """
    if asked not in get_args(Compute):
        raise ValueError(f"compute must be one of {', '.join(get_args(Compute))}, got {asked!r}")
    if asked == "stored":
        return STORED
    flags = processor_flags()
    lacking = ""
    if device.type != "cpu":
        lacking = (
            f"the model is on {device.type}, and this is for processors; load it with model_kwargs={{'dtype': ...}}"
        )
    elif asked in ("auto", "bf16") and not (flags["avx512_bf16"] or flags["amx"]):
        lacking = "this processor has neither AVX512_BF16 nor AMX, without which bf16 is slower than float32"
    elif asked == "int8" and not (flags["avx2"] and hasattr(torch.ops.onednn, "qlinear_pointwise")):
        lacking = "int8 needs an x86 processor with AVX2 and a torch with oneDNN"
    if asked == "auto":
        return ComputeReport("auto", "stored", lacking) if lacking else ComputeReport("auto", "bf16")
    if lacking:
        raise ValueError(f"compute={asked!r} is not possible here: {lacking}; compute='auto' takes what there is")
    if asked == "bf16":
        return ComputeReport("bf16", "bf16")
    if flags["avx512_vnni"]:
        return ComputeReport("int8", "int8")
    return ComputeReport("int8", "int8", "7 bits for inputs: without VNNI, sums of products of 8 bits overflow")


class Bf16Linear(nn.Module):
    """A linear layer multiplied in bf16.

    Args:
        weight: (out, in).
        bias: (out,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight.detach().to(torch.bfloat16)
        self.bias = None if bias is None else bias.detach().to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of `x`."""
        return nn.functional.linear(x.to(torch.bfloat16), self.weight, self.bias).to(x.dtype)

    def tensors(self) -> Iterator[Tensor]:
        """What it holds."""
        yield from (tensor for tensor in (self.weight, self.bias) if tensor is not None)


class Int8Linear(nn.Module):
    """A linear layer multiplied in int8, with a scale for each row of the weight and for each token.

    So a vector does not depend on its neighbours in the batch, as it would with one scale for all inputs.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        bits: Of the inputs, 8 or 7; with 7, the sum of two products fits into 16 bits.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int) -> None:
        super().__init__()
        wide = weight.detach().float()
        self.scale = wide.abs().amax(1).clamp_min(1e-12) / 127  # (out,)
        whole = (wide / self.scale[:, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(whole, None)
        self.zero = torch.zeros(len(wide), dtype=torch.long)
        self.bias = None if bias is None else bias.detach().float()
        self.steps = 1 << (bits - 1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of `x`."""
        rows = x.reshape(-1, x.shape[-1]).float()
        scale = rows.abs().amax(-1, keepdim=True).clamp_min(1e-30) / (self.steps - 1)  # (N, 1)
        whole = (rows / scale).round_().add_(self.steps).to(torch.uint8)
        found = torch.ops.onednn.qlinear_pointwise(
            whole, 1.0, self.steps, self.packed, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        found = found.mul_(scale)
        if self.bias is not None:
            found += self.bias
        return found.reshape(*x.shape[:-1], found.shape[-1]).to(x.dtype)

    def tensors(self) -> Iterator[Tensor]:
        """What it holds, packed weights as the int8 numbers they are."""
        yield from (tensor for tensor in (self.scale, self.zero, self.bias) if tensor is not None)
        yield torch.empty(len(self.scale), self.packed.numel() // len(self.scale), dtype=torch.int8, device="meta")


class FastEncoder:
    """An encoder module whose linear layers compute in other numbers.

    Args:
        report: How; for `int8`, the layers to keep are found here.
        views: The `UBMoETransformer` whose weights it copies; not needed where they are used as stored.

    Raises:
        ValueError: If the weights carry an adapter or are quantised already.
    """

    def __init__(self, report: ComputeReport = STORED, views: Any = None) -> None:
        self.report = report
        self._module: Any = None
        self._watch: Watch | None = None
        self._lock = ForkSafeLock()
        if not self.active:
            return
        if views.has_adapter or any(hasattr(p, "__tensor_flatten__") for p in views.model.parameters()):
            raise ValueError(
                f"compute={report.asked!r} takes plain weights, and these have an adapter or are quantised"
            )
        with torch.inference_mode():
            linears = dict(_linears(views.model))
            copies = {name: self._copy(layer) for name, layer in linears.items()}
            if report.used == "int8":
                errors = output_errors(views, linears, copies, calibration_texts()[:_CALIBRATION_TEXTS])
                self.report = replace(report, kept=tuple(name for name in linears if errors[name] > KEPT_ERROR))
            self._module = self._made(views, copies)

    @property
    def active(self) -> bool:
        """Whether it computes otherwise than in the dtype of the weights."""
        return self.report.used != "stored"

    def module(self, views: Any) -> Any:
        """A `UBMoETransformer` that computes so; made anew after weights moved or changed, or in another process.

        Args:
            views: The one whose weights it copies.
        """
        with self._lock:
            if self._module is None or self._watch is None or not self._watch.unchanged(views.model):
                with torch.inference_mode():
                    self._module = self._made(views, {n: self._copy(layer) for n, layer in _linears(views.model)})
            return self._module

    def applies(self, views: Any) -> bool:
        """Whether a module is computed so now: not while it has an adapter, which no copy holds."""
        return self.active and not views.has_adapter

    def report_of(self, views: Any) -> ComputeReport:
        """How a module is computed now."""
        if self.applies(views) or not self.active:
            return self.report
        return replace(self.report, used="stored", reason="the encoder has an adapter", kept=())

    def follow(self, device: torch.device) -> None:
        """After the weights have moved: make it anew on its next use, or give up where they are on no processor."""
        with self._lock:
            self._module = self._watch = None
            if self.active and device.type != "cpu":
                reason = f"the weights were moved to {device.type} since, and this is for processors"
                self.report = replace(self.report, used="stored", reason=reason, kept=())

    def memory(self) -> int:
        """Bytes of the copied layers."""
        if self._module is None:
            return 0
        layers = (layer for layer in self._module.model.modules() if isinstance(layer, (Bf16Linear, Int8Linear)))
        return sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in layer.tensors())

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights are of this machine, and the weights they are made of go along anyway.
        return {"report": self.report}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _module=None, _watch=None, _lock=ForkSafeLock())

    def _made(self, views: Any, copies: dict[str, nn.Module]) -> Any:
        network = share_copy(views.model)
        for name, layer in copies.items():
            if name not in self.report.kept:
                replace_module(network, name, layer)
        # The same module over another network, without a word to torch: `views` neither saves nor moves it.
        made = copy.copy(views)
        made.__dict__["_modules"] = {**views._modules, "model": network.eval()}
        made.__dict__["fast"] = FastEncoder()
        self._watch = Watch(views.model, [layer for _, layer in _linears(views.model)])
        return made

    def _copy(self, layer: nn.Module) -> nn.Module:
        weight, bias = _weight_and_bias(layer)
        if self.report.used == "bf16":
            return Bf16Linear(weight, bias)
        return Int8Linear(weight, bias, 8 if processor_flags()["avx512_vnni"] else 7)


def _linears(encoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers, those with low-rank experts as one."""
    inside = ""
    for name, module in encoder.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, (nn.Linear, LowRankLinear)):
            inside = f"{name}."
            yield name, module


def _weight_and_bias(layer: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(layer, LowRankLinear):
        base: Any = layer.base
        return merged(base.weight, layer.lora_A, layer.lora_B), base.bias
    return layer.weight, layer.bias


def output_errors(
    views: Any, linears: dict[str, nn.Module], copies: dict[str, nn.Module], texts: Sequence[str]
) -> dict[str, float]:
    """How far the outputs of copied layers are off: length of the difference by length of the output, mean over tokens.

    Args:
        views: The encoder module.
        linears: Its linear layers by name.
        copies: Their copies.
        texts: Texts to measure with.
    """
    total = dict.fromkeys(linears, 0.0)
    tokens = dict.fromkeys(linears, 0)

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            off = (copies[name](inputs[0]) - output).float().norm(dim=-1)
            total[name] += float((off / output.float().norm(dim=-1).clamp_min(1e-30)).sum())
            tokens[name] += off.numel()

        return hook

    # Of a copy, because another thread may be computing with the layers themselves.
    network = share_copy(views.model)
    handles = [network.get_submodule(name).register_forward_hook(watch(name)) for name in linears]
    try:
        for text in texts:
            batch = views.preprocess([text])
            network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total[name] / max(tokens[name], 1) for name in linears}


def calibration_texts() -> list[str]:
    """Sentences of many kinds, to measure activations with when a caller gives none."""
    return (Path(__file__).parent / "export" / "calibration.txt").read_text(encoding="utf-8").splitlines()
