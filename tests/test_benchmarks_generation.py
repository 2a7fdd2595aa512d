"""lm-eval runs: local forms of official tasks, scores against ten lines of torch, resuming."""

import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers.benchmark_data import make_base, make_data

pytest.importorskip("lm_eval")

from benchmarks import generation, lm_tasks
from benchmarks.peers import open_generator
from benchmarks.results import read_json

REAL = Path("../shared/data")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return open_generator(str(make_base(tmp_path_factory.mktemp("base"))), routing="base")


@torch.no_grad()
def loglikelihood(model, tokenizer, context: str, continuation: str) -> float:
    start = tokenizer(context)["input_ids"]
    ids = start + tokenizer(continuation)["input_ids"]
    losses = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(losses[i - 1, ids[i]] for i in range(len(start), len(ids))))


def run(base, data, tmp_path, tasks, **options):
    model, tokenizer = base
    facts = {"row": "m", "label": "m", "routing": "base", "mark": "one", "out": tmp_path, "resamples": 20}
    return read_json(generation.run(model, tokenizer, tasks=tasks, folder=data, **{**facts, **options}))


def test_the_local_rows_give_the_official_prompts(data):
    """Prompts and choices come from lm-eval; only the rows are local, and `datasets` is left as it was."""
    before = datasets.load_dataset
    task = lm_tasks.build_tasks("piqa", data)["piqa"]
    row = lm_tasks.local_documents("piqa", data)["validation"][0]
    document = task.eval_docs[0]
    assert task.doc_to_text(document) == f"Question: {row['goal']}\nAnswer:"
    assert task.doc_to_choice(document) == [row["sol1"], row["sol2"]]
    task = lm_tasks.build_tasks("hellaswag", data)["hellaswag"]
    assert task.doc_to_text(task.eval_docs[0]).startswith("Topic: ")
    task = lm_tasks.build_tasks("truthfulqa_mc1", data)["truthfulqa_mc1"]
    assert task.doc_to_text(task.eval_docs[0]).endswith("Q: What cat?\nA:")
    assert task.doc_to_choice(task.eval_docs[0]) == ["a cat.", "a dog."]
    subjects = lm_tasks.build_tasks("mmlu", data)
    assert sorted(subjects) == ["mmlu_anatomy", "mmlu_virology"]
    assert "about anatomy" in subjects["mmlu_anatomy"].config.description
    assert datasets.load_dataset is before


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data folder is not there")
@pytest.mark.parametrize(
    ("name", "rows"),
    [("truthfulqa_mc1", 817), ("truthfulqa_mc2", 817), ("winogrande", 1267), ("piqa", 1838), ("arc_challenge", 1172)],
)
def test_local_sets_have_the_official_row_counts(name, rows):
    assert sum(map(len, lm_tasks.local_documents(name, REAL).values())) == rows


def test_pages_of_wikitext_join_to_the_file():
    text = " \n = Cat = \n \n A cat . \n = = Life = = \n x \n \n = Dog = \n \n y \n"
    pages = lm_tasks.wikitext_pages(text)
    assert len(pages) == 2
    assert pages[0].strip().startswith("= Cat =")
    assert "".join(pages) in text
    assert pages[1].startswith(" = Dog = ")


def test_samples_are_seeded_and_a_task_does_not_change_anothers():
    alone = generation.choose_samples({"a": 100}, 10, seed=0)["a"]
    together = generation.choose_samples({"b": 100, "a": 100}, 10, seed=0)
    assert alone == together["a"] == sorted(set(alone))
    assert len(alone) == 10
    assert alone != together["b"]
    assert alone != generation.choose_samples({"a": 100}, 10, seed=1)["a"]
    assert generation.choose_samples({"a": 3}, 10, seed=0)["a"] == [0, 1, 2]


def test_multiple_choice_is_what_torch_says(base, data, tmp_path):
    content = run(base, data, tmp_path, ["piqa"], limit=8, seed=3)
    score = next(s for s in content["scores"] if s["metric"] == "acc")
    rows = lm_tasks.local_documents("piqa", data)["validation"]
    expected = ""
    for number in score["samples"]["piqa"]:
        row = rows[number]
        context = f"Question: {row['goal']}\nAnswer:"
        values = [loglikelihood(*base, context, f" {row[key]}") for key in ("sol1", "sol2")]
        expected += str(int(np.argmax(values) == row["label"]))
    assert score["outcomes"] == expected
    assert len(score["samples"]["piqa"]) == score["n"] == 8
    assert score["value"] == pytest.approx(100 * expected.count("1") / 8)
    assert 0 < score["value"] < 100


def test_a_shared_beginning_is_read_once_and_changes_nothing(base):
    from lm_eval.api.instance import Instance

    model, tokenizer = base
    primer = " ".join(["the cat sees a red bird ."] * 6)
    pairs = [
        (f"{primer} {question}", answer)
        for question in ("the dog", "a bird sees", "the")
        for answer in (" the cat sees", " the cat", " the dog sees a red bird")
    ]
    lm = generation.open_lm(model, tokenizer, 4)
    lm.model.config.use_cache = False
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    found = [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    expected = [loglikelihood(model, tokenizer, *pair) for pair in pairs]
    assert np.allclose(found, expected, atol=1e-4)
    assert np.ptp(expected) > 1e-2
    tokens = sum(len(tokenizer("".join(pair))["input_ids"]) for pair in pairs)
    assert lm.limit > generation.MIN_PREFIX
    assert lm.computed < tokens / 2
    short = [Instance("loglikelihood", {}, ("the dog", " the cat"), 0), requests[0]]
    assert lm.loglikelihood(short, disable_tqdm=True)[1][0] == pytest.approx(expected[0], abs=1e-4)
    assert lm.limit < generation.MIN_PREFIX


def test_mc2_is_the_mass_of_the_true_answers(base, data, tmp_path):
    content = run(base, data, tmp_path, ["truthfulqa_mc2"], limit=3)
    (score,) = content["scores"]
    task = lm_tasks.build_tasks("truthfulqa_mc2", data)["truthfulqa_mc2"]
    for number, outcome in zip(score["samples"]["truthfulqa_mc2"], score["outcomes"]):
        document = task.eval_docs[number]
        context = task.doc_to_text(document)
        values = np.exp([loglikelihood(*base, context, f" {c}") for c in task.doc_to_choice(document)])
        assert outcome == pytest.approx(100 * values[:2].sum() / values.sum(), abs=0.01)


@torch.no_grad()
def test_perplexity_is_that_of_torch(base, data, tmp_path):
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    (score,) = run(base, data, tmp_path, ["wikitext"])["scores"]
    model, tokenizer = base
    loss, words = 0.0, 0
    for row in lm_tasks.local_documents("wikitext", data)["test"]:
        ids = [tokenizer.eos_token_id, *tokenizer(wikitext_detokenizer(row))["input_ids"]]
        losses = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        loss += float(sum(losses[i - 1, ids[i]] for i in range(1, len(ids))))
        words += len(__import__("re").split(r"\s+", row["page"]))
    assert score["value"] == pytest.approx(math.exp(-loss / words), rel=1e-4)


def test_the_digest_is_equal_for_equal_answers_only(base, data, tmp_path):
    def digest(pair, row):
        return run(pair, data, tmp_path, ["winogrande"], row=row, limit=4)["scores"][0]["answers_sha256"]

    other = open_generator(str(make_base(tmp_path / "other", seed=1)), routing="base")
    assert digest(base, "a") == digest(base, "b") != digest(other, "c")


def test_finished_tasks_and_answers_are_kept(base, data, tmp_path, monkeypatch):
    first = run(base, data, tmp_path, ["arc_easy", "mmlu"], mmlu_per_subject=2, cache=tmp_path / "cache")
    assert {s["task"]: s["n"] for s in first["scores"]} == {"arc_easy": 24, "mmlu": 4}
    assert list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(generation, "evaluate", lambda *a, **k: pytest.fail("a finished task ran again"))
    said: list[str] = []
    run(base, data, tmp_path, ["arc_easy", "mmlu"], mmlu_per_subject=2, say=said.append)
    assert len(said) == 2
    assert all("(kept)" in line for line in said)


def test_unknown_tasks_name_the_nearest(data):
    with pytest.raises(ValueError, match="winogrande"):
        lm_tasks.build_tasks("winogrand", data)


def test_uni_answers_are_the_bases_to_the_last_bit(data, tmp_path):
    """The generator view of a checkpoint gives the digest of the untouched base."""
    pytest.importorskip("ubmoe_st.upcycling")
    from ubmoe_st import upcycle

    folder = make_base(tmp_path / "base")
    upcycle(str(folder), out=str(tmp_path / "checkpoint"))
    digests = set()
    for path, routing in ((folder, "base"), (tmp_path / "checkpoint", "uni")):
        pair = open_generator(str(path), routing=routing)
        content = run(pair, data, tmp_path, ["piqa"], row=routing, routing=routing, limit=4)
        digests.add(content["scores"][0]["answers_sha256"])
    assert len(digests) == 1
