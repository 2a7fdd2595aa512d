"""Reranked searches: new orders worked out by hand, a run on a tiny model, and what is kept of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.benchmark_data import make_base, make_data
from helpers.models import make_checkpoint
from typer.testing import CliRunner

pytest.importorskip("ir_measures")
pytest.importorskip("bm25s")

from benchmarks import reranking, retrieval
from benchmarks.data import open_collection
from benchmarks.peers import open_encoder
from benchmarks.report import own_tables
from benchmarks.results import read_json
from ubmoe_st import UBMoE

CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("reranking")
    base = make_base(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(base)
    checkpoint = make_checkpoint(base, folder / "tiny")
    return replace(open_encoder(str(checkpoint)), model=UBMoE(str(checkpoint), device="cpu"))


def test_the_first_are_reordered_and_the_others_stay():
    ranking = {"q": {"a": 9.0, "b": 8.0, "c": 7.0, "d": 6.0}, "none": {}}
    moved = reranking.reordered(ranking, {"q": {"a": 0.1, "b": 0.3, "c": 0.2}, "none": {}}, 3)
    assert reranking.best(moved["q"], 4) == ["b", "c", "a", "d"]
    assert reranking.best(moved["q"], 1) == ["b"]
    assert moved["none"] == {}


def test_a_run_measures_every_method_and_keeps_it(encoder, tmp_path, monkeypatch):
    data = make_data(tmp_path / "data")
    collection = open_collection(data, "toy")
    options = {"weight": 0.5, "candidates": 4, "queries": 3, "out": tmp_path, "indexes": tmp_path / "indexes"}
    options["resamples"] = 20
    path = reranking.run(encoder, [collection], **options)
    assert path.name == "reranking-tiny-first3.json"
    content = read_json(path)
    scores = {(one["first"], one["method"]): one for one in content["scores"]}
    assert set(scores) == {(first, method) for first in reranking.FIRST for method in reranking.METHODS}
    assert {one["n"] for one in content["scores"]} == {3}
    assert all((one["ms_per_query"] > 0) == (method != "none") for (_, method), one in scores.items())

    small = reranking.first_queries(collection, 3)
    found = retrieval.rank_dense(encoder.model, small, tmp_path / "again")
    asked = {}
    for query, text in small.queries.items():
        names = reranking.best(found[query], 4)
        ranked = encoder.model.rank(text, [small.documents[name] for name in names])
        order = [names[result["corpus_id"]] for result in ranked]
        asked[query] = {
            name: -float(place) for place, name in enumerate([*order, *reranking.best(found[query], 99)[4:]])
        }
    expected = retrieval.score(small, asked, seed=0, resamples=2)[0]
    assert scores["dense", "likelihood"]["outcomes"] == expected["outcomes"]
    assert len({tuple(one["outcomes"]) for one in content["scores"]}) > 3

    assert "| both, weighted | maxsim | 4 |" in own_tables([content])["reranking-tiny-first3"]
    monkeypatch.setattr(reranking, "pair_scores", lambda *a: pytest.fail("a finished method ran again"))
    said: list[str] = []
    reranking.run(encoder, [collection], **options, say=said.append)
    assert [line.endswith("kept") for line in said] == [True] * 4
    with pytest.raises(ValueError, match="Give --weight"):
        reranking.run(encoder, [collection], **options | {"weight": None})


def test_a_base_without_chat_template_is_measured_without_yes_no(tmp_path):
    data = make_data(tmp_path / "data")
    checkpoint = make_checkpoint(make_base(tmp_path / "base"), tmp_path / "plain")
    options = ["--model", str(checkpoint), "--collection", "toy", "--queries", "2", "--candidates", "2"]
    options += ["--data-dir", str(data), "--weight", "0.5", "--out", str(tmp_path), "--indexes", str(tmp_path / "i")]
    found = CliRunner().invoke(reranking.app, options)
    assert found.exit_code == 0, found.output
    assert "plain: without yes_no" in found.output
    content = read_json(tmp_path / "reranking-plain-first2.json")
    assert {one["method"] for one in content["scores"]} == set(reranking.METHODS) - {"yes_no"}
    refused = CliRunner().invoke(reranking.app, [*options, "--method", "yes_no"])
    assert refused.exit_code == 1
    assert "yes_no asks in a chat" in refused.output


def test_other_weights_have_an_index_of_their_own(tmp_path):
    data = make_data(tmp_path / "data")
    checkpoint = make_checkpoint(make_base(tmp_path / "base"), tmp_path / "plain")
    options = ["--model", str(checkpoint), "--collection", "toy", "--method", "maxsim", "--weight", "0.5"]
    options += ["--data-dir", str(data), "--indexes", str(tmp_path / "indexes")]
    for dtype in ("float32", "bfloat16"):
        found = CliRunner().invoke(reranking.app, [*options, "--dtype", dtype, "--out", str(tmp_path / dtype)])
        assert found.exit_code == 0, found.output
        assert read_json(tmp_path / dtype / "reranking-plain.json")["run"]["dtype"] == dtype
    indexes = sorted((tmp_path / "indexes" / "toy").iterdir())
    assert [one.name.endswith("-bfloat16") for one in indexes] == [False, True]
    first, second = (np.load(next(one.rglob("vectors.npy"))) for one in indexes)
    assert np.allclose(first, second, atol=0.02)
    assert not np.array_equal(first, second)
