"""GGUF files run in llama.cpp, and agree with the checkpoint and with its base."""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from helpers.engines import LLAMA_CPP, cosine, in_process
from helpers.gguf import GGUF_MODELS, GGUF_TEXTS, bpe_tokenizer, sentencepiece_tokenizer
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from ubmoe_st import UBMoE, upcycle
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
    with pytest.raises(
        ValueError, match=r"and for that of Gemma; the checkpoint has another \(BPE, normalizer \w+\); a hint"
    ):
        vocabulary_of(tokenizer, 360, "a hint")


def test_prompts_that_are_not_pooled_have_no_place_in_llama_cpp(gguf_checkpoint_of, tmp_path):
    _, checkpoint = gguf_checkpoint_of("llama")
    model = UBMoE(str(checkpoint), prompts={"query": "the old "})
    model[1].include_prompt = False
    model.save(str(tmp_path / "left-out"))
    with pytest.raises(ValueError, match=r"pools without its prompts, which llama\.cpp cannot; take format='onnx'"):
        export(tmp_path / "left-out", tmp_path / "model.gguf", format="gguf")
    assert not (tmp_path / "model.gguf").exists()
    model.prompts = dict.fromkeys(model.prompts, "")
    model.save(str(tmp_path / "none"))
    export(tmp_path / "none", tmp_path / "model.gguf", format="gguf")


def test_the_length_that_llama_cpp_does_not_cut_at_is_told(gguf_checkpoint_of, tmp_path):
    _, checkpoint = gguf_checkpoint_of("llama")
    model = UBMoE(str(checkpoint))
    model.max_seq_length = 16
    model.save(str(tmp_path / "short"))
    with pytest.warns(UserWarning, match=r"reads up to \d+ tokens: cut texts after 16"):
        export(tmp_path / "short", tmp_path / "model.gguf", format="gguf")


def test_what_f16_cannot_hold_is_refused(gguf_checkpoint_of, tmp_path):
    base, _ = gguf_checkpoint_of("llama")
    lm = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        lm.model.layers[0].self_attn.o_proj.weight[0, 0] = 1e5
    shutil.copytree(base, tmp_path / "base")
    lm.save_pretrained(tmp_path / "base")
    checkpoint = upcycle(tmp_path / "base", None, out=tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"holds 1e\+05, beyond the 65504 of f16"):
        export(checkpoint, tmp_path / "model.gguf", format="gguf", quantize="f16")
    assert not (tmp_path / "model.gguf").exists()
    export(checkpoint, tmp_path / "model.gguf", format="gguf")
    with pytest.raises(ValueError, match=r"holds 1e\+05, beyond the range of float16; take dtype='bfloat16'"):
        upcycle(tmp_path / "base", None, out=tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()
    upcycle(tmp_path / "base", None, out=tmp_path / "half", dtype="bfloat16")


def test_a_second_end_of_an_answer_is_the_end_of_a_turn(gguf_checkpoint_of, tmp_path):
    _, checkpoint = gguf_checkpoint_of("llama")
    shutil.copytree(checkpoint, tmp_path / "ends")
    third = 7
    file = tmp_path / "ends" / "generator" / "generation_config.json"
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | {"eos_token_id": [2, third]}))
    export(tmp_path / "ends", tmp_path / "model.gguf", view="generator", format="gguf")
    from gguf import GGUFReader

    field = GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.eot_token_id"]
    assert field.contents() == third


@pytest.mark.parametrize("added", ["<pad> $A", "$A <pad>", "<s> $A </s> </s>"])
def test_other_tokens_around_a_text_are_refused(added):
    tokenizer = bpe_tokenizer(digits=True)
    ids = [("<pad>", 0), ("<s>", 1), ("</s>", 2)]
    for fine, found in (("$A", (False, False)), ("<s> $A", (True, False)), ("<s> $A </s>", (True, True))):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=fine, special_tokens=ids)
        assert tuple(vocabulary_of(tokenizer, 320, "a hint").adds.values()) == found
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=added, special_tokens=ids)
    with pytest.raises(ValueError, match="puts bos and eos around a text and nothing else, this tokenizer gives"):
        vocabulary_of(tokenizer, 320, "a hint")


def test_a_normalizer_that_llama_cpp_has_not_is_told_or_refused():
    tokenizer = bpe_tokenizer(digits=True)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    with pytest.warns(UserWarning, match=r"composes characters \(NFC\) and llama.cpp does not"):
        vocabulary_of(tokenizer, 320, "a hint")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match=r"\(BPE, normalizer Lowercase\); a hint"):
        vocabulary_of(tokenizer, 320, "a hint")
