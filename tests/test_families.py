"""The promises on real bases of several families; `make test-families` needs their weights and takes minutes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.engines import ENCODE, ENGINES, LLAMA_CPP, LLAMA_CPP_ADAPTER, cosine, in_process
from helpers.models import random_experts
from peft import LoraConfig, PeftModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubmoe_st import UBMoE, UBMoETransformer, upcycle
from ubmoe_st.bases import resolve_base
from ubmoe_st.export import export
from ubmoe_st.planning import Setting, plan
from ubmoe_st.upcycling import export_experts

FAMILIES = ["smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b"]
TEXTS = ["A man is playing a guitar.", "Someone makes music on an old instrument.", "The train is late."]
PROMPTS = ["The capital of France is", "Once upon a time, in a very small village by the sea,"]

pytestmark = pytest.mark.families


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A base, and a checkpoint of it with low-rank experts that change its vectors."""
    try:
        base = resolve_base(request.param)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp(request.param)
    module = UBMoETransformer.from_base(base)
    module.low_rank = random_experts(module, rank=4, scale=0.02)
    experts = export_experts(module, folder / "experts")
    del module
    return base, upcycle(base, experts, out=folder / "checkpoint")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_p1_logits_and_tokens_are_those_of_the_base(family, dtype):
    base, checkpoint = family
    reference = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(base.path, padding_side="left")
    model = UBMoE(str(checkpoint), model_kwargs={"dtype": dtype})
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = reference(**inputs).logits
        assert torch.equal(model.generator(**inputs).logits, expected)
        assert not torch.equal(model.generator_for("bi")(**inputs).logits, expected)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generator.generate(**inputs, **options), reference.generate(**inputs, **options))


def test_p2_p3_stock_gives_the_same_vectors_and_both_views_fit(family):
    base, checkpoint = family
    stock = SentenceTransformer(str(checkpoint)).encode(TEXTS)
    model = UBMoE(str(checkpoint), low_memory=True)
    assert np.abs(UBMoE(str(checkpoint)).encode(TEXTS) - stock).max() == 0
    assert np.abs(model.encode(TEXTS) - stock).max() < 1e-4
    report = model.memory_report()
    assert report["ratio"] <= 1.05
    assert report["base"] == plan(base.path)["generating"]["base_weights"]


def test_the_plan_is_what_was_written(family):
    base, checkpoint = family
    written = {
        file.relative_to(checkpoint).as_posix(): file.stat().st_size for file in checkpoint.rglob("*.safetensors")
    }
    planned = plan(base.path, Setting(rank=4))["files"]
    # The name of the base's file stands in the header of the low-rank experts.
    assert {name: written[name] - size for name, size in planned.items() if "delta" not in name} == {
        name: 0 for name in written if "delta" not in name
    }


def test_five_steps_of_training_lower_a_loss_and_change_the_experts_alone(family):
    base, _ = family
    module = UBMoETransformer.from_base(base)
    module.model.requires_grad_(False).train()
    module.model.config.use_cache = False
    module.model.add_adapter(LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"], use_rslora=True))
    trained = [parameter for parameter in module.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    batch = module.preprocess(TEXTS)
    losses = []
    for _ in range(5):
        features = module(dict(batch))
        mask = features["attention_mask"][..., None]
        pooled = (features["token_embeddings"] * mask).sum(1) / mask.sum(1)
        pooled = torch.nn.functional.normalize(pooled, dim=1)
        loss = (pooled @ pooled.T - torch.eye(len(TEXTS))).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_exports_embed_as_the_checkpoint_does(family, tmp_path):
    base, checkpoint = family
    expected = UBMoE(str(checkpoint)).encode(TEXTS)
    export(checkpoint, tmp_path / "hf")
    assert np.abs(SentenceTransformer(str(tmp_path / "hf")).encode(TEXTS) - expected).max() < 1e-6
    export(checkpoint, tmp_path / "adapter", format="peft")
    lm = AutoModelForCausalLM.from_pretrained(base.path)
    lm.config.is_causal = False
    backbone = PeftModel.from_pretrained(lm, str(tmp_path / "adapter")).get_base_model().get_decoder()
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    for text, vector in zip(TEXTS, expected, strict=True):
        with torch.inference_mode():
            hidden = backbone(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        assert np.abs(torch.nn.functional.normalize(hidden, dim=0).numpy() - vector).max() < 1e-3


def test_openvino_embeds_as_the_checkpoint_does(family, tmp_path):
    """In a process without torch, at the precision that `INFERENCE_PRECISION_HINT` says."""
    _, checkpoint = family
    export(checkpoint, tmp_path / "graph", format="openvino")
    hidden = ("ubmoe_st", "torch", "transformers", "sentence_transformers")
    found = in_process(ENGINES["openvino"] + ENCODE, tmp_path / "graph", json.dumps(TEXTS), hidden=hidden)
    assert np.abs(np.array(found["vectors"]) - UBMoE(str(checkpoint)).encode(TEXTS)).max() < 1e-3


def test_llama_cpp_embeds_with_full_attention_beside_the_gguf_of_the_base(family, tmp_path):
    """The base's own file, in 4 bit, and the experts as an adapter; causal attention would give other vectors."""
    base, checkpoint = family
    (file,) = base.source_files
    export(checkpoint, tmp_path / "adapter.gguf", format="gguf-lora")
    expected = UBMoE(str(checkpoint)).encode(TEXTS)

    def similarity(adapter, *causal):
        return cosine(in_process(LLAMA_CPP_ADAPTER, file, adapter, json.dumps(TEXTS), *causal), expected).min()

    full = similarity(tmp_path / "adapter.gguf")
    assert full > 0.98
    assert similarity(tmp_path / "adapter.gguf", "causal") < full - 0.02
    assert similarity("") < full - 0.002, "the experts change nothing, so this test would be vacuous"


def test_gguf_embeds_as_the_checkpoint_does(family, tmp_path):
    """Whole encoder and tokenizer in llama.cpp, on odd texts, too."""
    _, checkpoint = family
    texts = [*TEXTS, "def f(x):\n\n\n    return {'\u00e9': \"\u6f22\u5b57 \U0001f600\"}\t# 1984   ok  "]
    assert export(checkpoint, tmp_path / "model.gguf", format="gguf")["bytes"] > 1e8
    found = in_process(LLAMA_CPP, tmp_path / "model.gguf", "encode", json.dumps(texts))
    model = UBMoE(str(checkpoint))
    assert found["ids"] == model.tokenizer(texts)["input_ids"]
    assert cosine(found["vectors"], model.encode(texts)).min() > 0.9999


def test_gguf_is_refused_before_anything_is_loaded(family, tmp_path):
    """A Dense behind the pooling has no place in it."""
    _, checkpoint = family
    dense = Dense(16, 16, bias=True)
    shutil.copytree(checkpoint, tmp_path / "dense", copy_function=os.link)
    (tmp_path / "dense" / "2_Dense").mkdir()
    dense.save(str(tmp_path / "dense" / "2_Dense"))
    modules = json.loads((checkpoint / "modules.json").read_text())
    kind = f"{Dense.__module__}.{Dense.__qualname__}"
    modules.insert(2, {"idx": 2, "name": "dense", "path": "2_Dense", "type": kind})
    (tmp_path / "dense" / "modules.json").unlink()
    (tmp_path / "dense" / "modules.json").write_text(json.dumps(modules))
    script = (
        "import sys, torch\nfrom ubmoe_st.export import export\ntry:\n    export(*sys.argv[1:3], format='gguf')\n"
        "except ValueError as error:\n    print(error)\n"
        "import re; print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "dense"), str(tmp_path / "model.gguf")]
    said, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "no place for the Dense" in said
    weights = sum(file.stat().st_size for file in Path(checkpoint).glob("*.safetensors"))
    assert int(peak) < max(weights, 1e9)  # A process with torch alone may be as large as a small model.
