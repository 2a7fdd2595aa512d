"""Losses against their formulas, in value and gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import TEXTS
from torch.nn import functional as F

pytest.importorskip("peft")

from helpers.training import make_recipe, make_teacher, make_training_data

from training.losses import DistillationLoss, SimilarityLoss, build_loss
from training.recipe import DistillationWeights, SimilarityWeights
from training.student import HEAD, build_model
from training.teacher_settings import EmbedderTeacher

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


@pytest.fixture
def joint(recipe, tmp_path):
    """A model with a head, targets of two teachers, and rows of a batch."""
    teachers = [EmbedderTeacher(f"m{n}", str(tmp_path / str(n))) for n in range(2)]
    model = build_model(recipe(loss="similarity", teacher=teachers, head="training"), device="cpu", head_size=5).eval()
    generator = torch.Generator().manual_seed(0)
    targets = [torch.randn(9, size, generator=generator) for size in (5, 7)]
    return model, [F.normalize(target, dim=-1) for target in targets], torch.tensor([7, 0, 3, 5])


def expected_terms(e, wanted, weights, groups):
    """The formula in ten lines."""
    n = len(e)
    q = F.normalize(e, dim=-1) @ F.normalize(e, dim=-1).T
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    difference = torch.stack([q[i, j] - wanted[i, j] for i, j in pairs])
    shifted = difference - (1 - weights.shift**0.5) * difference.mean()
    inside = torch.tensor([bool(groups[i] == groups[j]) for i, j in pairs])
    similarity = (1 - weights.within) * (shifted**2).mean() + weights.within * (shifted[inside] ** 2).mean()
    kl = 0.0
    for i in range(n):
        others = [j for j in range(n) if j != i]
        p = (wanted[i, others] / weights.temperature).softmax(0)
        kl = kl + (p * (p.log() - (q[i, others] / weights.temperature).log_softmax(0))).sum() / n
    return weights.similarity * similarity, weights.kl * kl


@pytest.mark.parametrize(
    ("weights", "dimensions"),
    [
        (SimilarityWeights(3, 0.0, 1.0, 2.0, 0.7, 0.3), None),
        (SimilarityWeights(3, 0.4, 0.0, 2.0, 0.7, 0.3), None),
        (SimilarityWeights(3, 0.4, 0.5, 2.0, 0.7, 0.3), [32, 8]),
    ],
)
def test_the_similarity_loss_is_its_formula_in_value_and_gradient(joint, weights, dimensions):
    model, targets, rows = joint
    groups = torch.tensor([2, 0, 0, 1, 0, 1, 0, 2, 0])
    loss = SimilarityLoss(model, targets, [1.0, 3.0], weights, groups, dimensions)
    found = loss([model.preprocess(TEXTS)], rows)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(sum(found.values()), trained)

    out = model(model.preprocess(TEXTS))
    e, h = out["sentence_embedding"], F.normalize(out[HEAD], dim=-1)
    t, u = targets[0][rows], targets[1][rows]
    wanted = 0.25 * t @ t.T + 0.75 * u @ u.T
    parts = [expected_terms(e[:, :d], wanted, weights, groups[rows]) for d in dimensions or [e.shape[1]]]
    expected = {
        "similarity": sum(part[0] for part in parts) / len(parts),
        "kl": sum(part[1] for part in parts) / len(parts),
        "cosine": weights.cosine * (1 - (h * t).sum(-1)).mean(),
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-5), name
        assert value > 1e-3, name
    for name, a, b in zip(names, gradients, torch.autograd.grad(sum(expected.values()), trained)):
        assert torch.allclose(a, b, atol=1e-4), name
    assert max(g.abs().max() for g in gradients) > 1e-3


def test_the_kl_is_that_of_the_stock_loss_over_all_candidates(joint):
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss

    model, targets, _ = joint
    e = F.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    wanted = targets[0][:6] @ targets[0][:6].T
    stock = DistillKLDivLoss(model, similarity_fct=lambda a, b: (a * b).sum(-1), temperature=0.5)
    turned = [e.roll(-shift, 0) for shift in range(6)]  # the other texts of the batch, as columns
    scores = torch.stack([wanted.roll(-shift, 1).diagonal() for shift in range(1, 6)], 1)
    expected = stock.compute_loss_from_embeddings(turned, scores) / 0.5**2
    found = SimilarityLoss(model, targets, [1, 1], SimilarityWeights(temperature=0.5, kl=1)).terms(e, wanted, None)
    assert torch.allclose(found["kl"], expected, atol=1e-6)
    assert expected > 1e-2


def test_a_free_shift_costs_nothing(joint):
    model, targets, _ = joint
    e = F.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    q = e @ e.T

    def similarity(shift, wanted):
        loss = SimilarityLoss(model, targets, [1, 1], SimilarityWeights(similarity=1, shift=shift))
        return loss.terms(e, wanted, None)["similarity"].item()

    assert similarity(0.0, q - 0.3) < 1e-12
    assert similarity(1.0, q - 0.3) == pytest.approx(0.09, abs=1e-6)
    assert similarity(0.25, q - 0.3) == pytest.approx(0.25 * 0.09, abs=1e-6)
    one = SimilarityLoss(model, targets, [1, 1], SimilarityWeights()).terms(e[:1], q[:1, :1], None)
    assert all(value.item() == 0 for value in one.values())


def test_titles_find_their_own_passage_and_false_negatives_are_left_out(joint):
    model, targets, _ = joint
    torch.manual_seed(3)
    # Rows 4 (a passage), 9 (its title), 2 (a passage), 7 (its question), 5 (a passage), 1 (the title of one not there).
    rows = torch.tensor([4, 9, 2, 7, 5, 1])
    passages = torch.full((12,), -1)
    passages[[4, 9, 2, 7, 5, 1, 8]] = torch.tensor([4, 4, 2, 2, 5, 8, 8])
    e = torch.randn(6, 8, requires_grad=True)
    wanted = torch.zeros(6, 6)
    wanted[1] = torch.tensor([0.5, 1, 0.4, 0, 0.6, 0])  # the teachers find 5 closer to the title of 4: left out
    wanted[3] = torch.tensor([0.1, 0, 0.8, 1, 0.2, 0])
    loss = SimilarityLoss(model, targets, [1, 1], SimilarityWeights(contrastive=2, temperature=0.1), passages=passages)
    found = loss.contrastive(e, wanted, rows, passages[rows])
    u = F.normalize(e, dim=-1)
    first = F.cross_entropy((u[1] @ u[[0, 2]].T / 0.1)[None], torch.tensor([0]))
    second = F.cross_entropy((u[3] @ u[[0, 2, 4]].T / 0.1)[None], torch.tensor([1]))
    expected = 2 * (first + second) / 2
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, e)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, e)[0])
    assert gradient[5].abs().max() == 0
    alone = loss.contrastive(e[:2], wanted[:2, :2], rows[:2], passages[rows[:2]])
    assert alone == 0
    assert alone.requires_grad


def test_dimensions_that_nothing_trains_are_named(recipe, teacher, caplog):
    """As the stock loss warns: the whole vector is trained only where it is among the dimensions."""
    target = torch.eye(16)
    for dimensions, said in (([8], True), ([32, 8], False), (None, False)):
        wanted = recipe(loss="similarity", teacher=teacher, head="training", matryoshka_dims=dimensions)
        caplog.clear()
        build_loss(wanted, build_model(wanted, device="cpu"), [target])
        assert ("add the whole vector: [32, 8]" in caplog.text) is said


def test_a_teacher_weighs_as_much_as_the_kind_of_text_gives_it(joint, recipe, tmp_path):
    model, targets, rows = joint
    kinds = ["passages", "sentences", "sentences", "fragments", "sentences", "passages", "titles", "queries", "queries"]
    teachers = [
        EmbedderTeacher("m0", str(tmp_path / "0"), weight=2.0),
        EmbedderTeacher("m1", str(tmp_path / "1"), weights={"passages": 4.0, "sentences": 0.0}),
    ]
    made = recipe(loss="similarity", teacher=teachers, head="training", similarity=SimilarityWeights(within=0.0))
    loss = build_loss(made, model, targets, kinds=kinds)
    found = loss([model.preprocess(TEXTS)], rows)
    s = {"passages": (2, 4), "sentences": (2, 0), "fragments": (2, 1), "queries": (2, 1)}
    wanted = torch.zeros(4, 4)
    for i, a in enumerate(rows.tolist()):
        for j, b in enumerate(rows.tolist()):
            each = [(s[kinds[a]][k] * s[kinds[b]][k]) ** 0.5 for k in (0, 1)]
            wanted[i, j] = sum(w * (t[a] @ t[b]) for w, t in zip(each, targets)) / sum(each)
    vectors = model(model.preprocess(TEXTS))["sentence_embedding"]
    similarity, kl = expected_terms(vectors, wanted, made.similarity, torch.zeros(4))
    assert torch.allclose(found["similarity"], similarity, atol=1e-5)
    assert torch.allclose(found["kl"], kl, atol=1e-5)
    plain = build_loss(made, model, targets, kinds=["titles"] * 9)([model.preprocess(TEXTS)], rows)
    assert abs(plain["similarity"] - similarity) > 1e-2
    with pytest.raises(ValueError, match="expected kinds of text"):
        EmbedderTeacher("m", "f", weights={"documents": 1.0})
    with pytest.raises(ValueError, match="passages must be at least 0, got -1"):
        EmbedderTeacher("m", "f", weights={"passages": -1})
