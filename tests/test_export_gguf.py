"""GGUF files run in llama.cpp, and agree with the checkpoint and with its base."""

from __future__ import annotations

import importlib.util
import json
import warnings

import numpy as np
import pytest
import torch
from helpers.engines import LLAMA_CPP, cosine, in_process
from helpers.gguf import GGUF_MODELS, GGUF_TEXTS, sentencepiece_tokenizer
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from ubmoe_st import UBMoE
from ubmoe_st.export import export
from ubmoe_st.export.gemma import check_gemma
from ubmoe_st.export.gguf import _gguf_architecture
from ubmoe_st.export.vocabulary import vocabulary_of

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


def test_dimensions_that_llama_cpp_does_not_cut_are_told(gguf_checkpoint_of, tmp_path):
    _, checkpoint = gguf_checkpoint_of("llama")
    UBMoE(str(checkpoint), truncate_dim=8).save(str(tmp_path / "cut"))
    with pytest.warns(UserWarning, match=r"gives all \d+ dimensions: keep the first 8 of each"):
        export(tmp_path / "cut", tmp_path / "model.gguf", format="gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export(tmp_path / "cut", tmp_path / "generator.gguf", view="generator", format="gguf")
        export(checkpoint, tmp_path / "whole.gguf", format="gguf")


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


@needs_llama
def test_windows_of_gemma_reach_as_far_as_those_of_the_checkpoint(gguf_checkpoint_of, tmp_path):
    """Texts of many windows; a window that is a token shorter or longer gives other vectors."""
    _, checkpoint = gguf_checkpoint_of("gemma3")
    texts = ["the cat sits on the mat and a red bird sleeps", "in 1984 the old dog runs under the house", "train " * 20]
    export(checkpoint, tmp_path / "model.gguf", format="gguf")
    found = in_process(LLAMA_CPP, tmp_path / "model.gguf", "encode", json.dumps(texts))
    model = UBMoE(str(checkpoint))
    window = model[0].model.config.sliding_window
    assert min(map(len, found["ids"])) > 2 * window
    assert cosine(found["vectors"], model.encode(texts)).min() > 0.9999
    for other in (window - 1, window + 1):
        model[0].model.config.sliding_window = other
        assert cosine(found["vectors"], model.encode(texts)).min() < 0.999


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention", *["sliding_attention"] * 5]}, "layer_types other"),
        ({"layer_types": [*["sliding_attention"] * 2, *["full_attention"] * 4]}, "layer_types other"),
        ({"layer_types": ["sliding_attention"] * 6}, "layer_types other"),
        ({"layer_types": ["full_attention"] * 6}, "layer_types other"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_activation": "relu"}, "activation relu"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope type linear in its sliding layers",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}}, "rope type dynamic"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(changes, message):
    sizes = {"num_hidden_layers": 6, "hidden_size": 32, "num_attention_heads": 4}
    check_gemma(Gemma3TextConfig(**sizes))
    with pytest.raises(ValueError, match=f"no Gemma 3 with {message}.*format='onnx'"):
        check_gemma(Gemma3TextConfig(**sizes, **changes))


def test_an_activation_that_llama_cpp_has_not_is_refused():
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 16}
    with torch.device("meta"):
        known = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=9))
        other = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=9, hidden_act="gelu"))
    assert _gguf_architecture(known) == "LLAMA"
    with pytest.raises(ValueError, match="with activation gelu is not written here"):
        _gguf_architecture(other)


@pytest.mark.parametrize("change", ["merges", "order", "normalizer", "pre_tokenizer"])
def test_tokenizers_that_llama_cpp_has_not_are_refused(change):
    tokenizer = sentencepiece_tokenizer()
    backend = tokenizer.backend_tokenizer
    vocabulary_of(tokenizer, 360, "a hint")
    if change == "normalizer":
        backend.normalizer = normalizers.NFKC()
    elif change == "pre_tokenizer":
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        content = json.loads(backend.to_str())
        merges = content["model"]["merges"]
        several = next(i for i, (a, b) in enumerate(merges) if "".join(merges[i + 1]) == a + b)
        pair = merges.pop(several)
        if change == "order":
            merges.append(pair)
        tokenizer._tokenizer = type(backend).from_str(json.dumps(content))
    with pytest.raises(ValueError, match=r"and for that of Gemma; the checkpoint has another \(BPE\); a hint"):
        vocabulary_of(tokenizer, 360, "a hint")
