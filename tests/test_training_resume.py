"""Going on: interrupted runs, runs that start from another, checkpoints that were not finished."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import traceback
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

pytest.importorskip("peft")

from helpers.training import make_recipe, make_teacher, make_training_data

from training import contrastive
from training.command import arguments_of, check_same_recipe
from training.contrastive import train
from training.mixtures import Groups, Mixture
from training.resume import checkpoint_to_resume, keep_steps, save_trained, trained_parameters
from training.teacher import teacher_vectors
from training.texts import read_corpus

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


def test_a_run_that_stopped_early_has_stopped(recipe, monkeypatch):
    """At a rate of 0 no evaluation is better than the first: with a patience of 2 the third step is the last one."""
    steps = []
    original = contrastive.ContrastiveTrainer.training_step

    def counted(self, *args, **kwargs):
        steps.append(self.state.global_step + 1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(contrastive.ContrastiveTrainer, "training_step", counted)

    def run(most):
        saved = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        train(recipe(early_stopping_patience=2, trainer={"max_steps": most, "learning_rate": 0.0, **saved}))
        done = steps.copy()
        steps.clear()
        return done

    assert run(2) == [1, 2]
    assert run(2) == []
    assert run(9) == [3]
    assert run(9) == []


@pytest.mark.parametrize(
    ("loss", "batches"),
    [
        ("MultipleNegativesRankingLoss", {}),
        ("distillation", {}),
        ("distillation", {"batch_tokens": 72, "rough": 0.5}),
        ("MultipleNegativesRankingLoss", {"shuffle_buffer": 20}),
        ("MultipleNegativesRankingLoss", {"shuffle_buffer": 5, "passes": True}),
        ("similarity", {"batch_tokens": 72, "project": True, "groups": Groups(neighbours=3, largest=3)}),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(recipe, data, teacher, tmp_path, loss, batches):
    """Same batches, same dropout, same weights, also over the border of an epoch."""
    extra = {"ffn_dropout": 0.2, **batches}
    if "shuffle_buffer" in batches:
        lines = (data / "sentences.txt").read_text().splitlines()
        if extra.pop("passes", False):  # all of them are read before the checkpoint, and twice more after it
            lines = lines[:26]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"anchor": a, "positive": a}) + "\n" for a in lines))
        extra |= {"sentences": None, "pairs": str(tmp_path / "pairs.jsonl")}
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


def in_processes(count, work):
    """Run work in so many connected processes, forked, so that nothing is imported again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    children = []

    def begin(rank):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                torch.set_num_threads(1)
                if count > 1:
                    os.environ |= {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                PartialState._reset_state()
                AcceleratorState._reset_state(True)
                work()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)

    for rank in range(count):
        # From a thread of its own: OpenMP's helpers belong to the thread that used them, and a child waits for ever for
        # those that it did not inherit.
        thread = threading.Thread(target=begin, args=(rank,))
        thread.start()
        thread.join()
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * count


@pytest.mark.parametrize(("begun", "now"), [(2, 1), (1, 2)])
def test_a_run_goes_on_in_fewer_and_in_more_processes(recipe, teacher, tmp_path, begun, now):
    """Each step has the batches of before, two in all, so it ends at the same parameters, but for rounding."""

    def run(out, steps, seen=None):
        trainer = {
            "max_steps": steps, "save_strategy": "steps", "save_steps": 5, "lr_scheduler_type": "constant",
            "learning_rate": 1e-3, "gradient_accumulation_steps": 2 // begun, "per_device_train_batch_size": 10,
        }  # fmt: skip
        parts = {"loss": "distillation", "teacher": teacher, "head": "training", "ffn_dropout": 0.0}

        def work():
            batches = []
            original = contrastive.ContrastiveTrainer.compute_loss

            def spy(self, model, inputs, *args, **kwargs):
                batches.append((self.state.global_step, inputs["label"].tolist()))
                return original(self, model, inputs, *args, **kwargs)

            contrastive.ContrastiveTrainer.compute_loss = spy
            train(recipe(out=str(tmp_path / out), trainer=trainer, **parts), export=False)
            (tmp_path / f"{out}-{steps}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(batches))

        return work

    def batches(*names):
        found = {}
        for name in names:
            for step, rows in json.loads((tmp_path / f"{name}.json").read_text()):
                found.setdefault(step, []).append(rows)
        return {step: sorted(rows) for step, rows in found.items()}

    in_processes(1, lambda: teacher_vectors(recipe().base, teacher, read_corpus(recipe()).texts))
    in_processes(begun, run("whole", 8))
    in_processes(begun, run("changed", 5))
    in_processes(now, run("changed", 8))
    expected = batches(*(f"whole-8-{rank}" for rank in range(begun)))
    found = batches(*(f"changed-8-{rank}" for rank in range(now)))
    assert found == {step: rows for step, rows in expected.items() if step >= 5}
    assert [len(rows) for rows in expected.values()] == [2] * 8
    whole, changed = (load_file(tmp_path / name / "trained.safetensors") for name in ("whole", "changed"))
    for name, tensor in whole.items():
        assert (tensor - changed[name]).norm() <= 1e-4 * tensor.norm(), name
    start = load_file(tmp_path / "changed" / "checkpoints" / "checkpoint-5" / "trained.safetensors")
    assert max((tensor - start[name]).norm() / tensor.norm() for name, tensor in whole.items()) > 1e-2
    spent = [json.loads((tmp_path / name / "training.json").read_text())["tokens"] for name in ("whole", "changed")]
    assert spent[1] == pytest.approx(begun / now * spent[0], rel=0.2)  # of one process


def test_processes_that_cannot_share_the_batches_are_refused(tmp_path):
    (tmp_path / "processes.json").write_text('{"begun": 4, "processes": 2}')

    class Arguments:
        gradient_accumulation_steps = 3
        world_size = 3

    with pytest.raises(ValueError, match="go on with 1, 2, 4 processes, or start another run"):
        keep_steps(Arguments, str(tmp_path), streamed=True)
    Arguments.world_size = 5
    with pytest.raises(ValueError, match=r"read 12 batches a step.*go on with 1, 2, 3, 4, 6, 12 processes, or start"):
        keep_steps(Arguments, str(tmp_path))
    for processes, accumulation in ((3, 4), (2, 6), (12, 1), (4, 3)):
        Arguments.world_size, Arguments.gradient_accumulation_steps = processes, 3
        assert keep_steps(Arguments, str(tmp_path)) == 4
        assert Arguments.gradient_accumulation_steps == accumulation
    (tmp_path / "processes.json").write_text('{"begun": 4, "accumulation": 1, "processes": 2}')
    assert keep_steps(Arguments, str(tmp_path)) == 4
    assert Arguments.gradient_accumulation_steps == 1
    assert keep_steps(Arguments, None) == 4


def test_a_batch_that_the_data_cannot_fill_is_refused(recipe, tmp_path):
    """The stock trainer would end after no step, and the base would be exported as trained."""
    whole = {"per_device_train_batch_size": 100, "dataloader_drop_last": True}
    with pytest.raises(ValueError, match=r"60 rows do not fill .* lower trainer\.per_device_train_batch_size"):
        train(recipe(length_buckets=False, trainer=whole))
    assert not (tmp_path / "run" / "experts").exists()


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


def test_a_run_does_not_go_on_over_other_weights_of_its_base(recipe, base, tmp_path):
    folder, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(base, folder)
    first = train(recipe(base=str(folder), trainer={"max_steps": 2, "save_strategy": "steps", "save_steps": 1}))
    kept = (out / "trained.safetensors").read_bytes()
    more = recipe(base=str(folder), trainer={"max_steps": 3, "save_strategy": "steps", "save_steps": 1})
    weights = load_file(folder / "model.safetensors")
    right = (folder / "model.safetensors").read_bytes()
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"a run over other weights of base \(sha256 \w{12}, now \w{12}\); choose"):
        train(more)
    assert (out / "trained.safetensors").read_bytes() == kept
    (folder / "model.safetensors").write_bytes(right)
    assert train(more).trainer.state.global_step == 3
    assert first.trainer.state.global_step == 2


def test_a_run_does_not_go_on_with_other_texts(recipe, data, tmp_path):
    file = tmp_path / "sentences.txt"
    shutil.copy(data / "sentences.txt", file)

    def run(steps):
        trainer = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        return train(recipe(sentences=Mixture({str(file): 1.0}, words=(1, 30)), trainer=trainer), export=False)

    run(2)
    kept = file.read_text()
    file.write_text(kept.replace("cat", "dog"))
    with pytest.raises(ValueError, match=r"a run with other texts \(sha256 \w{12}, now \w{12}\)"):
        run(4)
    file.write_text(kept)
    assert run(4).trainer.state.global_step == 4
    (tmp_path / "run" / "begun.json").unlink()  # a run from before it
    assert run(6).trainer.state.global_step == 6


def test_a_longer_run_goes_on_with_the_settings_and_rates_of_now(recipe, tmp_path, monkeypatch):
    """Rates by hand, falling linearly to 0 at the end, where the shorter run had arrived."""
    seen = []
    original = contrastive.ContrastiveTrainer.compute_loss

    def spy(self, *args, **kwargs):
        group = self.optimizer.param_groups[0]
        seen.append((group["lr"], group["betas"], group["eps"]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(contrastive.ContrastiveTrainer, "compute_loss", spy)
    saved = {"save_strategy": "steps", "save_steps": 2}
    train(recipe(trainer={"max_steps": 4, **saved}), export=False)
    assert [rate for rate, _, _ in seen] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    seen.clear()
    train(recipe(trainer={"max_steps": 8, "adam_beta2": 0.5, "adam_epsilon": 1e-4, **saved}), export=False)
    assert [rate for rate, _, _ in seen] == pytest.approx([5e-3, 3.75e-3, 2.5e-3, 1.25e-3])
    assert {(betas, eps) for _, betas, eps in seen} == {((0.9, 0.5), 1e-4)}
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=false.*choose another folder"):
        train(recipe(trainer={"max_steps": 8, "resume_from_checkpoint": False}), export=False)


def test_workers_that_stay_do_not_go_with_rough(recipe):
    with pytest.raises(ValueError, match=r"leave trainer\.dataloader_persistent_workers out"):
        train(recipe(rough=0.5, trainer={"dataloader_num_workers": 1, "dataloader_persistent_workers": True}))


def test_a_run_over_other_weights_is_named_where_another_starts_from_it(recipe, base, tmp_path, caplog):
    train(recipe(trainer={"max_steps": 1}), export=False)
    assert "other weights" not in caplog.text
    folder = shutil.copytree(base, tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    still = {"base": str(folder), "init_from": str(tmp_path / "run"), "trainer": {"max_steps": 1}}
    train(recipe(out=str(tmp_path / "other"), **still), export=False)
    assert "run was trained on other weights than" in caplog.text


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
