"""Losses against their formulas, in value and gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TEXTS
from torch.nn import functional as F

pytest.importorskip("peft")

from helpers.training import make_recipe, make_teacher, make_training_data

from training.losses import DistillationLoss, build_loss
from training.recipe import DistillationWeights
from training.student import HEAD, build_model

RECIPES = Path(__file__).parent.parent / "training" / "recipes"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_training_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def recipe(base, data, tmp_path, monkeypatch):
    monkeypatch.setenv("UBMOE_DATA", str(data))
    return make_recipe(base, data, tmp_path / "run")


@pytest.fixture
def teacher(tmp_path):
    return make_teacher(tmp_path / "t")


def test_the_distillation_loss_is_its_formula_in_value_and_gradient(recipe, teacher):
    model = build_model(
        recipe(
            loss="distillation", teacher=teacher, head="training", distillation=DistillationWeights(contrastive=0.5)
        ),
        device="cpu",
    ).eval()
    targets = F.normalize(torch.randn(9, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    weights = DistillationWeights(cosine=2, info_nce=3, similarity=4, contrastive=0.5)
    loss = DistillationLoss(model, targets, weights, scale=2)
    rows = torch.tensor([7, 0, 3, 5])
    found = loss([model.preprocess(TEXTS), model.preprocess(TEXTS)], rows)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(sum(found.values()), trained)

    out = model(model.preprocess(TEXTS))
    e = out["token_embeddings"] * out["attention_mask"][..., None]
    e = F.normalize(e.sum(1) / out["attention_mask"].sum(1, keepdim=True), dim=-1)
    h, t = F.normalize(out[HEAD], dim=-1), targets[rows]
    own = torch.arange(4)
    expected = {
        "cosine": 2 * (1 - (h * t).sum(-1)).mean(),
        "info_nce": 3 * (F.cross_entropy(2 * h @ t.T, own) + F.cross_entropy(2 * t @ h.T, own)) / 2,
        "similarity": 4 * (((h @ h.T - t @ t.T) ** 2).mean() + ((e @ e.T - t @ t.T) ** 2).mean()),
        "contrastive": 0.5 * F.cross_entropy(2 * e @ e.T, own),
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-5), name
        assert value > 1e-3, name
    for name, a, b in zip(names, gradients, torch.autograd.grad(sum(expected.values()), trained)):
        assert torch.allclose(a, b, atol=1e-4), name
    assert max(g.abs().max() for g in gradients) > 1e-3
    assert not any("lora" in name and g.isnan().any() for name, g in zip(names, gradients))


def test_the_cached_loss_and_checkpointing_give_the_gradients_of_the_plain_loss(recipe):
    gradients = {}
    for name in ("plain", "cached", "checkpointed"):
        torch.manual_seed(0)
        wanted = recipe(
            loss="CachedMultipleNegativesRankingLoss" if name == "cached" else "MultipleNegativesRankingLoss",
            mini_batch_size=2,
        )
        model = build_model(wanted, device="cpu").train()
        for module in model.modules():  # the same noise cannot be drawn in another order
            module._forward_hooks.clear()
        if name == "checkpointed":
            model[0].model.gradient_checkpointing_enable({"use_reentrant": False})
        build_loss(wanted, model)([model.preprocess(TEXTS), model.preprocess(TEXTS[::-1])], None).backward()
        gradients[name] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert max(g.abs().max() for g in gradients["plain"].values()) > 1e-3
    for other in ("cached", "checkpointed"):
        assert set(gradients[other]) == set(gradients["plain"])
        for name, gradient in gradients["plain"].items():
            assert torch.allclose(gradients[other][name], gradient, atol=1e-5), (other, name)
