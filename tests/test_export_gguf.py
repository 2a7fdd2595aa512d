"""GGUF files run in llama.cpp, and agree with the checkpoint and with its base."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from helpers.engines import cosine, in_process
from helpers.models import TEXTS, make_base, make_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ubmoe_st import UBMoE
from ubmoe_st.export import export

LLAMA_SCRIPT = """
import json, sys
from urllib.request import Request, urlopen
import xllamacpp
path, mode, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path, params.embedding, params.n_ctx = path, mode == "encode", 128
params.n_parallel, params.cpuparams.n_threads, params.warmup, params.verbosity = 1, 1, False, 0
# The cache in fp32: the default, fp16, moves near ties of a random model.
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
def post(endpoint, **request):
    body = Request(server.listening_address + endpoint, json.dumps(request).encode())
    return json.load(urlopen(body, timeout=60))
result = {"ids": [post("/tokenize", content=text, add_special=True, parse_special=False)["tokens"] for text in texts]}
if mode == "encode":
    result["vectors"] = [entry["embedding"] for entry in post("/v1/embeddings", input=texts)["data"]]
else:
    choice = {"n_predict": 12, "temperature": 0, "top_k": 1, "repeat_penalty": 1, "return_tokens": True}
    result["tokens"] = [post("/completion", prompt=ids, **choice)["tokens"] for ids in result["ids"]]
print(json.dumps(result))
"""
needs_llama = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs the extra serve")
ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GGUF_MODELS = {
    "llama": {},
    "llama-untied": {"attention_bias": True},
    "llama-rope": {"rope_parameters": ROPE_LLAMA3},
    "qwen2": {},
    "qwen3": {},
}
GGUF_TEXTS = [*TEXTS, "In 1984 the cat's tree had 12 birds.", "Größe"]


def bpe_tokenizer(digits: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alone = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([alone, cut]) if digits else cut
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS, "12 birds in 1984 in 1984 in 1984"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def gguf_checkpoint_of(tmp_path_factory):
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            architecture = name if name != "llama-rope" else "llama"
            base = make_base(folder / "base", architecture, vocab_size=320, **GGUF_MODELS[name])
            for file in base.glob("tokenizer*"):
                file.unlink()
            bpe_tokenizer(digits=name == "llama").save_pretrained(base)
            made[name] = base, make_checkpoint(base, folder / "checkpoint")
        return made[name]

    return get


@needs_llama
@pytest.mark.parametrize("name", GGUF_MODELS)
def test_gguf_encoder_in_llama_cpp(name, gguf_checkpoint_of, tmp_path):
    _, checkpoint = gguf_checkpoint_of(name)
    export(checkpoint, tmp_path / "model.gguf", format="gguf")
    found = in_process(LLAMA_SCRIPT, tmp_path / "model.gguf", "encode", json.dumps(GGUF_TEXTS))
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
    found = in_process(LLAMA_SCRIPT, tmp_path / "model.gguf", "encode", json.dumps(GGUF_TEXTS))
    expected = UBMoE(str(checkpoint)).encode(GGUF_TEXTS)
    assert cosine(found["vectors"], expected).min() > limit
    assert np.abs(cosine(found["vectors"], expected) - 1).max() > 1e-9


@needs_llama
@pytest.mark.parametrize("name", GGUF_MODELS)
def test_gguf_generator_gives_the_tokens_of_the_base(name, gguf_checkpoint_of, tmp_path):
    base, checkpoint = gguf_checkpoint_of(name)
    export(checkpoint, tmp_path / "model.gguf", view="generator", format="gguf")
    prompts = ["the cat", "a red bird sleeps in"]
    found = in_process(LLAMA_SCRIPT, tmp_path / "model.gguf", "generate", json.dumps(prompts))
    lm = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = UBMoE(str(checkpoint)).tokenizer
    for prompt, tokens in zip(prompts, found["tokens"], strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        new = lm.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        assert tokens[: len(new)] == new


@needs_llama
def test_the_serving_example_embeds_and_chats_in_one_process(gguf_checkpoint_of, tmp_path):
    base, checkpoint = gguf_checkpoint_of("llama")
    command = [sys.executable, "-m", "examples.serve", str(checkpoint), "--folder", str(tmp_path), "--threads", "1"]
    ports = ["--encoder-port", "0", "--generator-port", "0"]
    with subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as run:
        try:
            embeddings, chat = (next(line for line in run.stdout if line.startswith("http")).strip() for _ in range(2))

            def post(address, **request):
                with urlopen(Request(address, json.dumps(request).encode()), timeout=60) as answer:
                    return json.load(answer)

            found = post(embeddings, model="encoder", input=GGUF_TEXTS)["data"]
            expected = UBMoE(str(checkpoint)).encode(GGUF_TEXTS)
            assert cosine([entry["embedding"] for entry in found], expected).min() > 0.9999
            assert np.abs(cosine(expected[:1], expected[1:]) - 1).max() > 0.01
            messages = [{"role": "user", "content": "the cat"}]
            said = post(chat, model="generator", messages=messages, max_tokens=4, temperature=0)
            assert said["usage"]["completion_tokens"] == 4
            text = post(chat.replace("chat/", ""), model="generator", prompt="the cat", max_tokens=6, temperature=0)
            lm, tokenizer = AutoModelForCausalLM.from_pretrained(base), UBMoE(str(checkpoint)).tokenizer
            ids = torch.tensor([tokenizer("the cat")["input_ids"]])
            new = lm.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
            assert text["choices"][0]["text"] == tokenizer.decode(new)
        finally:
            run.terminate()
    assert run.returncode == 0
