"""What a training keeps of what it starts from, and what it refuses to release."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from helpers.models import TEXTS
from helpers.training import make_recipe, make_training_data
from peft import LoraConfig
from safetensors.torch import load_file
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling

from training.averaging import average
from training.contrastive import train, training_arguments
from training.groups import neighbour_groups
from training.mixtures import Groups, Texts, TextSource
from training.resume import trained_parameters
from training.student import HEAD, _by_role, build_model, start_from
from training.texts import Corpus, draw
from ubmoe_st import UBMoE, UBMoETransformer, upcycle
from ubmoe_st.experts import load_low_rank, save_low_rank
from ubmoe_st.generator import build_generator, router_state
from ubmoe_st.upcycling import DELTA_NAME, PROJECTION_NAME


@pytest.fixture
def make(base, tmp_path, monkeypatch):
    monkeypatch.setenv("UBMOE_DATA", str(make_training_data(tmp_path)))
    return make_recipe(base, tmp_path, tmp_path / "run")


def test_the_best_parameters_are_kept_however_seldom_checkpoints_are_asked_for(make, tmp_path):
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 100}
    run = train(make(trainer={**steps, "max_steps": 12, "learning_rate": 5e-2}), export=False)
    summary = json.loads((tmp_path / "run" / "training.json").read_text())
    scores = {entry["step"]: entry["eval_STSB-dev_spearman_cosine"] for entry in summary["curve"]}
    assert summary["best"] == max(scores.values()) > min(scores.values())
    assert run.trainer.evaluate()["eval_STSB-dev_spearman_cosine"] == pytest.approx(summary["best"], abs=1e-6)


def test_a_training_that_diverged_releases_nothing(make, tmp_path):
    with pytest.raises(ValueError, match=r"the training has diverged: .* is NaN or infinite"):
        train(make(trainer={"max_steps": 6, "learning_rate": 1e25, "max_grad_norm": 0}))
    assert not (tmp_path / "run" / "experts").exists()
    assert not (tmp_path / "run" / "model").exists()


def test_a_run_with_another_alpha_starts_from_the_same_vectors(make, tmp_path):
    first = make(alpha=2.0)
    expected = train(first, export=False).model.eval().encode(TEXTS)
    for alpha in (2.0, 16.0, None):
        model = build_model(make(alpha=alpha), device="cpu")
        untrained = model.eval().encode(TEXTS)
        start_from(model, tmp_path / "run")
        assert np.abs(model.eval().encode(TEXTS) - expected).max() < 1e-5
        assert np.abs(untrained - expected).max() > 1e-3


def test_layers_behind_the_pooling_are_found_by_what_they_are_for():
    def layer(head):
        return Dense(4, 4, module_output_name=HEAD if head else None)

    head, project = {"2.linear.": layer(True)}, {"2.linear.": layer(False)}
    both = {"2.linear.": layer(True), "3.linear.": layer(False)}
    assert _by_role(head, {"head": "training"}) == {"2.linear.": "2.linear."}
    assert _by_role(both, {"head": None, "project": True}) == {"2.linear.": "3.linear."}
    assert _by_role(project, {"head": "training", "project": True})["3.linear."] == "2.linear."
    assert _by_role(project, {"head": "training"})["2.linear."] not in project
    assert _by_role(project, {}) == {}


def test_experts_with_a_projection_ask_for_its_layer(make, tmp_path, base):
    recipe = make(project=True)
    train(recipe)
    experts = tmp_path / "run" / "experts"
    assert (experts / PROJECTION_NAME).is_file()
    with pytest.raises(ValueError, match="set project: true"):
        start_from(build_model(make(), device="cpu"), experts)
    assert start_from(build_model(recipe, device="cpu"), experts) == []


def test_experts_of_other_weights_are_told_of(make, tmp_path, caplog):
    recipe = make()
    train(recipe)
    file = tmp_path / "run" / "experts" / DELTA_NAME
    with caplog.at_level(logging.WARNING):
        start_from(build_model(recipe, device="cpu"), file.parent)
        assert "other weights" not in caplog.text
        save_low_rank(load_low_rank(file)[0], file, {"base_sha256": {"x": "1" * 64}})
        start_from(build_model(recipe, device="cpu"), file.parent)
    assert "was trained on other weights" in caplog.text


def test_an_average_takes_nothing_of_the_folder_it_replaces(make, tmp_path):
    for name, project in (("a", True), ("b", True), ("c", False), ("d", False)):
        train(make(out=str(tmp_path / name), project=project))
    average(tmp_path / "a/experts", tmp_path / "b/experts", 0.5, tmp_path / "mean")
    assert (tmp_path / "mean" / PROJECTION_NAME).is_file()
    average(tmp_path / "c/experts", tmp_path / "d/experts", 0.5, tmp_path / "mean")
    assert not (tmp_path / "mean" / PROJECTION_NAME).exists()


@pytest.mark.parametrize(("label", "said"), [(1, "1"), (True, "true"), (1.5, "1.5"), ("1", "1"), (None, "null")])
def test_rows_are_skipped_by_values_that_are_no_texts(label, said, tmp_path, caplog):
    rows = [{"text": f"a cat number {n} sits here", "label": label if n % 2 else "other"} for n in range(20)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = TextSource(str(tmp_path / "t.jsonl"), count=20, skip={"label": [said]})
    assert len(draw(Texts([source])).texts) == 10
    source.skip = {"label": ["another"]}
    assert len(draw(Texts([source])).texts) == 20
    assert "no row has a value of `skip`" in caplog.text


def test_corruptions_follow_their_sentence_to_the_passage_it_joins():
    pytest.importorskip("faiss")
    corpus = Corpus()
    corpus.add(["a passage"], ["passages"])
    corpus.add(["a sentence", "one worse", "one worse still"], ["sentences", "fragments", "fragments"], joins=True)
    corpus.add(["far away", "and worse"], ["sentences", "fragments"], joins=True)
    vectors = torch.nn.functional.normalize(torch.tensor([[1, 0.1], [1, 0], [0, 1], [0, 1], [-1, 0], [0, 1]]), dim=1)
    assert neighbour_groups(vectors, corpus, Groups(passages=1)) == [[0, 1, 2, 3]]


def test_what_a_recipe_says_elsewhere_is_no_argument_of_its_trainer(make):
    with pytest.raises(ValueError, match="checkpoints go to `out`"):
        make(trainer={"output_dir": "elsewhere"})
    with pytest.raises(ValueError, match="use `prompt` or `prompts`"):
        make(trainer={"prompts": "query: "})
    args = training_arguments(make(batch_tokens=60, trainer={"accelerator_config": {"split_batches": True}}))
    assert (args.accelerator_config.split_batches, args.accelerator_config.even_batches) == (True, False)


def test_dimensions_that_no_vector_has_are_refused(make):
    from training.losses import build_loss
    from training.teacher_settings import EmbedderTeacher

    teacher = EmbedderTeacher("x", folder="y")
    recipe = make(loss="similarity", teacher=[teacher], matryoshka_dims=[9999, 16], head="training", ffn_dropout=0.0)
    model = build_model(recipe, device="cpu", head_size=8)
    with pytest.raises(ValueError, match="9999 is more than the 32 dimensions"):
        build_loss(recipe, model, [torch.zeros(4, 8)])


def test_what_was_saved_around_an_adapter_comes_with_it(base, tmp_path):
    model = UBMoE(
        modules=[UBMoETransformer.from_base(base), Pooling(32, "lasttoken"), Dense(32, 16), Normalize()],
        prompts={"query": "the cat "},
        default_prompt_name="query",
        device="cpu",
    )
    model.max_seq_length = 16
    model.add_adapter(LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False))
    model.save(str(tmp_path / "adapter"))
    upcycle(base, tmp_path / "adapter", out=tmp_path / "out")
    found = UBMoE(str(tmp_path / "out"), device="cpu")
    assert [type(module).__name__ for module in found][1:] == ["Pooling", "Dense", "Normalize"]
    assert (found.prompts["query"], found.default_prompt_name, found.max_seq_length) == ("the cat ", "query", 16)
    assert np.abs(found.encode(TEXTS) - model.encode(TEXTS)).max() < 1e-4


def test_routers_of_a_checkpoint_come_with_its_experts(base, checkpoint, tmp_path):
    model = UBMoE(str(checkpoint), device="cpu")
    new = build_generator(model[0].model, model[0].uni_tensors(), routing="router", router="soft")
    model[0].set_routers({name: torch.randn_like(tensor) for name, tensor in router_state(new).items()}, "soft")
    model.save(str(tmp_path / "routed"))
    upcycle(base, tmp_path / "routed", out=tmp_path / "out")
    router = "generator/router.safetensors"
    wanted, found = (load_file(tmp_path / name / router) for name in ("routed", "out"))
    assert wanted
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_a_rate_that_was_lowered_counts_when_the_run_goes_on(make, tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    first = train(make(trainer={**steps, "max_steps": 4, "learning_rate": 1e-2}), export=False)
    then = train(make(trainer={**steps, "max_steps": 8, "learning_rate": 1e-4, "weight_decay": 0.1}), export=False)
    rates = {entry["step"]: entry["learning_rate"] for entry in then.trainer.state.log_history if "loss" in entry}
    assert {rates[step] for step in (1, 2, 3, 4)} == {1e-2}
    assert {rates[step] for step in (5, 6, 7, 8)} == {1e-4}
    assert {group["weight_decay"] for group in then.trainer.optimizer.param_groups} >= {0.1}
    pairs = zip(trained_parameters(first.model).values(), trained_parameters(then.model).values())
    assert 0 < max(float((a - b).abs().max()) for a, b in pairs) < 1e-3


def test_vectors_of_an_embedder_whose_pooling_changed_are_not_taken_for_its_own(checkpoint, tmp_path):
    import shutil

    from training.teacher import teacher_vectors
    from training.teacher_settings import EmbedderTeacher

    shutil.copytree(checkpoint, tmp_path / "model")
    teacher = EmbedderTeacher(str(tmp_path / "model"), folder=str(tmp_path / "vectors"))
    expected = teacher_vectors("x", teacher, TEXTS)
    assert np.array_equal(teacher_vectors("x", teacher, TEXTS, compute=False), expected)
    stored = tmp_path / "vectors" / "teacher.json"
    known = json.loads(stored.read_text())
    config = tmp_path / "model" / "1_Pooling" / "config.json"
    config.write_text(config.read_text().replace('"mean"', '"lasttoken"'))
    with pytest.raises(ValueError, match="another settings_sha256"):
        teacher_vectors("x", teacher, TEXTS)
    known.pop("settings_sha256")  # of a folder from before this was written down
    stored.write_text(json.dumps(known))
    assert np.array_equal(teacher_vectors("x", teacher, TEXTS), expected)


def test_experts_of_a_checkpoint_are_exported_as_they_are(base, tmp_path):
    from helpers.models import make_checkpoint

    from ubmoe_st.experts import load_low_rank
    from ubmoe_st.upcycling import export_experts

    folder = make_checkpoint(base, tmp_path / "low", low_rank=True)
    out = export_experts(UBMoE(str(folder), device="cpu")[0], tmp_path / "out", dtype=torch.float32)
    wanted = load_low_rank(folder / "generator" / DELTA_NAME)[0]
    found = load_low_rank(out / DELTA_NAME)[0]
    assert set(found) == set(wanted)
    for name, (a, b) in wanted.items():
        assert torch.equal(found[name][0], a.float())
        assert torch.equal(found[name][1], b.float())
