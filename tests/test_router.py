"""Stage 2 on tiny models: start at the base, answers-only loss, what trains, resume, generation."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.models import ARCHITECTURES, WORDS, make_checkpoint, make_tokenizer
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, TrainingArguments

from training.resume import trained_parameters
from training.router import (
    IGNORED,
    RouterRecipe,
    RouterTrainer,
    build_routed,
    encode_answer,
    main,
    pad_answers,
    train,
)
from ubmoe_st import UBMoE, upcycle
from ubmoe_st.experts import TokenRouter, load_low_rank, save_low_rank

IDS = torch.tensor([[4, 5, 6, 7, 20, 11], [9, 9, 4, 30, 2, 8]])


@pytest.fixture
def recipe(checkpoint, tmp_path):
    rows = [
        {"instruction": f"the {a} sits", "input": "on the mat" if n % 2 else "", "output": f"a {b} {a} runs"}
        for n, (a, b) in enumerate(zip(WORDS, WORDS[::-1]))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def make(**changes):
        trainer = {
            "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 5e-2, "use_cpu": True, "seed": 3,
            "logging_steps": 1, "save_strategy": "no", **changes.pop("trainer", {}),
        }  # fmt: skip
        values = {
            "checkpoint": str(checkpoint),
            "out": str(tmp_path / "out"),
            "instructions": [str(tmp_path / "rows.jsonl")],
            "held_out": 4,
        }
        return RouterRecipe(**{**values, **changes, "trainer": trainer})

    return make


@pytest.mark.parametrize("kind", ["soft", "top1"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_new_routers_equal_the_base_exactly_and_alone_take_gradients(base_of, checkpoint_of, architecture, kind):
    lm, base = build_routed(UBMoE(str(checkpoint_of(architecture))), kind)
    reference = AutoModelForCausalLM.from_pretrained(base_of(architecture)).eval()
    with torch.no_grad():
        expected = reference(IDS).logits
        assert torch.equal(lm(IDS).logits, expected)
        assert torch.equal(base(IDS).logits, expected)
    F.cross_entropy(lm(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    found = {name for name, p in lm.named_parameters() if p.grad is not None}
    assert all(".router." in name for name in found)
    assert len(found) == 3 * (3 if kind == "soft" else 2)
    assert max(p.grad.abs().max() for p in lm.parameters() if p.grad is not None) > 0


def test_labels_stand_on_the_answer_alone():
    tokenizer = make_tokenizer()
    row = encode_answer(tokenizer, "the cat", "a dog runs", 99)
    text = tokenizer.decode([t for t in row["labels"] if t != IGNORED])
    assert text.split() == ["a", "dog", "runs", "</s>"]
    assert tokenizer.decode(row["input_ids"]).split() == "user the cat </s> assistant a dog runs </s>".split()
    assert encode_answer(tokenizer, "the cat", "a dog runs", 5) is None
    assert len(encode_answer(tokenizer, "the cat", "a dog runs", 6)["input_ids"]) == 6
    batch = pad_answers([row, encode_answer(tokenizer, "the", "a", 99)])
    assert batch["attention_mask"].sum(1).tolist() == [9, 6]
    assert (batch["labels"][1, 6:] == IGNORED).all()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode_answer(tokenizer, "a", "b", 9)


def test_a_plain_format_stands_for_a_chat_template(recipe, checkpoint, tmp_path):
    """Without one, questions are asked in the recipe's words; a plain prompt of these words gives the same tokens."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    plain = "user {question} assistant  {answer}"
    row = encode_answer(tokenizer, "the cat", "a dog", 99, plain)
    assert tokenizer.decode(row["input_ids"]).split() == "user the cat assistant a dog </s>".split()
    assert row["labels"][4:] == row["input_ids"][4:]
    assert set(row["labels"][:4]) == {IGNORED}
    assert row["input_ids"][:4] == tokenizer("user the cat assistant")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    begun = encode_answer(tokenizer, "the cat", "a dog", 99, plain)
    assert begun["input_ids"] == [1, *row["input_ids"]]
    for wrong in (
        "{question}",
        "{answer} {question}",
        "{question} {answer} {answer}",
        "a {question} {question} {answer}",
    ):
        with pytest.raises(ValueError, match="once each"):
            recipe(plain_format=wrong)
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare)
    (bare / "chat_template.jinja").unlink()
    changes = {"checkpoint": str(bare), "trainer": {"max_steps": 1}}
    with pytest.raises(ValueError, match=r"--set 'plain_format=\"Question: \{question\}"):
        train(recipe(**changes))
    folder = train(recipe(**changes, plain_format=plain))
    routed = UBMoE(str(folder))
    assert routed.tokenizer.chat_template is None
    assert isinstance(routed.generate("user the cat sits assistant", routing="router", max_new_tokens=2), str)


def test_several_processes_are_refused_in_one_line(recipe, monkeypatch, tmp_path):
    """They would train unconnected, and write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="routers train in one process, got 2; start it without torchrun"):
        train(recipe())
    assert not (tmp_path / "out").exists()


def test_the_loss_is_its_formula(recipe, tmp_path):
    tokenizer = make_tokenizer()
    pairs = [("the cat", "a dog"), ("on", "a bird sits in the tree")]
    batch = pad_answers([encode_answer(tokenizer, *pair, 99) for pair in pairs])
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    values = {}
    for weights in ({}, {"kl": 0.5}, {"balance": 2.0}):
        wanted = recipe(**weights)
        lm, base = build_routed(UBMoE(wanted.checkpoint), "soft")
        with torch.no_grad():
            for name, parameter in lm.named_parameters():
                if ".router." in name:
                    parameter.normal_(0.4, 0.1, generator=torch.Generator().manual_seed(1))
        trainer = RouterTrainer(base, wanted, model=lm, args=args)
        values[next(iter(weights), "nll")] = trainer.compute_loss(lm, batch).item()
    with torch.no_grad():
        nll, kl, shares = [], [], []
        for pair in pairs:
            row = encode_answer(tokenizer, *pair, 99)
            trainer.weights.clear()
            ids = torch.tensor([row["input_ids"]])
            p, q = lm(ids).logits[0].log_softmax(-1), base(ids).logits[0].log_softmax(-1)
            for position, label in enumerate(row["labels"]):
                if label != IGNORED:
                    nll.append(-p[position - 1, label])
                    kl.append((q[position - 1].exp() * (q[position - 1] - p[position - 1])).sum())
            shares.append(torch.stack([w[0, :, 0] for w in trainer.weights]))
    share = torch.cat(shares, 1).mean(1)
    expected = torch.stack(nll).mean()
    assert values["nll"] == pytest.approx(expected.item(), abs=1e-4)
    assert values["kl"] == pytest.approx((expected + 0.5 * torch.stack(kl).mean()).item(), abs=1e-4)
    assert values["balance"] == pytest.approx((expected + 2 * ((share - 0.5) ** 2).mean()).item(), abs=1e-4)
    assert len({round(value, 4) for value in values.values()}) == 3


@pytest.mark.parametrize("template_says_it", [True, False])
def test_a_chat_begins_as_the_template_says_also_where_the_tokenizer_puts_a_start_token(template_says_it):
    """In front of a chat stands what `apply_chat_template` puts there: its own start token, never two."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer("the cat")["input_ids"][0] == 1
    if template_says_it:
        tokenizer.chat_template = "{{ bos_token }} " + tokenizer.chat_template
    found = encode_answer(tokenizer, "the cat", "sits on", 99)
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sits on"}]
    expected = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert found["input_ids"] == expected
    assert (found["input_ids"].count(1) == 1) is template_says_it


@pytest.mark.parametrize("kind", ["soft", "top1"])
def test_trained_routers_learn_and_generate(recipe, base, checkpoint, tmp_path, kind):
    out = train(recipe(kind=kind, trainer={"max_steps": 25, "learning_rate": 0.2}))
    summary = json.loads((tmp_path / "out" / "router.json").read_text())
    losses = summary["held_out_loss"]
    if kind == "soft":
        assert losses["trained"] < losses["routers_at_start"]
    model, plain = UBMoE(str(out)), UBMoE(str(checkpoint))
    assert model.ubmoe_config.router == kind
    assert model.generate("the cat", max_new_tokens=5) == plain.generate("the cat", max_new_tokens=5)
    text = model.generate(["the cat", "a red bird sleeps"], max_new_tokens=5, routing="router")
    assert len(text) == 2
    with torch.inference_mode():
        uni, mixed = model.generator(IDS).logits, model.generator_for("router")(IDS).logits
    if kind == "soft":
        assert (uni - mixed).abs().max() > 1e-3
    assert (model.encode("the cat") == plain.encode("the cat")).all()
    again = upcycle(base, checkpoint, out=tmp_path / "up", routers=tmp_path / "out" / "routers.safetensors")
    assert UBMoE(str(again)).ubmoe_config.router == kind
    experts = tmp_path / "experts"
    experts.mkdir()
    shutil.copy(checkpoint / "generator" / "bi_delta.safetensors", experts)
    shutil.copy(tmp_path / "out" / "routers.safetensors", experts)
    assert UBMoE(str(upcycle(base, experts, out=tmp_path / "both"))).ubmoe_config.router == kind
    # In fewer bits they are the same experts, and a little trained they are others.
    low_rank, metadata = load_low_rank(experts / "bi_delta.safetensors")
    assert low_rank["layers.0.mlp.up_proj"][0].dtype == torch.float32
    rounded = {name: (a.bfloat16(), b.bfloat16()) for name, (a, b) in low_rank.items()}
    save_low_rank(rounded, experts / "bi_delta.safetensors", metadata)
    assert UBMoE(str(upcycle(base, experts, out=tmp_path / "rounded"))).ubmoe_config.router == kind
    low_rank["layers.1.mlp.up_proj"][1].mul_(1.01)
    save_low_rank(low_rank, experts / "bi_delta.safetensors", metadata)
    with pytest.raises(ValueError, match=r"routers\.safetensors was trained to mix other experts than these"):
        upcycle(base, experts, out=tmp_path / "odd")
    with pytest.raises(ValueError, match="no token routers"):
        upcycle(base, out=tmp_path / "odd", routers=checkpoint / "model-bi.safetensors")
    assert not (tmp_path / "odd").exists()
    with torch.inference_mode():
        assert torch.allclose(UBMoE(str(again)).generator_for("router")(IDS).logits, mixed, atol=1e-5)


def test_the_weights_of_a_run_are_those_of_all_held_out_tokens(recipe, checkpoint, tmp_path, monkeypatch):
    """Against the released routers, one answer at a time and without padding; 7 answers in batches of 4."""
    held = []
    original = RouterTrainer.__init__

    def spy(self, *args, **kwargs):
        held[:] = [kwargs["eval_dataset"], kwargs["train_dataset"]]
        original(self, *args, **kwargs)

    monkeypatch.setattr(RouterTrainer, "__init__", spy)
    settings = {"learning_rate": 0.3, "max_steps": 9, "per_device_eval_batch_size": 4}
    out = train(recipe(held_out=7, count=5, max_tokens=30, trainer=settings))
    assert [len(rows) for rows in held] == [7, 5]
    routed = UBMoE(str(out)).generator_for("router")
    seen = []
    for module in routed.modules():
        if isinstance(module, TokenRouter):
            module.register_forward_hook(lambda router, _, weight: seen.append(weight[0, :, 0]))
    with torch.inference_mode():
        for row in held[0]:
            routed(torch.tensor([row["input_ids"]]))
    layers = len(seen) // 7
    expected = [float(torch.cat(seen[layer::layers]).mean()) for layer in range(layers)]
    found = json.loads((tmp_path / "out" / "router.json").read_text())["bi_weight_by_layer"]
    assert found == pytest.approx(expected, abs=2e-3)
    assert max(abs(weight) for weight in expected) > 0.05
    train(recipe(held_out=0, out=str(tmp_path / "none"), trainer={"max_steps": 1}))
    assert json.loads((tmp_path / "none" / "router.json").read_text())["bi_weight_by_layer"] is None


def test_answers_that_leave_nothing_do_not_count(recipe, tmp_path, monkeypatch):
    """Long questions fill `max_tokens`: others are taken for them, as far as there are some."""
    rows = [{"instruction": "the cat " * (40 if n % 2 else 1), "output": "a red bird"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    counts = []
    original = RouterTrainer.__init__

    def spy(self, *args, **kwargs):
        counts.append((len(kwargs["eval_dataset"]), len(kwargs["train_dataset"])))
        original(self, *args, **kwargs)

    monkeypatch.setattr(RouterTrainer, "__init__", spy)
    train(recipe(count=12, max_tokens=30, trainer={"max_steps": 1}))
    assert counts == [(4, 12)]


def test_dense_experts_can_be_routed_too(recipe, base, tmp_path):
    dense = make_checkpoint(base, tmp_path / "dense", low_rank=False)
    model = UBMoE(str(dense))
    with torch.no_grad():
        for name, parameter in model[0].model.named_parameters():
            if ".mlp." in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    model.save(str(tmp_path / "trained"))
    out = train(recipe(checkpoint=str(tmp_path / "trained")))
    with torch.inference_mode():
        found = UBMoE(str(out))
        assert (found.generator(IDS).logits - found.generator_for("router")(IDS).logits).abs().max() > 1e-4


def test_a_resumed_run_equals_an_uninterrupted_one(recipe, tmp_path, monkeypatch):
    steps = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "lr_scheduler_type": "constant"}
    kept = []
    original = RouterTrainer.compute_loss
    limit = [99]

    def spy(self, *args, **kwargs):
        if self.state.global_step >= limit[0]:
            raise KeyboardInterrupt
        kept.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RouterTrainer, "compute_loss", spy)
    train(recipe(out=str(tmp_path / "whole"), trainer=steps))
    whole = trained_parameters(kept[-1].model)
    limit[0] = 5
    with pytest.raises(KeyboardInterrupt):
        train(recipe(out=str(tmp_path / "broken"), trainer=steps))
    limit[0] = 99
    train(recipe(out=str(tmp_path / "broken"), trainer=steps))
    again = trained_parameters(kept[-1].model)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert max(t.abs().max() for n, t in whole.items() if "strength" in n) > 1e-3


def test_a_run_does_not_go_on_over_other_experts(recipe, base, tmp_path):
    """The recipe names a folder, and another checkpoint may lie there when the run goes on."""
    folder = make_checkpoint(base, tmp_path / "model")
    given = {"checkpoint": str(folder), "trainer": {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}}
    train(recipe(**given))
    train(recipe(**given))
    model = UBMoE(str(folder))
    low_rank = {name: (a, b * 1.01) for name, (a, b) in model[0].source.low_rank().items()}
    model[0].set_low_rank_experts(low_rank)
    model.save(str(folder))
    with pytest.raises(ValueError, match="holds a run over other weights"):
        train(recipe(**given))


def test_the_command_line_runs_the_smoke_recipe(recipe, tmp_path):
    given = recipe()
    main(["training/recipes/router-smoke.yaml", "--set", f"checkpoint={given.checkpoint}", "--set", f"out={given.out}",
          "--set", f"instructions={given.instructions}", "--set", "trainer.max_steps=1",
          "--set", "trainer.use_cpu=true"])  # fmt: skip
    assert UBMoE(given.out + "/model").ubmoe_config.router == "soft"


def test_wrong_recipes_are_refused(recipe):
    with pytest.raises(ValueError, match="soft, top1"):
        recipe(kind="hard")
    with pytest.raises(ValueError, match="negative"):
        recipe(kl=-1)
    with pytest.raises(ValueError, match="held out"):
        train(recipe(held_out=500))
