"""GGUF files run in llama.cpp, and agree with the checkpoint and with its base."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from helpers.engines import LLAMA_CPP, cosine, in_process
from helpers.gguf import GGUF_MODELS, GGUF_TEXTS
from transformers import AutoModelForCausalLM

from ubmoe_st import UBMoE
from ubmoe_st.export import export

needs_llama = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs the extra llama-cpp")


@needs_llama
@pytest.mark.parametrize("name", GGUF_MODELS)
def test_gguf_encoder_in_llama_cpp(name, gguf_checkpoint_of, tmp_path):
    _, checkpoint = gguf_checkpoint_of(name)
    export(checkpoint, tmp_path / "model.gguf", format="gguf")
    found = in_process(LLAMA_CPP, tmp_path / "model.gguf", "encode", json.dumps(GGUF_TEXTS))
    model = UBMoE(str(checkpoint))
    assert found["ids"] == model.tokenizer(GGUF_TEXTS)["input_ids"]
    expected = model.encode(GGUF_TEXTS)
    assert cosine(found["vectors"], expected).min() > 0.9999
    model[0].model.config.is_causal = True
    causal = model.encode(GGUF_TEXTS)
    assert cosine(causal, expected).min() < 0.99, "causal vectors are the same: the test says nothing"


@needs_llama
@pytest.mark.parametrize(("quantize", "limit"), [("f16", 0.9999), ("int8", 0.995)])
def test_gguf_in_fewer_bits(quantize, limit, gguf_checkpoint_of, tmp_path):
    _, checkpoint = gguf_checkpoint_of("llama")
    full = export(checkpoint, tmp_path / "full.gguf", format="gguf")
    facts = export(checkpoint, tmp_path / "model.gguf", format="gguf", quantize=quantize)
    assert facts["bytes"] < 0.9 * full["bytes"]
    found = in_process(LLAMA_CPP, tmp_path / "model.gguf", "encode", json.dumps(GGUF_TEXTS))
    expected = UBMoE(str(checkpoint)).encode(GGUF_TEXTS)
    assert cosine(found["vectors"], expected).min() > limit
    assert np.abs(cosine(found["vectors"], expected) - 1).max() > 1e-9


@needs_llama
@pytest.mark.parametrize("name", GGUF_MODELS)
def test_gguf_generator_gives_the_tokens_of_the_base(name, gguf_checkpoint_of, tmp_path):
    base, checkpoint = gguf_checkpoint_of(name)
    export(checkpoint, tmp_path / "model.gguf", view="generator", format="gguf")
    prompts = ["the cat", "a red bird sleeps in"]
    found = in_process(LLAMA_CPP, tmp_path / "model.gguf", "generate", json.dumps(prompts))
    lm = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = UBMoE(str(checkpoint)).tokenizer
    for prompt, tokens in zip(prompts, found["tokens"], strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        new = lm.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        assert tokens[: len(new)] == new
