"""Low-rank experts and the routed FFN against their definitions, in value and every gradient."""

from __future__ import annotations

import pytest
import torch
from helpers.models import ARCHITECTURES, random_experts
from torch import nn
from transformers import AutoModel

from ubmoe_st.experts import (
    LowRankLinear,
    RoutedFFN,
    TokenRouter,
    find_ffns,
    is_ffn_key,
    load_low_rank,
    load_routers,
    merge_low_rank,
    merged,
    save_low_rank,
    share_copy,
    with_low_rank,
    without_low_rank,
)
from ubmoe_st.model import UBMoETransformer

X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
WRONG = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(9))


def routed(base, kind, *, trained=True):
    """The routed FFN of layer 1 with random low-rank experts."""
    module = UBMoETransformer.from_base(base)
    low_rank = random_experts(module)
    prefix, uni = list(find_ffns(module.model).items())[1]
    router = TokenRouter(32, kind)
    if trained:
        with torch.no_grad():
            router.proj.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(2))
            if kind == "soft":
                router.strength.fill_(0.7)
    return RoutedFFN(uni, with_low_rank(uni, prefix, low_rank), router), low_rank, prefix


def gradients(ffn, forward):
    """Gradients of every parameter and of the input, for a fixed weighted sum of the output."""
    for parameter in ffn.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    x = X.clone().requires_grad_(True)
    (forward(x) * WRONG).sum().backward()
    return {"x": x.grad, **{n: p.grad.clone() for n, p in ffn.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("kind", ["soft", "top1"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_the_one_pass_mix_equals_both_ffns_in_value_and_every_gradient(base_of, architecture, kind):
    ffn, *_ = routed(base_of(architecture), kind)
    ffn = ffn.double()
    global X, WRONG
    X, WRONG = X.double(), WRONG.double()
    assert ffn._one_pass is not None, "the clever path is not taken: the test would be vacuous"
    weight = ffn.router(X)
    assert 0 < weight.min() or kind == "top1"
    assert weight.max() - weight.min() > 0.05
    assert torch.allclose(ffn(X), ffn.forward_twice(X), atol=1e-10)
    assert (ffn(X) - ffn.uni(X)).abs().max() > 1e-2
    assert (ffn(X) - ffn.bi(X)).abs().max() > 1e-2
    clever, naive = gradients(ffn, ffn), gradients(ffn, ffn.forward_twice)
    assert set(clever) == set(naive)
    expected = {"router.proj.weight", "router.proj.bias", "x"} | ({"router.strength"} if kind == "soft" else set())
    assert expected < set(naive)
    assert any("lora_A" in n for n in naive)
    for name, gradient in naive.items():
        assert torch.allclose(clever[name], gradient, atol=1e-8), name
        assert gradient.abs().max() > 1e-6, name


@pytest.mark.parametrize("kind", ["soft", "top1"])
@pytest.mark.parametrize("low_rank", [True, False])
def test_a_new_router_gives_the_uni_expert_to_the_bit_and_can_learn(base, kind, low_rank):
    ffn, experts, prefix = routed(base, kind, trained=False)
    if not low_rank:
        dense = AutoModel.from_pretrained(base).get_submodule(prefix)
        for name, linear in dense.named_modules():
            if isinstance(linear, nn.Linear):
                merge_low_rank(linear, *experts[f"{prefix}.{name}"])
        ffn = RoutedFFN(ffn.uni, dense, ffn.router)
        assert ffn._one_pass is None
    x = X.float()
    assert torch.equal(ffn(x), ffn.uni(x))
    assert not torch.equal(ffn.bi(x), ffn.uni(x))
    ffn.requires_grad_(False)
    ffn.router.requires_grad_(True)
    ffn(x).square().sum().backward()
    assert max(p.grad.abs().max() for p in ffn.router.parameters()) > 0


def test_soft_strength_passes_its_gradient_through_the_clamp():
    router = TokenRouter(32, "soft")
    with torch.no_grad():
        router.strength.fill_(-0.4)
    out = router(X.float())
    assert (out == 0).all()
    out.sum().backward()
    assert router.strength.grad == pytest.approx(X.shape[0] * X.shape[1] * 0.5)


def test_top1_is_the_larger_logit():
    router = TokenRouter(32, "top1")
    with torch.no_grad():
        router.proj.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    out = router(X.float())
    assert torch.equal(out[..., 0] == 1, router.proj(X.float()).argmax(-1) == 1)
    assert set(out.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_a_low_rank_expert_equals_the_merged_one_and_shares_the_base(base_of, architecture):
    module = UBMoETransformer.from_base(base_of(architecture))
    low_rank = random_experts(module)
    x = X.float()
    for prefix, ffn in find_ffns(module.model).items():
        expert = with_low_rank(ffn, prefix, low_rank)
        whole = share_copy(ffn)
        for name, linear in whole.named_modules():
            if isinstance(linear, nn.Linear):
                linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
                merge_low_rank(linear, *low_rank[f"{prefix}.{name}"])
        assert torch.allclose(expert(x), whole(x), atol=1e-3, rtol=1e-4)
        assert (expert(x) - ffn(x)).abs().max() > 1e-1
        assert torch.equal(without_low_rank(expert)(x), ffn(x))
        own = {id(p) for p in ffn.parameters()}
        assert own <= {id(p) for p in expert.parameters()}
        assert own == {id(p) for p in without_low_rank(expert).parameters()}


def test_a_merged_weight_is_rounded_once_and_the_original_stays():
    torch.manual_seed(0)
    weight, a, b = nn.Parameter(torch.randn(5, 4).bfloat16()), torch.randn(2, 4).half(), torch.randn(5, 2).half()
    before = weight.detach().clone()
    exact = weight.detach().double() + b.double() @ a.double()
    found = merged(weight, a, b)
    assert torch.equal(found, exact.bfloat16())
    assert torch.equal(weight, before)
    assert not found.requires_grad
    assert not torch.equal(found, before + (b @ a).bfloat16())  # rounded three times


def test_low_rank_experts_come_back_from_their_file(base, tmp_path):
    low_rank = random_experts(UBMoETransformer.from_base(base))
    save_low_rank(low_rank, tmp_path / "e.safetensors", {"base_sha256": {"f": "0"}})
    found, metadata = load_low_rank(tmp_path / "e.safetensors")
    assert metadata == {"base_sha256": {"f": "0"}}
    assert set(found) == set(low_rank)
    assert all(torch.equal(a, b) for name in found for a, b in zip(found[name], low_rank[name]))


def test_wrong_experts_are_refused(tmp_path):
    from safetensors.torch import save_file

    linear = nn.Linear(4, 6)
    with pytest.raises(ValueError, match=r"expected A \(R, 4\) and B \(6, R\), got \(2, 5\)"):
        LowRankLinear(linear, torch.zeros(2, 5), torch.zeros(6, 2))
    with pytest.raises(ValueError, match="expected A"):
        LowRankLinear(linear, torch.zeros(2, 4), torch.zeros(6, 3))
    save_file({"layers.0.self_attn.q_proj.lora_A": torch.zeros(1, 1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not an FFN expert"):
        load_low_rank(tmp_path / "x.safetensors")
    save_file({"layers.0.mlp.up_proj.lora_A": torch.zeros(1, 1)}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="lora_A only"):
        load_low_rank(tmp_path / "y.safetensors")


def test_ffn_keys():
    assert is_ffn_key("layers.12.mlp.up_proj.weight")
    assert not is_ffn_key("layers.12.self_attn.q_proj.weight")
    assert not is_ffn_key("layers.1.post_feedforward_layernorm.weight")


def test_damaged_experts_and_routers_are_named(tmp_path):
    file = tmp_path / "x.safetensors"
    save_low_rank({"layers.0.mlp.up_proj": (torch.ones(2, 4), torch.ones(3, 2))}, file, {})
    content = file.read_bytes()
    for changed in (content[:-4], b"", content + b"x", (2**62).to_bytes(8, "little") + content[8:]):
        file.write_bytes(changed)
        for read in (load_low_rank, load_routers):
            with pytest.raises(ValueError, match=r"x\.safetensors is (truncated|too long)"):
                read(file)


@pytest.mark.parametrize("beside", ["no JSON", "[1]", '{"a": "b"}', '{"a": null}', "[" * 9999])
def test_damaged_facts_of_routers_are_named(tmp_path, beside):
    from safetensors.torch import save_file

    file = tmp_path / "r.safetensors"
    save_file({"layers.0.router.bias": torch.zeros(2)}, file, {"kind": "soft", "trained_beside": beside})
    with pytest.raises(ValueError, match=r"r\.safetensors: its metadata `trained_beside` is no JSON"):
        load_routers(file)
