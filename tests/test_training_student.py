"""The student: noise, gradients, trained weights under their stock names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TEXTS, make_tokenizer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import AutoModel, AutoModelForCausalLM

pytest.importorskip("peft")

from helpers.training import make_recipe, make_training_data

from training.contrastive import train
from training.student import build_model, causal_model, trained_state
from ubmoe_st.bases import resolve_base

RECIPES = Path(__file__).parent.parent / "training" / "recipes"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_training_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def recipe(base, data, tmp_path, monkeypatch):
    monkeypatch.setenv("UBMOE_DATA", str(data))
    return make_recipe(base, data, tmp_path / "run")


def view(model, texts=TEXTS):
    return model(model.preprocess(texts))["sentence_embedding"]


@pytest.mark.parametrize("noise", ["lora_dropout", "attention_dropout", "ffn_dropout"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "phi3-fused"])
def test_two_views_differ_with_noise_and_are_equal_without(recipe, base_of, noise, architecture):
    rates = {"lora_dropout": 0.0, "attention_dropout": 0.0, "ffn_dropout": 0.0}
    for rate in (0.3, 0.0):
        wanted = recipe(base=str(base_of(architecture)), lora_dropout=0.1)
        for name, value in {**rates, noise: rate}.items():
            setattr(wanted, name, value)
        model = build_model(wanted, device="cpu")
        model[0].processor = make_tokenizer()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # zero at the start: no noise could pass
                    parameter.normal_(0, 0.2)
            model.train()
            first, second = view(model), view(model)
            model.eval()
            assert torch.equal(view(model), view(model))
        assert (first - second).abs().max() > 1e-3 if rate else torch.equal(first, second)


@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ("ffn", {"mlp"}),
        ("attention", {"self_attn"}),
        ("ffn+attention", {"mlp", "self_attn"}),
        ("embeddings", {"embed_tokens"}),
        ("all", {"mlp", "self_attn", "embed_tokens"}),
    ],
)
def test_gradients_only_where_they_should_be(recipe, what, wanted, rank):
    model = build_model(recipe(train=what, rank=rank), device="cpu").train()
    loss = MultipleNegativesRankingLoss(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(0, 0.1)
    loss([model.preprocess(TEXTS), model.preprocess(TEXTS)], None).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    parts = ("mlp", "self_attn", "embed_tokens")
    assert {part for part in parts for name in found if part in name} == wanted
    for name, gradient in found.items():
        assert any(part in name for part in wanted)
        assert "norm" not in name
        assert ("lora_" in name) == (rank is not None)
        assert gradient.abs().max() > 0, name
    layers = {name.split("layers.")[1][0] for name in found if "layers." in name}
    assert layers == ({"0", "1", "2"} if wanted != {"embed_tokens"} else set())


@pytest.mark.parametrize("what", ["ffn", "attention", "embeddings", "all"])
def test_trained_weights_in_the_causal_model(recipe, base, what):
    wanted = recipe(train=what, attention_dropout=0.1)
    run = train(wanted, export=False)
    assert run.checkpoint is None
    module = run.model[0]
    state = trained_state(module)
    stock = AutoModel.from_pretrained(base)
    stock.load_state_dict(state)
    stock.config.is_causal = False
    module.model.eval()
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.inference_mode():
        assert torch.allclose(stock.eval()(ids)[0], module.model(input_ids=ids)[0], atol=1e-4)
        lm = causal_model(module, resolve_base(str(base)))
        reference = AutoModelForCausalLM.from_pretrained(base).eval()
        assert (lm(ids).logits - reference(ids).logits).abs().max() > 1e-3
    changed = {k for k, t in AutoModel.from_pretrained(base).state_dict().items() if not torch.equal(t, state[k])}
    part = {"ffn": ".mlp.", "attention": ".self_attn.", "embeddings": "embed_tokens"}.get(what, "")
    assert changed
    assert all(part in key for key in changed)
