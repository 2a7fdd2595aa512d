"""The generator view holds no part of the `bi` experts, whatever was done to the encoder."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.models import make_base, make_checkpoint, random_experts
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from ubmoe_st import UBMoE
from ubmoe_st.generator import build_generator, router_state

IDS = torch.arange(4, 12)[None]


def logits(lm):
    with torch.inference_mode():
        return lm(IDS).logits


def quantised(model, **kwargs):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, **kwargs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("architecture", ["llama", "phi3-fused", "gemma3"])
def test_packed_weights_leave_the_original_experts_to_the_generator(base_of, checkpoint_of, architecture):
    """Quantised layers hold no parameters: a copy of such an FFN would be that of the `bi` expert."""
    base = AutoModelForCausalLM.from_pretrained(base_of(architecture))
    for name, module in base.named_modules():
        if name.endswith("self_attn"):
            quantised(module, inplace=True)
    model = quantised(UBMoE(str(checkpoint_of(architecture))))
    assert any("quantized" in type(module).__module__ for module in model[0].model.modules())
    assert torch.equal(logits(model.generator), logits(base))
    assert not torch.equal(logits(model.generator_for("bi")), logits(base))
    assert model.encode("the cat").shape == (32,)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_packed_low_rank_experts_stand_on_packed_original_ones(base, checkpoint):
    reference = AutoModelForCausalLM.from_pretrained(base)
    quantised(reference.model, inplace=True)
    model = quantised(UBMoE(str(checkpoint), low_memory=True))
    assert torch.equal(logits(model.generator), logits(reference))


def test_hooks_and_compiled_modules_of_the_encoder_stay_there(base, checkpoint):
    expected = logits(AutoModelForCausalLM.from_pretrained(base))
    model = UBMoE(str(checkpoint))
    for layer in model[0].model.layers:
        layer.mlp.register_forward_hook(lambda module, args, out: out * 0)
        layer.mlp.compile(backend="eager")
    assert torch.equal(logits(model.generator), expected)
    whole = UBMoE(str(checkpoint))
    whole[0].model = torch.compile(whole[0].model, backend="eager")
    assert torch.equal(logits(whole.generator), expected)


def test_experts_of_another_shape_are_named(tmp_path):
    module = UBMoE(str(make_checkpoint(make_base(tmp_path / "base"), tmp_path / "out")))[0]
    uni = module.uni_tensors()
    uni["layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    module._uni = uni
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight has shape \(3, 3\), expected"):
        module.generator()


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_generator_that_is_held_follows_the_model_with_its_adapter(base_of, checkpoint_of, architecture, low_memory):
    base = AutoModelForCausalLM.from_pretrained(base_of(architecture))
    model = UBMoE(str(checkpoint_of(architecture)), low_memory=low_memory)
    held = model.generator
    for lm in (held, base):
        torch.manual_seed(0)
        lm.add_adapter(LoraConfig(r=2, target_modules=["up_proj", "q_proj"], init_lora_weights=False))
    unadapted = logits(AutoModelForCausalLM.from_pretrained(base_of(architecture)).to(torch.bfloat16))
    model.to(torch.bfloat16)
    base.to(torch.bfloat16)
    assert model.generator is held
    assert torch.equal(logits(held), logits(base))
    assert not torch.equal(logits(held), unadapted)


def put_in(model, adapter):
    model[0].model.add_adapter(adapter)


def put_around(model, adapter):
    model[0].model = get_peft_model(model[0].model, adapter)


@pytest.mark.parametrize("attach", [put_in, put_around])
def test_an_adapter_of_the_encoder_stays_there(base, checkpoint, attach):
    model = UBMoE(str(checkpoint))
    vectors = model.encode("the cat")
    adapter = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["norm"], init_lora_weights=False)
    attach(model, adapter)
    assert (model.encode("the cat") != vectors).any()
    assert torch.equal(logits(model.generator), logits(AutoModelForCausalLM.from_pretrained(base)))
    assert (model.encode("the cat") != vectors).any()
    assert "lora" not in str(model.generator).lower()


class Plus(nn.Module):
    def forward(self, weight):
        return weight + 1


def test_parametrised_layers(base, checkpoint):
    expected = logits(AutoModelForCausalLM.from_pretrained(base))
    model = UBMoE(str(checkpoint))
    parametrize.register_parametrization(model[0].model.layers[1].mlp.up_proj, "weight", Plus())
    assert torch.equal(logits(model.generator), expected)
    model = UBMoE(str(checkpoint))
    parametrize.register_parametrization(model[0].model.layers[1].self_attn.q_proj, "weight", Plus())
    with pytest.raises(ValueError, match=r"q_proj is shared by both views and was parametrised"):
        model.generate("the")


def test_exchanged_experts_are_those_of_the_routers_too(checkpoint, tmp_path):
    model = UBMoE(str(checkpoint))
    module = model[0]
    new = build_generator(module.model, module.uni_tensors(), routing="router", router="soft")
    torch.manual_seed(0)
    module.set_routers({name: torch.randn_like(tensor) for name, tensor in router_state(new).items()}, "soft")
    with torch.inference_mode():
        before = model.generator_for("router")(IDS).logits
        module.set_low_rank_experts(random_experts(module, rank=3, scale=0.5))
        found = model.generator_for("router")(IDS).logits
        model.save(str(tmp_path / "saved"))
        expected = UBMoE(str(tmp_path / "saved")).generator_for("router")(IDS).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert (found - before).abs().max() > 0.1


def with_routers(checkpoint):
    """The checkpoint with routers that mix much of the `bi` experts in."""
    model = UBMoE(str(checkpoint))
    module = model[0]
    new = build_generator(module.model, module.uni_tensors(), routing="router", router="soft")
    torch.manual_seed(0)
    module.set_routers({name: torch.randn_like(tensor) for name, tensor in router_state(new).items()}, "soft")
    return model


def train_experts(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(model.preprocess(["the cat", "a red bird"]))["sentence_embedding"].sum().backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.*is not its original plus the low-rank experts")
def test_mixed_generation_follows_the_experts(checkpoint, tmp_path):
    """Reference: the same model, whose router view is built after the training alone; and the saved one."""
    early, late = with_routers(checkpoint), with_routers(checkpoint)
    before = logits(early.generator_for("router"))
    kept = early.generator_for("router")
    assert kept is early.generator_for("router"), "it is built anew at each call"
    with torch.no_grad():
        for tensor in router_state(kept).values():
            tensor.mul_(1.5)
    for model in (early, late):
        train_experts(model)
    with torch.no_grad():
        for tensor in router_state(late.generator_for("router")).values():
            tensor.mul_(1.5)
    after = logits(early.generator_for("router"))
    assert (after - before).abs().max() > 1e-2
    assert torch.equal(after, logits(late.generator_for("router")))
    early[0].set_routers(router_state(early.generator_for("router")), "soft")
    early.save(str(tmp_path / "saved"))
    assert torch.allclose(logits(UBMoE(str(tmp_path / "saved")).generator_for("router")), after, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is not its original plus the low-rank experts")
def test_routers_that_were_set_stay_where_the_experts_change_before_their_first_use(checkpoint):
    """Reference: the same changes to a model that had no router view before."""
    early, late = with_routers(checkpoint), with_routers(checkpoint)
    early.generator_for("router")
    for model in (early, late):
        torch.manual_seed(1)
        found = router_state(with_routers(checkpoint).generator_for("router"))
        model[0].set_routers({name: 2 * tensor for name, tensor in found.items()}, "soft")
        train_experts(model)
    assert torch.equal(logits(early.generator_for("router")), logits(late.generator_for("router")))
    assert early.generator_for("router") is early.generator_for("router"), "it is built anew at each call"


def test_an_adapter_of_the_encoder_is_refused_by_views_of_its_experts_whatever_was_built_before(checkpoint):
    model = with_routers(checkpoint)
    expected = logits(model.generator)
    for routing in ("bi", "router"):
        model.generator_for(routing)
    model.add_adapter(LoraConfig(r=2, target_modules=["up_proj", "down_proj"], init_lora_weights=False))
    for routing in ("bi", "router"):
        with pytest.raises(ValueError, match="carries a PEFT adapter"):
            model.generator_for(routing)
    assert torch.equal(logits(model.generator), expected)


def test_what_was_set_in_the_generator_outlives_copies_and_other_forms(checkpoint, tmp_path):
    def changed():
        model = UBMoE(str(checkpoint))
        model.generator.generation_config.repetition_penalty = 1.5
        return model

    low = changed()
    low[0].use_low_memory()
    for model in (copy.deepcopy(changed()), pickle.loads(pickle.dumps(changed())), low):
        assert model.generator.generation_config.repetition_penalty == 1.5
        model.save(str(tmp_path / "saved"))
        assert UBMoE(str(tmp_path / "saved")).generator.generation_config.repetition_penalty == 1.5
        model.generator.generation_config.repetition_penalty = 1.25
        assert copy.deepcopy(model).generator.generation_config.repetition_penalty == 1.25
    assert copy.deepcopy(UBMoE(str(checkpoint))).generator.generation_config.repetition_penalty in (None, 1.0)
    adapted = UBMoE(str(checkpoint))
    adapted.generator.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.warns(UserWarning, match="carries a PEFT adapter, which a copy"):
        copy.deepcopy(adapted)
