"""Going on: interrupted runs, runs that start from another, checkpoints that were not finished."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

pytest.importorskip("peft")

from helpers.training import make_recipe, make_teacher, make_training_data

from training.command import arguments_of, check_same_recipe
from training.contrastive import train
from training.recipe import Groups
from training.resume import checkpoint_to_resume, save_trained, trained_parameters

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


@pytest.mark.parametrize(
    ("loss", "batches"),
    [
        ("MultipleNegativesRankingLoss", {}),
        ("distillation", {}),
        ("distillation", {"batch_tokens": 72, "rough": 0.5}),
        ("similarity", {"batch_tokens": 72, "project": True, "groups": Groups(neighbours=3, largest=3)}),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(recipe, teacher, tmp_path, loss, batches):
    """Same batches, same dropout, same weights, also over the border of an epoch."""
    extra = {"ffn_dropout": 0.2, **batches}
    if loss != "MultipleNegativesRankingLoss":
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


def test_what_a_run_writes_beside_its_checkpoints_is_replaced_whole(recipe, tmp_path, monkeypatch):
    """A run that is killed while it starts or ends leaves no half recipe and no half weights."""
    out = tmp_path / "run"
    check_same_recipe(recipe(), out)
    save_trained(torch.nn.Linear(2, 2), out)
    before = [(out / name).read_bytes() for name in ("recipe.json", "trained.safetensors")]

    def killed(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    changes = (
        lambda: check_same_recipe(recipe(save_minutes=3.0), out),
        lambda: save_trained(torch.nn.Linear(3, 3), out),
    )
    for write in changes:
        with pytest.raises(KeyboardInterrupt):
            write()
    assert [(out / name).read_bytes() for name in ("recipe.json", "trained.safetensors")] == before


def test_a_checkpoint_comes_by_the_clock(recipe, tmp_path, monkeypatch):
    """At most ten minutes are lost, whatever `save_strategy` says."""
    import training.resume as stage

    now = [0.0]
    monkeypatch.setattr(stage.SaveByTime.__init__, "__defaults__", (lambda: now[0],))
    original = stage.SaveByTime.on_step_end

    def step(self, *args, **kwargs):
        now[0] += 200
        original(self, *args, **kwargs)

    monkeypatch.setattr(stage.SaveByTime, "on_step_end", step)
    assert recipe().save_minutes <= 10
    train(recipe(trainer={"max_steps": 8}), export=False)
    saved = sorted(int(path.name[11:]) for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert saved == [3, 6]  # 8 minutes are three steps of 200 seconds
    now[0] = 0.0
    train(recipe(out=str(tmp_path / "never"), save_minutes=None, trainer={"max_steps": 4}), export=False)
    assert not list((tmp_path / "never" / "checkpoints").glob("checkpoint-*"))


def test_a_constant_rate_then_a_decay(recipe):
    schedule = {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 4, "decay_type": "linear"},
        "warmup_steps": 2,
        "max_steps": 10,
    }
    run = train(recipe(trainer=schedule), export=False)
    rates = [entry["learning_rate"] for entry in run.trainer.state.log_history if "learning_rate" in entry]
    assert rates[:7] == pytest.approx([0, 5e-3, *[1e-2] * 5])
    assert rates[7:] == pytest.approx([7.5e-3, 5e-3, 2.5e-3])
