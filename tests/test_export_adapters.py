"""The experts as an adapter, in the loaders of PEFT and llama.cpp, embed as the checkpoint does."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from helpers.engines import LLAMA_CPP_ADAPTER, cosine, in_process
from helpers.gguf import GGUF_TEXTS, bpe_tokenizer
from helpers.models import TEXTS, make_base, make_checkpoint, make_tokenizer, random_experts
from peft import PeftModel
from safetensors.numpy import load_file
from sentence_transformers.sentence_transformer.modules import Dense
from transformers import AutoModelForCausalLM

from ubmoe_st import UBMoE, UBMoETransformer, upcycle
from ubmoe_st.export import export
from ubmoe_st.upcycling import export_experts

needs_llama = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs the extra serve")


def vectors_by_peft(base, adapter):
    """Reference: PEFT on the stock causal LM with full attention, mean pooling, normalisation."""
    lm = AutoModelForCausalLM.from_pretrained(base)
    lm.config.is_causal = False
    lm = PeftModel.from_pretrained(lm, str(adapter)) if adapter else lm
    backbone = (lm.get_base_model() if adapter else lm).get_decoder()
    rows = []
    for text in TEXTS:
        ids = make_tokenizer()(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            rows.append(torch.nn.functional.normalize(backbone(ids).last_hidden_state[0].mean(0), dim=0).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3-fused"])
@pytest.mark.filterwarnings("error:Found missing adapter keys")
def test_peft_loads_the_adapter_on_the_base(base_of, checkpoint_of, tmp_path, architecture):
    base, checkpoint = base_of(architecture), checkpoint_of(architecture)
    facts = export(checkpoint, tmp_path / "adapter", format="peft")
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert facts["bytes"] < sum(file.stat().st_size for file in checkpoint.rglob("*.safetensors")) / 2
    found = vectors_by_peft(base, tmp_path / "adapter")
    expected = UBMoE(str(checkpoint)).encode(TEXTS)
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(found - vectors_by_peft(base, None)).max() > 1e-2
    again = UBMoE(str(upcycle(base, tmp_path / "adapter", out=tmp_path / "again"))).encode(TEXTS)
    assert np.abs(again - expected).max() < 1e-4


def test_layers_of_other_ranks_and_layers_without_experts(base, tmp_path):
    module = UBMoETransformer.from_base(base)
    low_rank = random_experts(module, rank=4)
    del low_rank["layers.1.mlp.up_proj"]
    low_rank["layers.0.mlp.gate_proj"] = tuple(random_experts(module, rank=2)["layers.0.mlp.gate_proj"])
    module.set_low_rank_experts(low_rank)
    experts = export_experts(module, tmp_path / "experts", dtype=torch.float32)
    checkpoint = upcycle(base, experts, out=tmp_path / "checkpoint")
    export(checkpoint, tmp_path / "adapter", format="peft")
    expected = UBMoE(str(checkpoint)).encode(TEXTS)
    assert np.abs(vectors_by_peft(base, tmp_path / "adapter") - expected).max() < 1e-4


@needs_llama
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_llama_cpp_loads_the_adapter_beside_the_gguf_of_the_base(tmp_path, architecture):
    base = make_base(tmp_path / "base", architecture, vocab_size=320)
    for file in base.glob("tokenizer*"):
        file.unlink()
    bpe_tokenizer(digits=True).save_pretrained(base)
    checkpoint = make_checkpoint(base, tmp_path / "checkpoint")
    export(checkpoint, tmp_path / "base.gguf", view="generator", format="gguf")
    export(checkpoint, tmp_path / "adapter.gguf", format="gguf-lora")
    expected = UBMoE(str(checkpoint)).encode(GGUF_TEXTS)
    found = in_process(LLAMA_CPP_ADAPTER, tmp_path / "base.gguf", tmp_path / "adapter.gguf", json.dumps(GGUF_TEXTS))
    assert cosine(found, expected).min() > 0.999
    plain = in_process(LLAMA_CPP_ADAPTER, tmp_path / "base.gguf", "", json.dumps(GGUF_TEXTS))
    assert cosine(plain, expected).min() < 0.95


@needs_llama
def test_a_dense_layer_is_applied_behind_llama_cpp(gguf_checkpoint_of, tmp_path):
    """A GGUF has no place for it and is refused; behind the adapter it is two arrays, as docs/serving.md shows."""
    _, plain = gguf_checkpoint_of("qwen3")
    backbone, pooling, normalize = UBMoE(str(plain))
    torch.manual_seed(0)
    dense = Dense(32, 24, bias=True, activation_function=torch.nn.Identity())
    checkpoint = tmp_path / "checkpoint"
    model = UBMoE(modules=[backbone, pooling, dense, normalize], device="cpu")
    model.save(str(checkpoint))
    with pytest.raises(ValueError, match=r"no place for the Dense between them.*gguf-lora.*docs/serving\.md"):
        export(checkpoint, tmp_path / "encoder.gguf", format="gguf")
    assert not (tmp_path / "encoder.gguf").exists()
    export(checkpoint, tmp_path / "base.gguf", view="generator", format="gguf")
    export(checkpoint, tmp_path / "adapter.gguf", format="gguf-lora")
    texts = json.dumps(GGUF_TEXTS)
    pooled = np.array(in_process(LLAMA_CPP_ADAPTER, tmp_path / "base.gguf", tmp_path / "adapter.gguf", texts))
    arrays = load_file(checkpoint / "2_Dense" / "model.safetensors")
    expected = model.encode(GGUF_TEXTS)
    assert cosine(pooled @ arrays["linear.weight"].T + arrays["linear.bias"], expected).min() > 0.999
    unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    assert cosine(unit @ arrays["linear.weight"].T + arrays["linear.bias"], expected).min() < 0.99


def test_what_no_adapter_can_hold_is_refused(base, checkpoint, tmp_path):
    dense = upcycle(base, out=tmp_path / "dense")
    for format, out in (("peft", "adapter"), ("gguf-lora", "adapter.gguf")):
        with pytest.raises(ValueError, match="experts of this checkpoint are dense"):
            export(dense, tmp_path / out, format=format)
        with pytest.raises(ValueError, match="the generator is the base itself"):
            export(checkpoint, tmp_path / out, view="generator", format=format)
        assert not (tmp_path / out).exists()
    with pytest.raises(ValueError, match=r"ends in \.gguf"):
        export(checkpoint, tmp_path / "adapter", format="gguf-lora")
