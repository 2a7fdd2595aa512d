"""The two FFN experts of a layer: dense, low-rank, and mixed by a token router.

Shape letters: B batch, T tokens, D hidden, F FFN, R rank.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ubmoe_st import shards
from ubmoe_st.configuration import ROUTER_KINDS, RouterKind

LowRank = dict[str, tuple[Tensor, Tensor]]
"""Low-rank experts by linear layer (`layers.0.mlp.up_proj`): A (R, in) and B (out, R); the delta is B @ A."""

FFN_NAME = "mlp"
LOW_RANK_FORMAT = "ubmoe-low-rank-experts"
_SAME_NORM = 1e-3
_LOW_RANK_KEY = re.compile(r"^(layers\.\d+\.mlp\..+)\.lora_(A|B)$")


def find_ffns(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The FFN of every layer of a decoder backbone, by name (`layers.0.mlp`).

    Args:
        model: A backbone without head, e.g. `LlamaModel`.

    Raises:
        ValueError: If the architecture cannot be split into a shared part and one dense FFN a layer.
    """
    name = type(model).__name__
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise ValueError(f"{name} cannot be split: it has no list of decoder layers under `layers`")
    ffns = {}
    for index, layer in enumerate(layers):
        ffn = getattr(layer, FFN_NAME, None)
        if not isinstance(ffn, nn.Module):
            raise ValueError(f"{name} cannot be split: layer {index} has no FFN under `{FFN_NAME}`")
        loose = [
            key for key, _ in ffn.named_parameters() if not isinstance(_owner(ffn, key), nn.Linear | LowRankLinear)
        ]
        if loose or hasattr(ffn, "experts"):
            raise ValueError(
                f"{name} cannot be split: the FFN of layer {index} ({type(ffn).__name__}) is not made of linear "
                f"layers alone{f' ({loose[0]})' if loose else ''}. Mixture-of-experts bases are not supported: "
                "start from a dense decoder"
            )
        ffns[f"layers.{index}.{FFN_NAME}"] = ffn
    return ffns


def _owner(module: nn.Module, parameter: str) -> nn.Module:
    return module.get_submodule(parameter.rpartition(".")[0])


def is_ffn_key(key: str) -> bool:
    """Whether a backbone tensor (`layers.0.mlp.up_proj.weight`) belongs to an FFN."""
    return re.match(rf"layers\.\d+\.{FFN_NAME}\.", key) is not None


class LowRankLinear(nn.Module):
    """A linear layer plus a low-rank delta: `base(x) + B A x`.

    Args:
        base: The shared layer; its parameters are used, not copied.
        lora_a: Down projection, (R, in).
        lora_b: Up projection with the scaling folded in, (out, R).
    """

    def __init__(self, base: nn.Linear, lora_a: Tensor, lora_b: Tensor) -> None:
        super().__init__()
        check_low_rank(base, lora_a, lora_b, name="low-rank expert")
        weight = base.weight
        self.base = base
        # Copies: what they were read from tells later whether they were trained.
        self.lora_A = nn.Parameter(lora_a.to(weight.device, weight.dtype, copy=True), requires_grad=False)
        self.lora_B = nn.Parameter(lora_b.to(weight.device, weight.dtype, copy=True), requires_grad=False)

    def delta(self, x: Tensor) -> Tensor:
        """What the expert adds to the base layer: (..., in) -> (..., out)."""
        return nn.functional.linear(nn.functional.linear(x, self.lora_A), self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.base(x) + self.delta(x)


def check_low_rank(linear: nn.Linear, lora_a: Tensor, lora_b: Tensor, name: str) -> None:
    """Check that A (R, in) and B (out, R) fit a linear layer.

    Raises:
        ValueError: If they do not.
    """
    out_features, in_features = linear.weight.shape
    ok = lora_a.ndim == lora_b.ndim == 2 and lora_a.shape[0] == lora_b.shape[1]
    if not ok or lora_a.shape[1] != in_features or lora_b.shape[0] != out_features:
        raise ValueError(
            f"{name}: expected A (R, {in_features}) and B ({out_features}, R), "
            f"got {tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
        )


def merge_low_rank(linear: nn.Linear, lora_a: Tensor, lora_b: Tensor) -> None:
    """Make the weight of a linear layer the `merged` one, in place."""
    with torch.no_grad():
        linear.weight.copy_(merged(linear.weight, lora_a, lora_b))


def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """The weight of a layer with B @ A added: product and sum in fp32, rounded once to the dtype of the weight.

    Args:
        weight: (out, in); stays as it is.
        lora_a: A (R, in).
        lora_b: B (out, R).

    Returns:
        A new tensor without gradient, (out, in).
    """
    with torch.no_grad():
        delta = lora_b.to(weight.device, torch.float32) @ lora_a.to(weight.device, torch.float32)
        return (weight.to(torch.float32) + delta).to(weight.dtype)


def low_rank_mismatch(low_rank: LowRank, uni: Mapping[str, Tensor], bi: Mapping[str, Tensor]) -> str | None:
    """The first FFN tensor that is not its original plus B @ A, rounded once; None where all are.

    Args:
        low_rank: The experts.
        uni: The original FFN tensors by backbone name.
        bi: The merged ones; other tensors in it are passed over.
    """
    for key, tensor in bi.items():
        if not is_ffn_key(key):
            continue
        found, original = tensor.detach().cpu(), uni[key].detach().cpu() if key in uni else None
        pair = low_rank.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
        if original is None or original.shape != found.shape or not found.is_floating_point():
            return key
        if pair is None:
            if not torch.equal(original, found):
                return key
            continue
        lora_a, lora_b = (half.detach().to("cpu", torch.float32) for half in pair)
        whole = original.float() + lora_b @ lora_a
        # The product may be summed in another order than when it was merged, the sum was rounded to the dtype.
        room = torch.finfo(torch.float32).eps * 8 * (original.float().abs() + lora_b.abs() @ lora_a.abs())
        if found.dtype != torch.float32:
            room += torch.finfo(found.dtype).eps / 2 * found.float().abs() + torch.finfo(found.dtype).smallest_normal
        if bool(((whole - found.float()).abs() > room).any()):
            return key
    return None


def with_low_rank(ffn: nn.Module, prefix: str, low_rank: LowRank) -> nn.Module:
    """A copy of an FFN that shares its parameters and adds the low-rank experts.

    Args:
        ffn: The `uni` FFN.
        prefix: Its name in the backbone, e.g. `layers.0.mlp`.
        low_rank: Experts by full name of the linear layer; layers without one stay as they are.
    """
    expert = share_copy(ffn)
    for name, module in list(expert.named_modules()):
        pair = low_rank.get(f"{prefix}.{name}")
        if pair is not None and isinstance(module, nn.Linear):
            replace_module(expert, name, LowRankLinear(module, *pair))
    return expert


def without_low_rank(ffn: nn.Module) -> nn.Module:
    """The `uni` FFN inside an FFN with low-rank experts; shares its parameters."""
    uni = share_copy(ffn)
    for name, module in list(uni.named_modules()):
        if isinstance(module, LowRankLinear):
            replace_module(uni, name, module.base)
    return uni


def share_copy(module: nn.Module, memo: dict[int, object] | None = None) -> nn.Module:
    """A structural copy of a module whose parameters are the same objects.

    Args:
        module: What to copy. Buffers are copied, so that no state is shared.
        memo: Further objects by `id` that the copy holds instead of the original's.
    """
    kept = {id(parameter): parameter for parameter in module.parameters()}
    return copy.deepcopy(module, {**kept, **(memo or {})})


def same_low_rank(held: LowRank, stored: LowRank) -> bool:
    """Whether the experts that a model holds are the stored ones, in its dtype."""
    if set(held) != set(stored):
        return False
    pairs = (pair for name in held for pair in zip(held[name], stored[name], strict=True))
    return all(torch.equal(half.detach().cpu(), other.to(half.dtype)) for half, other in pairs)


def with_ffns(encoder: PreTrainedModel, ffns: dict[str, nn.Module]) -> PreTrainedModel:
    """A copy of an encoder that shares its parameters and has other FFNs, by name."""
    memo: dict[int, object] = {id(encoder.get_submodule(prefix)): ffn for prefix, ffn in ffns.items()}
    copied = share_copy(encoder, memo)
    if not isinstance(copied, PreTrainedModel):
        raise TypeError(f"expected a transformers model, got {type(copied).__name__}")
    return copied


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, new)


class TokenRouter(nn.Module):
    """A linear router over (uni, bi) that starts at the base model exactly.

    `soft` weighs the experts by `strength * softmax(logits)`; `strength` is a scalar in [0, 1] that starts at 0
    and passes its gradient straight through the clamp. `top1` takes the expert with the larger logit; the bias
    starts in favour of `uni` and the gradient is the straight-through one of the softmax.

    Args:
        hidden_size: D.
        kind: `soft` or `top1`.
    """

    def __init__(self, hidden_size: int, kind: RouterKind) -> None:
        super().__init__()
        self.kind = kind
        self.proj = nn.Linear(hidden_size, 2)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        if kind == "top1":
            with torch.no_grad():
                self.proj.bias[0] = 1.0
        else:
            self.strength = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Weight of the `bi` expert for each token; the `uni` expert has the rest.

        Args:
            x: Input of the FFN, (B, T, D).

        Returns:
            Weights in [0, 1], (B, T, 1).
        """
        logits = self.proj(x)
        soft = logits.softmax(-1)[..., 1:]
        if self.kind == "soft":
            strength = self.strength + (self.strength.clamp(0, 1) - self.strength).detach()
            return strength * soft
        hard = (logits[..., 1:] > logits[..., :1]).to(soft.dtype)
        # Written so that the forward value is exactly 0 or 1.
        return hard + (soft - soft.detach())


class RoutedFFN(nn.Module):
    """Both experts of a layer, mixed for each token by a router.

    Gated FFNs with low-rank experts need the large products once: gate and up share the base product, and the
    down projection is linear, so it runs once on the mix plus a rank-R correction. Other FFNs run twice.

    Args:
        uni: The original FFN.
        bi: The bidirectionally trained FFN: of the same class, or as made by `with_low_rank`.
        router: The token router.
    """

    def __init__(self, uni: nn.Module, bi: nn.Module, router: TokenRouter) -> None:
        super().__init__()
        self.uni = uni
        self.bi = bi
        self.router = router
        self._one_pass: Callable[[Tensor], tuple[Tensor, Tensor]] | None = _gated_parts(bi)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        weight = self.router(x)  # (B, T, 1)
        if self._one_pass is None:
            uni = self.uni(x)
            return uni + weight * (self.bi(x) - uni)
        uni_hidden, bi_hidden = self._one_pass(x)  # (B, T, F) each
        down: Any = self.bi.get_submodule("down_proj")
        mixed = uni_hidden + weight * (bi_hidden - uni_hidden)
        return down.base(mixed) + weight * down.delta(bi_hidden)

    def forward_twice(self, x: Tensor) -> Tensor:
        """The same mix by running both FFNs: the reference of `forward`."""
        weight = self.router(x)
        return (1 - weight) * self.uni(x) + weight * self.bi(x)


def _gated_parts(ffn: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """Function from x to the hidden activations of (uni, bi), where the FFN is gated and all low-rank."""
    names = {name for name, _ in ffn.named_children()}
    act = getattr(ffn, "act_fn", None) or getattr(ffn, "activation_fn", None)
    split = {"gate_proj", "up_proj", "down_proj"}
    fused = {"gate_up_proj", "down_proj"}
    linears = split if split <= names else fused if fused <= names else set()
    if act is None or not linears or not all(isinstance(getattr(ffn, name), LowRankLinear) for name in linears):
        return None

    if linears == split:
        gate, up = ffn.gate_proj, ffn.up_proj

        def parts(x: Tensor) -> tuple[Tensor, Tensor]:
            g, u = gate.base(x), up.base(x)
            return act(g) * u, act(g + gate.delta(x)) * (u + up.delta(x))

    else:
        gate_up = ffn.gate_up_proj

        def parts(x: Tensor) -> tuple[Tensor, Tensor]:
            both = gate_up.base(x)
            g, u = both.chunk(2, dim=-1)
            bi_g, bi_u = (both + gate_up.delta(x)).chunk(2, dim=-1)
            return u * act(g), bi_u * act(bi_g)

    return parts


def save_low_rank(low_rank: LowRank, file: str | os.PathLike[str], metadata: Mapping[str, object]) -> None:
    """Write low-rank experts as one safetensors file.

    Args:
        low_rank: The experts.
        file: Path of the file.
        metadata: JSON values kept in the header, e.g. `base_sha256`.
    """
    tensors = {}
    for name, (lora_a, lora_b) in low_rank.items():
        tensors[f"{name}.lora_A"] = lora_a.detach().cpu().contiguous()
        tensors[f"{name}.lora_B"] = lora_b.detach().cpu().contiguous()
    shards.write_with_metadata(Path(file), tensors, low_rank_header(metadata))


def low_rank_header(metadata: Mapping[str, object]) -> dict[str, str]:
    """Metadata of the safetensors header of a file of low-rank experts."""
    return {"format": LOW_RANK_FORMAT, "ubmoe": json.dumps(dict(metadata), sort_keys=True)}


def load_low_rank(file: str | os.PathLike[str]) -> tuple[LowRank, dict[str, object]]:
    """Read what `save_low_rank` wrote.

    Returns:
        The experts, and the metadata.

    Raises:
        ValueError: If the file holds anything else.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    shards.read_header(Path(file))
    with safe_open(file, framework="pt") as tensors:
        header = tensors.metadata() or {}
        for key in tensors.keys():
            match = _LOW_RANK_KEY.match(key)
            if match is None:
                raise ValueError(
                    f"{Path(file).name}: {key!r} is not an FFN expert; expected `layers.N.mlp.*.lora_A` and `.lora_B`"
                )
            halves.setdefault(match[1], {})[match[2]] = tensors.get_tensor(key)
    for name, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{Path(file).name}: {name} has lora_{next(iter(pair))} only, expected lora_A and lora_B")
    if not halves:
        raise ValueError(f"{Path(file).name} holds no experts")
    try:
        metadata = json.loads(header.get("ubmoe", "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{Path(file).name}: its metadata `ubmoe` is not JSON") from error
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}, metadata


def norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Frobenius norms of tensors by name: they tell them from others, whatever dtype holds them."""
    return {name: float(f"{tensor.detach().float().norm():.6g}") for name, tensor in tensors.items()}


def expert_norms(low_rank: LowRank) -> dict[str, float]:
    """`norms` of both halves of every low-rank expert."""
    return norms({f"{name}.lora_{half}": t for name, pair in low_rank.items() for half, t in zip("AB", pair)})


def same_norms(found: Mapping[str, float], others: Mapping[str, float]) -> bool:
    """Whether two results of `norms` are of the same tensors; rounding to bf16 moves them by less than 1e-4."""
    alike = (math.isclose(found[name], others[name], rel_tol=_SAME_NORM) for name in found if name in others)
    return set(found) == set(others) and all(alike)


class Routers(NamedTuple):
    """What a file of token routers holds.

    Attributes:
        state: The tensors, `layers.N.router.*`.
        kind: How they mix (`soft` where the file does not say).
        trained_beside: `expert_norms` of the experts that they were trained to mix. Empty: not known.
    """

    state: dict[str, Tensor]
    kind: RouterKind
    trained_beside: dict[str, float]


def save_routers(routers: Routers, file: str | os.PathLike[str]) -> None:
    """Write token routers, how they mix, and which experts."""
    state = {key: tensor.cpu().contiguous() for key, tensor in routers.state.items()}
    facts: dict[str, str] = {"kind": routers.kind}
    if routers.trained_beside:
        facts["trained_beside"] = json.dumps(routers.trained_beside)
    shards.write_with_metadata(Path(file), state, facts)


def load_routers(file: str | os.PathLike[str]) -> Routers:
    """Read what `save_routers` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds anything else.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"expected a file of token routers (.safetensors), got {file}")
    shards.read_header(Path(file))
    with safe_open(file, framework="pt") as tensors:
        facts = tensors.metadata() or {}
        state = {key: tensors.get_tensor(key) for key in tensors.keys()}
    kind = facts.get("kind", "soft")
    odd = [key for key in state if ".router." not in key]
    if odd or not state or kind not in ROUTER_KINDS:
        raise ValueError(
            f"{Path(file).name} holds no token routers: expected tensors `layers.N.router.*` of kind "
            f"{' or '.join(ROUTER_KINDS)}, got {odd[0] if odd else kind!r}"
        )
    try:
        beside = {str(name): float(norm) for name, norm in json.loads(facts.get("trained_beside", "{}")).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{Path(file).name}: its metadata `trained_beside` is no JSON of numbers by name") from error
    return Routers(state, kind, beside)
