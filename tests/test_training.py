"""Stage 1 as a whole on tiny models: options, release, two processes."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import TEXTS, WORDS
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM

pytest.importorskip("peft")

from helpers.training import make_recipe, make_teacher, make_training_data

from training import contrastive
from training.classification import main as fit_classification_head
from training.command import check_same_recipe
from training.contrastive import load_run, main, released_projection, train, training_arguments
from training.mixtures import Groups, Texts, TextSource
from training.recipe import SimilarityWeights
from training.resume import trained_parameters
from training.student import build_model, start_from
from training.teacher import main as teacher_vectors_main
from training.teacher_settings import EmbedderTeacher
from training.texts import read_corpus
from ubmoe_st import UBMoE, upcycle
from ubmoe_st.checkpoint import read_config

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


@pytest.fixture
def similarity(recipe, checkpoint, data, tmp_path):
    """A recipe with an embedder, mixed texts and groups."""
    rows = [
        {"text": f"the {a} sits on {b} and the {a} runs under it", "title": f"a {a}"}
        for a, b in zip(WORDS, WORDS[::-1])
    ]
    (tmp_path / "passages.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = str(data / "sentences.txt")
    sources = [
        TextSource(lines, count=25, words=(1, 30)),
        TextSource(lines, "corruptions", count=15, words=(5, 30)),
        TextSource(str(tmp_path / "passages.jsonl"), "passages", 20, words=(3, 40), title="title", title_apart=1.0),
    ]

    def make(**changes):
        teacher = EmbedderTeacher(
            str(checkpoint), str(tmp_path / "e"), name="tiny", trained_on="nothing", prompts={"titles": "a "}
        )
        values = {"loss": "similarity", "head": "training", "teacher": [teacher], "sentences": None, "ffn_dropout": 0.0}
        values |= {"texts": Texts(sources), "groups": Groups(neighbours=3, largest=4), "batch_tokens": 120}
        return recipe(**{**values, **changes})

    return make


def test_a_checkpoint_that_taught_itself_goes_on_as_self_distilled(similarity, tmp_path):
    first = train(similarity(trainer={"max_steps": 1}, out=str(tmp_path / "first")))
    assert read_config(first.checkpoint).training == "distilled from tiny"
    config = json.loads((first.checkpoint / "generator" / "config.json").read_text())
    config["ubmoe"]["training"] = "self-distilled"
    (first.checkpoint / "generator" / "config.json").write_text(json.dumps(config))
    teacher = EmbedderTeacher(str(first.checkpoint), str(tmp_path / "vectors"), center=True)
    run = train(similarity(trainer={"max_steps": 1}, teacher=[teacher], out=str(tmp_path / "second")))
    assert read_config(run.checkpoint).training == "self-distilled"
    assert "teachers" not in json.loads((run.experts / "recipe.json").read_text())


def test_a_number_of_components_is_released(similarity, tmp_path):
    """The first ones of what was trained, which are the largest."""
    run = train(similarity(project=True, components=8, trainer={"max_steps": 2}))
    released, trained = UBMoE(str(run.checkpoint)).encode(TEXTS), run.model.eval().encode(TEXTS)
    assert released.shape == (len(TEXTS), 8)
    assert trained.shape[1] > 8
    leading = trained[:, :8] / np.linalg.norm(trained[:, :8], axis=1, keepdims=True)
    assert np.abs(released - leading).max() < 1e-2
    with pytest.raises(ValueError, match="more than the"):
        released_projection(similarity(project=True, components=10_000), run.model)
    # Another phase begins with the vectors of the release; what it left out stays out, and the rest trains.
    on = similarity(project=True, components=8, init_from=str(run.experts), out=str(tmp_path / "on"))
    on.trainer |= {"max_steps": 2}
    model = build_model(on, device="cpu", head_size=5).eval()
    start_from(model, run.experts)
    assert np.abs(model.encode(TEXTS)[:, :8] - released).max() < 2e-3
    after = train(on, export=False).model.eval().encode(TEXTS)
    assert np.linalg.matrix_rank(after.astype(np.float64), tol=1e-4) <= 8
    assert np.abs(after[:, :8] - released).max() > 1e-3


def test_components_that_cannot_be_are_found_before_the_training_and_corrected_after_it(similarity, monkeypatch):
    trained = []
    monkeypatch.setattr(contrastive.ContrastiveTrainer, "train", lambda self, **_: trained.append(self))
    for wrong, said in (({"ridge": 10}, "as many texts, got 10"), ({"components": 999}, "999 is more than the 32")):
        with pytest.raises(ValueError, match=said):
            train(similarity(**{"project": True, "components": True, **wrong}), export=False)
    assert not trained
    out = Path(similarity().out)
    (out / "trained.safetensors").touch()
    check_same_recipe(similarity(project=True, components=16), out)
    with pytest.raises(ValueError, match="another 'ridge'"):
        check_same_recipe(similarity(project=True, ridge=40), out)


def test_an_embedder_teaches_and_is_named(similarity, checkpoint, tmp_path):
    weights = SimilarityWeights(within=0.5)
    trainer = {"max_steps": 40, "learning_rate_mapping": {"lora_B": 2e-2}}
    run = train(similarity(project=True, components=True, similarity=weights, trainer=trainer))
    losses = [entry["similarity"] for entry in run.trainer.state.log_history if "similarity" in entry]
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    facts = json.loads((run.experts / "recipe.json").read_text())
    assert facts["training"] == "distilled from tiny"
    assert facts["teachers"] == [{"name": "tiny", "share": 1.0, "trained_on": "nothing"}]
    assert json.loads((run.experts / "training.json").read_text())["recipe"]["groups"]["neighbours"] == 3
    names = {"bi_delta.safetensors", "projection.safetensors", "recipe.json", "training.json"}
    assert {path.name for path in run.experts.iterdir()} == names
    with safe_open(run.experts / "bi_delta.safetensors", "pt") as stored:
        assert {stored.get_slice(key).get_dtype() for key in stored.keys()} == {"F16"}
    released = UBMoE(str(run.checkpoint))
    assert released.ubmoe_config.training == "distilled from tiny"
    vectors = released.encode(TEXTS)
    assert np.abs(vectors - run.model.eval().encode(TEXTS)).max() < 5e-3
    size = np.square(released.encode(run.trainer.train_dataset["anchor"][:])).mean(0)
    assert size[:8].sum() > 0.5 > 0.1 > size[-8:].sum()
    assert np.abs(SentenceTransformer(str(run.checkpoint)).encode(TEXTS) - vectors).max() < 1e-4
    texts = run.trainer.train_dataset["anchor"][:]
    models = UBMoE(str(checkpoint)), released, build_model(similarity(), device="cpu").eval()
    wanted, trained, untrained = (model.encode(texts) @ model.encode(texts).T for model in models)
    assert np.square(trained - wanted).mean() < 0.9 * np.square(untrained - wanted).mean()
    _, loaded = load_run(tmp_path / "run")
    assert np.abs(loaded.encode(TEXTS) - run.model.encode(TEXTS)).max() < 1e-5
    # The next phase starts where this one ended, and reads other texts of it.
    again = similarity(out=str(tmp_path / "next"), project=True, init_from=str(tmp_path / "run"), similarity=weights)
    again.trainer |= {"max_steps": 1, "learning_rate": 0.0}
    first, second = trained_parameters(run.model), trained_parameters(train(again, export=False).model)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_titles_learn_to_find_their_own_passage(similarity):
    """The trainer logs the term, which is there in most batches, and it falls."""
    weights = SimilarityWeights(contrastive=1.0, temperature=0.2)
    trainer = {"max_steps": 40, "learning_rate_mapping": {"lora_B": 2e-2}}
    run = train(similarity(similarity=weights, batch_tokens=240, trainer=trainer), export=False)
    losses = [entry["contrastive"] for entry in run.trainer.state.log_history if "contrastive" in entry]
    assert len(losses) == 40
    assert np.count_nonzero(losses) > 20
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    plain = train(
        similarity(out=str(Path(run.trainer.args.output_dir).parent / "plain"), trainer={"max_steps": 1}), export=False
    )
    assert all("contrastive" not in entry for entry in plain.trainer.state.log_history)


def test_a_student_with_the_teachers_head_searches_the_teachers_index(similarity, checkpoint):
    """`head: output`: vectors in the space of the teacher, compared with the teacher's own ones."""
    run = train(similarity(head="output", trainer={"max_steps": 60}))
    released, teacher = UBMoE(str(run.checkpoint)), UBMoE(str(checkpoint))
    texts = run.trainer.train_dataset["anchor"][:]
    documents, queries = teacher.encode(texts), released.encode(texts)
    cosines = queries @ documents.T
    assert cosines.shape == (len(texts), len(texts))
    assert cosines.diagonal().mean() > cosines.mean() + 0.2
    found = (cosines.argsort(1)[:, -3:] == np.arange(len(texts))[:, None]).any(1).mean()
    assert found > 10 * 3 / len(texts)  # ten times chance


def test_prompts_by_kind_are_read_and_released(similarity, tmp_path):
    prompts = {"passages": "the bird ", "queries": "a train "}
    run = train(similarity(prompts=prompts, pool_prompt=True, rough=0.5, trainer={"max_steps": 2}))
    lengths = run.trainer.train_dataset["prompt_characters"][:]
    assert {length for length in lengths} == {0, len("the bird ")}
    texts, corpus = run.trainer.train_dataset["anchor"][:], read_corpus(similarity())
    assert len(texts) == len(corpus.texts)
    for text, plain, kind in zip(texts, corpus.texts, corpus.kinds):
        assert text == prompts.get(kind, "") + plain
    released = UBMoE(str(run.checkpoint))
    assert released.prompts["query"] == "a train "
    assert np.abs(released.encode_document("cat") - released.encode("the bird cat")).max() < 1e-5
    assert np.abs(released.encode_query("cat") - released.encode("cat")).max() > 1e-2
    for changes in ({"prompts": {"query": "x"}, "pool_prompt": True}, {"prompts": prompts}):
        with pytest.raises(ValueError, match="prompts"):
            similarity(**changes)


def test_bf16_is_taken_where_the_processor_has_it(recipe, monkeypatch):
    for has in (True, False):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda has=has: {"avx512_bf16": has}, raising=False)
        assert training_arguments(recipe(trainer={"bf16": "auto"})).bf16 is has
    assert training_arguments(recipe()).bf16 is False
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    run = train(recipe(trainer={"bf16": "auto", "max_steps": 2}), export=False)
    assert run.trainer.accelerator.mixed_precision == "bf16"
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())


def test_retrieval_chooses_the_best_checkpoint(recipe, data, tmp_path):
    rows = [
        {
            "instruction": f"the {w}",
            "input": f"the {w} sits " + "on the mat " * 15,
            "category": "closed_qa",
            "output": "x",
        }
        for w in WORDS
    ]
    (data / "instruct").mkdir(exist_ok=True)
    with gzip.open(data / "instruct" / "dolly_partial.jsonl.gz", "wt") as out:
        out.write("\n".join(map(json.dumps, rows)))
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    run = train(recipe(evaluate={"Dolly-dev": 9, "STSB-dev": None}, trainer=steps), export=False)
    summary = json.loads((tmp_path / "run" / "training.json").read_text())
    found = [entry["eval_Dolly-dev_cosine_ndcg@10"] for entry in summary["curve"]]
    assert summary["best"] == max(found)
    assert 0 < max(found) <= 1
    assert "eval_STSB-dev_spearman_cosine" in summary["curve"][0]
    assert run.trainer.state.global_step == 4


def test_dense_experts_are_released_and_the_generator_is_the_base(recipe, base):
    run = train(recipe(rank=None))
    released = UBMoE(str(run.checkpoint))
    assert np.abs(released.encode(TEXTS) - run.model.eval().encode(TEXTS)).max() < 1e-5
    ids = torch.tensor([[4, 5, 6, 7]])
    reference = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.inference_mode():
        assert torch.equal(released.generator(ids).logits, reference(ids).logits)
        assert not torch.equal(released.generator_for("bi")(ids).logits, reference(ids).logits)


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


def test_the_command_line_runs_a_recipe(base, data, tmp_path, monkeypatch):
    monkeypatch.setenv("UBMOE_DATA", str(data))
    main(
        [str(RECIPES / "unsup.yaml"), "--set", f"base={base}", "--set", f"out={tmp_path / 'run'}", "--set", "rank=2",
         "--set", f"sentences.files={{{data / 'sentences.txt'}: 1.0}}", "--set", "trainer.max_steps=2",
         "--set", "trainer.per_device_train_batch_size=8", "--set", "trainer.use_cpu=true",
         "--set", "trainer.eval_steps=2", "--set", "trainer.save_steps=2"]
    )  # fmt: skip
    assert UBMoE(str(tmp_path / "run" / "model")).encode("the cat").shape == (32,)


def test_the_command_line_distils_by_the_smoke_recipe(base, checkpoint, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UBMOE_DATA", str(data))
    rows = [{"text": f"the {a} sits " * 9, "title": f"a {a} {b}"} for a, b in zip(WORDS, WORDS[::-1])]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = [
        str(data / "sentences.txt"),
        str(data / "sentences.txt"),
        str(tmp_path / "p.jsonl"),
        str(tmp_path / "q.txt"),
    ]
    (tmp_path / "q.txt").write_text("\n".join(f"which {a} sits" for a in WORDS))
    changes = [
        f"base={base}",
        f"out={tmp_path / 'run'}",
        "rank=2",
        f"teacher.0.model={checkpoint}",
        "trainer.max_steps=2",
    ]
    changes += [f"teacher.0.folder={tmp_path / 'vectors'}", "trainer.use_cpu=true", "trainer.bf16=false"]
    changes += [f"texts.sources.{number}.file={file}" for number, file in enumerate(files)]
    changes += ["trainer.eval_steps=2", "trainer.save_steps=2", "texts.sources.0.count=40"]
    command = [str(RECIPES / "smoke-distilled.yaml"), *(part for change in changes for part in ("--set", change))]
    teacher_vectors_main(command)
    assert (tmp_path / "vectors" / "teacher.json").is_file()
    main(command)
    assert UBMoE(str(tmp_path / "run" / "model")).encode("the cat").shape == (32,)
    arguments = [*command, str(tmp_path / "run" / "model"), "--out", str(tmp_path / "run" / "experts")]
    fit_classification_head([*arguments, "--dimension", "6", "--texts", "90"])
    built = upcycle(base, tmp_path / "run" / "experts", out=tmp_path / "with-head")
    assert UBMoE(str(built)).encode("the cat", task="classification").shape == (32 + 6,)
    with pytest.raises(SystemExit):
        fit_classification_head([*arguments[:-1], str(tmp_path)])
    assert "expected a folder of experts" in capsys.readouterr().err
    groups = json.loads(next((tmp_path / "vectors").glob("groups-*.json")).read_text())
    assert max(map(len, groups)) > 2
    with pytest.raises(SystemExit) as ended:  # other texts than those of the vectors
        main([*command, "--set", "texts.seed=5", "--set", f"out={tmp_path / 'other'}"])
    assert ended.value.code == 1
    assert "holds teacher vectors of another sentences_sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "distillation", "batch_tokens": 40},
        {"loss": "similarity", "batch_tokens": 80, "groups": {"neighbours": 3}, "save_minutes": 0.0001},
    ],
    ids=lambda changes: changes["loss"],
)
def test_two_processes_share_the_batches_and_agree(base, data, tmp_path, changes):
    """torchrun on a CPU: every process trains on its own half of the batches, with averaged gradients."""
    script = tmp_path / "both.py"
    script.write_text(
        "import sys, torch, training.contrastive as stage, training.resume as resume\n"
        "seen = []\n"
        "original = stage.ContrastiveTrainer.compute_loss\n"
        "def spy(self, model, inputs, *args, **kwargs):\n"
        "    seen.append(inputs['label'].tolist())\n"
        "    return original(self, model, inputs, *args, **kwargs)\n"
        "stage.ContrastiveTrainer.compute_loss = spy\n"
        "recipe = stage.read_recipe(stage.ContrastiveRecipe, sys.argv[1])\n"
        "run = stage.train(recipe, export=False)\n"
        "file = sys.argv[2] + str(torch.distributed.get_rank())\n"
        "torch.save((seen, resume.trained_parameters(run.model), run.trainer.args.world_size), file)\n"
    )
    recipe_file = tmp_path / "recipe.json"
    teacher = {"prefix": "the ", "suffix": " is", "layers": [1, 3], "dimension": 8, "folder": str(tmp_path / "teacher")}
    recipe_file.write_text(
        json.dumps(
            {"base": str(base), "out": str(tmp_path / "run"),
             "sentences": {"files": {str(data / "sentences.txt"): 1.0}}, "rank": 2,
             "head": "training", "teacher": teacher, "evaluate": {}, **changes,
             "trainer": {"max_steps": 4, "learning_rate": 0.01, "save_strategy": "no"}}
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
