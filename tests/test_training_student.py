"""The student: noise, gradients, trained weights under their stock names."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import TEXTS, WORDS, make_tokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM

pytest.importorskip("peft")

from helpers.training import make_recipe, make_training_data

from training import student
from training.contrastive import train
from training.student import (
    HEAD,
    build_model,
    causal_model,
    forward_in_parts,
    ridge,
    start_from,
    start_layers,
    trained_state,
    turn_to_components,
    uncompiled,
)
from training.teacher_settings import EmbedderTeacher
from ubmoe_st import UBMoE
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


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_read_in_parts_gives_the_vectors_and_gradients_of_one_pass(recipe, base_of, side):
    wanted = recipe(base=str(base_of("gemma3")), head="output")
    model = build_model(wanted, device="cpu", head_size=6)
    model[0].processor = make_tokenizer()
    model[0].tokenizer.padding_side = side
    texts = ["the cat " * n for n in (30, 1, 9, 20, 2, 28, 12)] * 4
    passes = []
    model[0].register_forward_pre_hook(lambda module, args: passes.append(tuple(args[0]["input_ids"].shape)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    results = []
    for forward in (lambda features: model(features), lambda features: forward_in_parts(model, features)):
        vectors = forward(model.preprocess(texts))["sentence_embedding"]
        trained = [p for p in model.parameters() if p.requires_grad]
        results.append((vectors, torch.autograd.grad((vectors * torch.arange(6)).sum(), trained)))
    assert len(passes) > 3  # one, then several
    assert passes[-1][1] < passes[0][1]
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    for a, b in zip(results[0][1], results[1][1]):
        assert torch.allclose(a, b, atol=1e-3 * a.abs().max().item() + 1e-6)


def test_a_cpu_under_autocast_takes_fewer_passes():
    mask, shapes = (torch.arange(40) < torch.arange(1, 41)[:, None]).long(), []

    def model(features):
        shapes.append(features["attention_mask"].shape)
        return {"sentence_embedding": features["attention_mask"].sum(1, keepdim=True)}

    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = forward_in_parts(model, {"attention_mask": mask})["sentence_embedding"]
        assert found[:, 0].tolist() == list(range(1, 41))
    shared = [i for i, shape in enumerate(shapes) if shape[1] == 40]
    assert shared[0] == 0 < len(shapes) - shared[1] < shared[1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_have_the_loss_and_gradients_of_eager_ones(recipe, base_of):
    results = []
    for compiled in (False, True):
        wanted = recipe(base=str(base_of("gemma3")), compile=compiled, attention="eager")
        torch.manual_seed(0)
        model = build_model(wanted, device="cpu")
        assert model[0].model.config._attn_implementation == "eager"
        layers = [layer._compiled_call_impl for layer in model[0].model.layers]
        assert all((layer is not None) is compiled for layer in layers)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for number, parameter in enumerate(trained.values()):
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).roll(number).view_as(parameter))
        vectors = view(model.eval(), TEXTS)  # without dropout
        gradients = torch.autograd.grad((vectors * torch.arange(vectors.shape[1])).sum(), list(trained.values()))
        results.append((list(trained), vectors, gradients))
        if compiled:
            count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            with torch.no_grad(), uncompiled():
                assert torch.allclose(view(model, TEXTS), vectors, atol=1e-5)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count > 0
    assert results[0][0] == results[1][0]  # the names of a checkpoint
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)
    for a, b in zip(results[0][2], results[1][2]):
        assert a.abs().max() > 0
        assert torch.allclose(a, b, atol=1e-3 * a.abs().max().item())


@pytest.mark.parametrize(("costs", "most_passes", "most_padded"), [({"cpu": 64}, 40, 1.1), ({}, 6, 2.0)])
def test_parts_of_a_mixed_batch_are_few_and_padded_little(monkeypatch, costs, most_passes, most_padded):
    """Sentences and passages of 8,000 tokens; without an entry for its kind of device as on a GPU."""
    monkeypatch.setattr(student, "_PASS_TOKENS", costs)
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(5, 30, 260), *rng.integers(60, 257, 24)]
    mask = (torch.arange(256) < torch.tensor(lengths)[:, None]).long()
    shapes = []

    def model(features):
        shapes.append(features["attention_mask"].shape)
        return {"sentence_embedding": features["attention_mask"].sum(1, keepdim=True)}

    found = forward_in_parts(model, {"attention_mask": mask})["sentence_embedding"]
    assert found[:, 0].tolist() == lengths
    assert 1 < len(shapes) <= most_passes
    assert sum(rows * width for rows, width in shapes) < most_padded * sum(lengths) < mask.numel()


def test_ridge_is_the_closed_form_of_numpy():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 7)) * 5 + 2, rng.normal(size=(60, 3))
    weight, bias = ridge(torch.from_numpy(x), torch.from_numpy(y), 0.1)
    size = np.sqrt(((x - x.mean(0)) ** 2).mean())
    # Ordinary least squares over rows that stand for the penalty.
    a = np.concatenate([(x - x.mean(0)) / size, np.sqrt(0.1 * 60) * np.eye(7)])
    b = np.concatenate([y - y.mean(0), np.zeros((7, 3))])
    solution = np.linalg.lstsq(a, b, rcond=None)[0]
    expected = ((x - x.mean(0)) / size) @ solution + y.mean(0)
    assert np.abs((torch.from_numpy(x) @ weight.T + bias).numpy() - size * expected).max() < 1e-9


def test_the_head_starts_at_the_teacher_and_the_projection_at_the_mean(recipe, tmp_path):
    teacher = EmbedderTeacher("m", str(tmp_path / "t"))
    wanted = recipe(loss="similarity", teacher=teacher, head="training", project=True)
    model = build_model(wanted, device="cpu", head_size=5).eval()
    texts = [f"the {a} {b} sits on {c}" for a, b, c in zip(WORDS, WORDS[::-1], sorted(WORDS))] * 2
    pooled = SentenceTransformer(modules=list(model)[:2], device="cpu").encode(texts, convert_to_tensor=True)
    rotation = torch.randn(pooled.shape[1], 5, generator=torch.Generator().manual_seed(0))
    target = F.normalize((pooled - pooled.mean(0)) @ rotation, dim=-1)  # a teacher that is nearly linear in the student
    layers = list(model)[2:4]
    before = F.cosine_similarity(model(model.preprocess(texts))[HEAD], target).mean()
    start_layers(wanted, model, layers, texts, target)
    out = model(model.preprocess(texts))
    assert F.cosine_similarity(out[HEAD], target).mean() > 0.9 > before + 0.5
    centred = F.normalize(pooled - pooled.mean(0), dim=-1)
    assert torch.allclose(out["sentence_embedding"], centred, atol=1e-4)
    assert (F.normalize(pooled, dim=-1) - centred).abs().max() > 0.1


def test_a_projection_is_turned_to_principal_components(recipe):
    """Cosines stay; no other k dimensions keep more of the vectors than the first k, by numpy's SVD of them."""
    model = build_model(recipe(project=True), device="cpu").eval()
    with torch.no_grad():
        model[2].linear.weight.copy_(
            torch.randn(model[2].linear.weight.shape, generator=torch.Generator().manual_seed(1))
        )
    texts = [f"the {a} {b} sits on {c}" for a, b, c in zip(WORDS, WORDS[::-1], sorted(WORDS))] * 2
    before = model.encode(texts)
    shares = turn_to_components(model, texts)
    after = model.encode(texts)
    assert np.abs(after @ after.T - before @ before.T).max() < 1e-5
    assert np.abs(after - before).max() > 0.1
    singular = np.linalg.svd(before.astype(np.float64), compute_uv=False) ** 2 / len(before)
    assert np.abs(shares[: len(singular)].numpy() - singular).max() < 1e-6
    assert np.abs(np.square(after.astype(np.float64)).mean(0) - shares.numpy()).max() < 1e-6
    assert shares[:4].sum() > 2 * np.square(before[:, :4]).sum(1).mean()
    with pytest.raises(ValueError, match="need as many texts, got 3"):
        turn_to_components(model, texts[:3])


def test_a_model_starts_from_released_experts(recipe, base, tmp_path):
    """The same vectors as the checkpoint that `upcycle` makes of the folder."""
    first = train(recipe(project=True))
    folder = first.experts
    model = build_model(recipe(project=True, alpha=1), device="cpu").eval()  # another scaling of the adapter
    assert start_from(model, folder) == []
    released = UBMoE(str(first.checkpoint))
    assert np.abs(model.encode(TEXTS) - released.encode(TEXTS)).max() < 2e-3
    untrained = build_model(recipe(project=True), device="cpu").eval()
    assert np.abs(untrained.encode(TEXTS) - released.encode(TEXTS)).max() > 0.01
    rank = recipe().rank
    wider = build_model(recipe(project=True, rank=rank + 3), device="cpu").eval()
    start_from(wider, first.experts)
    assert np.abs(wider.encode(TEXTS) - model.encode(TEXTS)).max() < 1e-5
    assert any(p.shape[0] == rank + 3 and p[rank:].any() for n, p in wider.named_parameters() if "lora_A" in n)
    with pytest.raises(ValueError, match="same rank or a higher one"):
        start_from(build_model(recipe(rank=rank - 1), device="cpu"), folder)
    headed = build_model(recipe(head="output"), device="cpu", head_size=5)
    with pytest.raises(ValueError, match="change head or project"):
        start_from(headed, folder)
    (folder / "projection.safetensors").unlink()
    assert start_from(headed, folder) == [headed[2]]
    # A finished run: the layers of another phase are optional, the experts are not.
    assert start_from(build_model(recipe(project=True), device="cpu"), tmp_path / "run") == []
    plain = build_model(recipe(), device="cpu")
    assert start_from(plain, tmp_path / "run") == []
    with pytest.raises(ValueError, match="differ in what they train"):
        start_from(build_model(recipe(train="attention"), device="cpu"), tmp_path / "run")
