"""The generator view holds no part of the `bi` experts, whatever was done to the encoder."""

from __future__ import annotations

import pytest
import torch
from helpers.models import make_base, make_checkpoint
from torch import nn
from transformers import AutoModelForCausalLM

from ubmoe_st import UBMoE

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
