"""Stage 1 on tiny models: noise, gradients, resume, sampler, recipes, export."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import TEXTS, WORDS, make_tokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, TrainingArguments

pytest.importorskip("peft")

from training import contrastive
from training.contrastive import (
    HEAD,
    ContrastiveRecipe,
    DistillationLoss,
    DistillationWeights,
    build_loss,
    build_model,
    causal_model,
    main,
    train,
    trained_state,
)
from training.data import Mixture, read_sentences, sts_pairs
from training.teacher import Teacher
from training.teacher import main as teacher_vectors_main
from training.trainers import (
    LengthBuckets,
    TokenBudget,
    arguments_of,
    check_same_recipe,
    checkpoint_to_resume,
    read_recipe,
    trained_parameters,
)
from ubmoe_st import UBMoE
from ubmoe_st.bases import resolve_base

RECIPES = Path(__file__).parent.parent / "training" / "recipes"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder: 60 sentences and a development set."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = [w for w in WORDS if w not in ("user", "assistant")]
    lines = [" ".join(rng.choice(words, rng.integers(4, 12))) for _ in range(60)]
    (folder / "sentences.txt").write_text("\n".join(lines) + "\n")
    (folder / "eval" / "sts").mkdir(parents=True)
    rows = [f"{number % 6}\t{a}\t{b}\tx" for number, (a, b) in enumerate(zip(lines[:20], lines[20:40]))]
    (folder / "eval" / "sts" / "STSB-dev.tsv").write_text("score\ts1\ts2\tgenre\n" + "\n".join(rows) + "\n")
    return folder


@pytest.fixture
def recipe(base, data, tmp_path, monkeypatch):
    monkeypatch.setenv("UBMOE_DATA", str(data))

    def make(**changes):
        trainer = {
            "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True, "seed": 3,
            "logging_steps": 1, "save_strategy": "no", **changes.pop("trainer", {}),
        }  # fmt: skip
        values = {
            "base": str(base),
            "out": str(tmp_path / "run"),
            "rank": 2,
            "ffn_dropout": 0.2,
            "sentences": Mixture({str(data / "sentences.txt"): 1.0}, words=(1, 30)),
        }
        return ContrastiveRecipe(**{**values, **changes, "trainer": trainer})

    return make


@pytest.fixture
def teacher(tmp_path):
    return Teacher(
        prefix="the cat sits on the ", suffix=" in the", layers=[1, 2, 3], folder=str(tmp_path / "t"), dimension=16
    )


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


def test_a_recipe_without_noise_is_refused(recipe):
    with pytest.raises(ValueError, match="nothing to learn"):
        recipe(ffn_dropout=0.0)


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


@pytest.mark.parametrize(
    ("loss", "batches"),
    [
        ("MultipleNegativesRankingLoss", {}),
        ("distillation", {}),
        ("distillation", {"batch_tokens": 72, "rough": 0.5}),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(recipe, teacher, tmp_path, loss, batches):
    """Same batches, same dropout, same weights, also over the border of an epoch."""
    extra = {"ffn_dropout": 0.2, **batches}
    if loss == "distillation":
        extra |= {"loss": loss, "teacher": teacher, "head": "training"}
    seen: dict[str, list] = {}

    def run(name, steps):
        import training.contrastive as stage

        texts = seen.setdefault(name, [])
        wanted = recipe(
            loss=extra.get("loss", loss),
            out=str(tmp_path / name.split("-")[0]),
            **{k: v for k, v in extra.items() if k != "loss"},
            trainer={"max_steps": 12, "save_strategy": "steps", "save_steps": 5, "lr_scheduler_type": "constant"},
        )
        original = stage.ContrastiveTrainer.compute_loss

        class Stop(Exception):
            pass

        def spy(self, model, inputs, *args, **kwargs):
            if self.state.global_step >= steps:
                raise Stop
            texts.append(inputs["anchor_input_ids"].clone())
            return original(self, model, inputs, *args, **kwargs)

        stage.ContrastiveTrainer.compute_loss = spy
        try:
            return stage.train(wanted, export=False)
        except Stop:
            return None
        finally:
            stage.ContrastiveTrainer.compute_loss = original

    whole = run("whole", 99)
    assert run("broken-1", 9) is None
    again = run("broken-2", 99)
    assert len(seen["whole"]) == 12
    assert len(seen["broken-2"]) == 12 - 5  # from the checkpoint of step 5
    assert all(torch.equal(a, b) for a, b in zip(seen["whole"][5:], seen["broken-2"], strict=True))
    assert not any(torch.equal(seen["whole"][0], later) for later in seen["whole"][7:])  # epochs (of 7 batches) differ
    assert whole.trainer.tokens == again.trainer.tokens > 0
    assert again.trainer.seconds > 0
    first, second = trained_parameters(whole.model), trained_parameters(again.model)
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert max(t.abs().max() for n, t in first.items() if "lora_B" in n) > 1e-3


def test_a_run_starts_from_another(recipe, tmp_path):
    first = train(recipe(out=str(tmp_path / "first")), export=False)
    still = {"max_steps": 1, "learning_rate": 0.0}
    again = train(recipe(out=str(tmp_path / "again"), init_from=str(tmp_path / "first"), trainer=still), export=False)
    apart = train(recipe(out=str(tmp_path / "apart"), trainer=still), export=False)
    wanted, found, other = (trained_parameters(run.model) for run in (first, again, apart))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert not all(torch.equal(wanted[name], other[name]) for name in wanted)
    with pytest.raises(FileNotFoundError, match="run that recipe first"):
        train(recipe(out=str(tmp_path / "none"), init_from=str(tmp_path / "missing")), export=False)
    with pytest.raises(ValueError, match="same rank"):
        train(recipe(out=str(tmp_path / "wide"), rank=3, init_from=str(tmp_path / "first")), export=False)


def test_another_recipe_is_refused_where_something_was_trained(recipe, tmp_path):
    check_same_recipe(recipe(rank=4), tmp_path)
    check_same_recipe(recipe(), tmp_path)  # the first one trained nothing
    (tmp_path / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    check_same_recipe(recipe(trainer={"max_steps": 9}), tmp_path)
    with pytest.raises(ValueError, match="another 'rank'"):
        check_same_recipe(recipe(rank=4), tmp_path)
    with pytest.raises(ValueError, match=r"another 'trainer\.seed'"):
        check_same_recipe(recipe(trainer={"seed": 9}), tmp_path)


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path):
    for step, state in ((2, "{}"), (10, "{}"), (12, '{"epo'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trained.safetensors").touch()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    arguments = arguments_of(TrainingArguments, {"output_dir": str(tmp_path)})
    assert checkpoint_to_resume(arguments) == str(tmp_path / "checkpoint-10")
    arguments.resume_from_checkpoint = str(tmp_path / "checkpoint-2")
    assert checkpoint_to_resume(arguments) == str(tmp_path / "checkpoint-2")
    arguments.resume_from_checkpoint = str(tmp_path / "checkpoint-14")
    with pytest.raises(FileNotFoundError, match="complete checkpoint"):
        checkpoint_to_resume(arguments)
    with pytest.raises(ValueError, match="learning_rat"):
        arguments_of(TrainingArguments, {"learning_rat": 1})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: here\nout: there\npooling: meen\n", "pooling must be one of"),
        ("base: here\nout: there\nhead: outputt\n", "head must be one of training, output"),
        ("- base\n", "expected `key: value` lines"),
        ("base: [\n", "error: "),
        (None, "No such file"),
    ],
)
def test_a_bad_recipe_is_one_line(tmp_path, capsys, text, said):
    file = tmp_path / "recipe.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as ended:
        contrastive.main([str(file)])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_buckets_hold_every_row_once_in_full_batches_of_similar_length():
    from datasets import Dataset

    texts = ["x" * (1 + (7 * n) % 50) for n in range(103)]
    sampler = LengthBuckets(Dataset.from_dict({"anchor": texts}), 4, False, seed=1)
    batches = list(sampler)
    rows = [row for batch in batches for row in batch]
    assert len(batches) == len(sampler) == 25
    assert all(len(batch) == 4 for batch in batches)
    assert len(set(rows)) == 100
    spread = np.mean([np.ptp([len(texts[r]) for r in batch]) for batch in batches])
    assert spread < 8 < np.ptp([len(t) for t in texts])
    assert batches == list(sampler)
    sampler.set_epoch(1)
    assert batches != list(sampler)


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


def test_distillation_trains_and_is_released(recipe, teacher, tmp_path):
    wanted = recipe(
        loss="distillation", teacher=teacher, head="output", ffn_dropout=0.0, prompt="the ", early_stopping_patience=9,
        trainer={"max_steps": 40, "eval_strategy": "steps", "eval_steps": 20, "save_strategy": "steps",
                 "save_steps": 20},
    )  # fmt: skip
    run = train(wanted)
    losses = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    summary = json.loads((tmp_path / "run" / "training.json").read_text())
    assert len(summary["curve"]) == 2
    assert summary["best"] == max(entry["eval_STSB-dev_spearman_cosine"] for entry in summary["curve"])
    assert summary["tokens_per_second_and_process"] > 0
    assert json.loads((run.experts / "recipe.json").read_text())["training"] == "self-distilled"
    released = UBMoE(str(run.checkpoint))
    stock = SentenceTransformer(str(run.checkpoint))
    expected = run.model.eval().encode(TEXTS)
    assert expected.shape == (len(TEXTS), 16)
    # The experts are stored in 16 bit.
    assert np.abs(released.encode(TEXTS) - expected).max() < 5e-3
    assert np.abs(stock.encode(TEXTS) - expected).max() < 5e-3
    assert np.abs(stock.encode(TEXTS, prompt="") - expected).max() > 1e-2
    start = build_model(wanted, device="cpu").eval().encode(TEXTS)
    assert np.abs(start - expected).max() > 1e-2


def test_dense_experts_are_released_and_the_generator_is_the_base(recipe, base):
    run = train(recipe(rank=None))
    released = UBMoE(str(run.checkpoint))
    assert np.abs(released.encode(TEXTS) - run.model.eval().encode(TEXTS)).max() < 1e-5
    ids = torch.tensor([[4, 5, 6, 7]])
    reference = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.inference_mode():
        assert torch.equal(released.generator(ids).logits, reference(ids).logits)
        assert not torch.equal(released.generator_for("bi")(ids).logits, reference(ids).logits)


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


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "CachedMultipleNegativesRankingLoss", "mini_batch_size": 3},
        {"matryoshka_dims": [32, 8]},
        {"trainer": {"gradient_checkpointing": True}},
        {"pooling": "lasttoken"},
        {"batch_tokens": 60},
        {"length_buckets": False, "trainer": {"batch_sampler": "no_duplicates"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_each_option_trains(recipe, changes):
    run = train(recipe(**changes), export=False)
    assert run.trainer.state.global_step == 4
    assert max(t.abs().max() for n, t in trained_parameters(run.model).items() if "lora_B" in n) > 1e-3


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


def test_supervised_triplets_from_a_file(recipe, tmp_path):
    rows = [{"anchor": f"{a} cat", "positive": f"{a} dog", "negative": f"{a} tree"} for a in WORDS]
    (tmp_path / "triplets.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = ["anchor", "positive", "negative"]
    run = train(recipe(sentences=None, pairs=str(tmp_path / "triplets.jsonl"), columns=columns, ffn_dropout=0.0))
    assert run.checkpoint is not None
    with pytest.raises(ValueError, match="expected the columns"):
        train(
            recipe(sentences=None, pairs=str(tmp_path / "triplets.jsonl"), columns=["a"], out=str(tmp_path / "other"))
        )


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_recipes_are_valid(file):
    from training.router import RouterRecipe

    if "checkpoint" in file.read_text():
        assert read_recipe(RouterRecipe, file).kind == "soft"
        return
    found = read_recipe(ContrastiveRecipe, file, ["trainer.max_steps=7", "train=ffn"])
    assert found.trainer["max_steps"] == 7
    assert found.sentences is None or isinstance(found.sentences, Mixture)


def test_wrong_recipes_are_refused(tmp_path, recipe):
    (tmp_path / "r.yaml").write_text("base: b\nout: o\nsentences: {files: {}}\nffn_dropout: 0.1\n")
    assert read_recipe(ContrastiveRecipe, tmp_path / "r.yaml").rank == 16
    changed = read_recipe(ContrastiveRecipe, tmp_path / "r.yaml", ["trainer.learning_rate=1e-3"])
    assert changed.trainer["learning_rate"] == 0.001
    with pytest.raises(ValueError, match="unknown key 'learning_rat'"):
        read_recipe(ContrastiveRecipe, tmp_path / "r.yaml", ["learning_rat=3"])
    with pytest.raises(ValueError, match="sentences: unknown key 'coun'"):
        read_recipe(ContrastiveRecipe, tmp_path / "r.yaml", ["sentences.coun=3"])
    with pytest.raises(ValueError, match="key=value"):
        read_recipe(ContrastiveRecipe, tmp_path / "r.yaml", ["rank"])
    with pytest.raises(ValueError, match="train must be one of"):
        recipe(train="mlp")
    with pytest.raises(ValueError, match="teacher"):
        recipe(loss="distillation")


def test_sentences_are_drawn_by_seed(data):
    mixture = Mixture({str(data / "sentences.txt"): 0.5}, count=60, words=(5, 9))
    drawn = read_sentences(mixture)
    assert drawn == read_sentences(mixture)
    assert drawn != read_sentences(Mixture(**{**mixture.__dict__, "seed": 1}))
    assert 5 < len(drawn) <= 30
    assert all(5 <= len(line.split()) <= 9 for line in drawn)
    with pytest.raises(ValueError, match="development sets only"):
        sts_pairs("STSB-test", data)
    assert len(sts_pairs("STSB-dev", data, 7)[2]) == 7


def test_the_command_line_runs_a_recipe(base, data, tmp_path, monkeypatch):
    monkeypatch.setenv("UBMOE_DATA", str(data))
    main(
        [str(RECIPES / "unsup.yaml"), "--set", f"base={base}", "--set", f"out={tmp_path / 'run'}", "--set", "rank=2",
         "--set", f"sentences.files={{{data / 'sentences.txt'}: 1.0}}", "--set", "trainer.max_steps=2",
         "--set", "trainer.per_device_train_batch_size=8", "--set", "trainer.use_cpu=true",
         "--set", "trainer.eval_steps=2", "--set", "trainer.save_steps=2"]
    )  # fmt: skip
    assert UBMoE(str(tmp_path / "run" / "model")).encode("the cat").shape == (32,)


def test_rough_inputs_change_some_texts_and_no_words():
    from training.contrastive import RoughCollator, roughen

    assert [roughen("The Cat sits.", lower) for lower in (False, True)] == ["the Cat sits", "the cat sits"]
    assert roughen("...", True) == "..."
    texts = [f"{text} {number}." for number in range(50) for text in ("The cat sits", "A red Bird")]
    collator = RoughCollator(preprocess_fn=lambda rows, **_: {"texts": rows}, share=0.5, seed=1)

    def read():
        batch = collator([{"anchor": text, "label": number} for number, text in enumerate(texts)])
        assert batch["label"].tolist() == list(range(100))
        return batch["anchor_texts"]

    first = read()
    assert first == read()
    assert 30 < sum(a != b for a, b in zip(texts, first, strict=True)) < 70
    assert all(b.lower() == a.lower().rstrip(".") or a == b for a, b in zip(texts, first, strict=True))
    collator.set_epoch(1)
    assert 20 < sum(a != b for a, b in zip(first, read(), strict=True)) < 80
    collator.share = 0
    assert read() == texts


def test_a_token_budget_fills_batches_and_keeps_their_number():
    from datasets import Dataset

    rng = np.random.default_rng(0)
    lengths = [*rng.integers(4, 40, 500).tolist(), 300]
    sampler = TokenBudget(Dataset.from_dict({"anchor": ["x"] * 501}), lengths, 200, seed=1)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert batches == list(sampler)
        assert len(batches) == len(sampler)
        assert sorted(row for batch in batches for row in batch) == list(range(501))
        costs = [max(lengths[row] for row in batch) * len(batch) for batch in batches]
        assert sorted(costs)[-2] <= 200 < sorted(costs)[-1] == 300
        assert np.mean(costs) > 170
        assert sum(costs) < 1.05 * sum(lengths)
        epochs.append({tuple(sorted(batch)) for batch in batches})
    assert len(epochs[0] & epochs[1]) < len(epochs[0]) / 4
    with pytest.raises(ValueError, match="batch_tokens"):
        TokenBudget(Dataset.from_dict({"anchor": []}), [], 200)


def test_two_processes_share_the_batches_and_agree(base, data, tmp_path):
    """torchrun on a CPU: every process trains on its own half of the batches, with averaged gradients."""
    script = tmp_path / "both.py"
    script.write_text(
        "import sys, torch, training.contrastive as stage\n"
        "seen = []\n"
        "original = stage.ContrastiveTrainer.compute_loss\n"
        "def spy(self, model, inputs, *args, **kwargs):\n"
        "    seen.append(inputs['label'].tolist())\n"
        "    return original(self, model, inputs, *args, **kwargs)\n"
        "stage.ContrastiveTrainer.compute_loss = spy\n"
        "recipe = stage.read_recipe(stage.ContrastiveRecipe, sys.argv[1])\n"
        "run = stage.train(recipe, export=False)\n"
        "file = sys.argv[2] + str(torch.distributed.get_rank())\n"
        "torch.save((seen, stage.trained_parameters(run.model), run.trainer.args.world_size), file)\n"
    )
    recipe_file = tmp_path / "recipe.json"
    teacher = {"prefix": "the ", "suffix": " is", "layers": [1, 3], "dimension": 8, "folder": str(tmp_path / "teacher")}
    recipe_file.write_text(
        json.dumps(
            {"base": str(base), "out": str(tmp_path / "run"),
             "sentences": {"files": {str(data / "sentences.txt"): 1.0}}, "rank": 2, "loss": "distillation",
             "head": "training", "teacher": teacher, "evaluate": {},
             "batch_tokens": 40, "trainer": {"max_steps": 4, "learning_rate": 0.01, "save_strategy": "no"}}
        )
    )  # fmt: skip
    teacher_vectors_main([str(recipe_file)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
         str(script), str(recipe_file), str(tmp_path / "rank")],
        check=True, env=environment, capture_output=True, timeout=300,
    )  # fmt: skip
    (seen, first, size), (other, second, _) = (torch.load(tmp_path / f"rank{rank}") for rank in range(2))
    assert size == 2
    assert len(seen) == len(other) == 4
    assert not {row for batch in seen for row in batch} & {row for batch in other for row in batch}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert max(t.abs().max() for name, t in first.items() if "lora_B" in name) > 1e-3
    assert json.loads((tmp_path / "run" / "training.json").read_text())["processes"] == 2


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
