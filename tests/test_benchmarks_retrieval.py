"""Retrieval metrics against numpy, BM25, and the index against mteb's own search."""

import math
from pathlib import Path

import numpy as np
import pytest
from helpers.benchmark_data import make_base, make_data

pytest.importorskip("ir_measures")

from benchmarks import retrieval
from benchmarks.data import Collection, read_collection
from benchmarks.peers import open_encoder
from benchmarks.results import read_json


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Collection:
    return read_collection(make_data(tmp_path_factory.mktemp("data")) / "retrieval" / "toy")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return open_encoder("base-causal", base=str(make_base(tmp_path_factory.mktemp("base"))))


def test_metrics_are_those_worked_out_by_hand():
    grades = {"a": {"x": 3, "y": 1, "z": 0}, "b": {"z": 1}}
    collection = Collection("c", dict.fromkeys("xyz", "t"), {"a": "?", "b": "?"}, grades)
    found = retrieval.measure(collection, {"a": {"z": 3.0, "y": 2.0, "x": 1.0}})
    gain = 1 / math.log2(3) + 3 / math.log2(4)
    ideal = 3 / math.log2(2) + 1 / math.log2(3)
    assert found["nDCG@10"]["a"] == pytest.approx(gain / ideal)
    assert found["RR@10"]["a"] == pytest.approx(1 / 2)
    assert found["R@100"]["a"] == 1
    assert {name: values["b"] for name, values in found.items()} == {"nDCG@10": 0, "RR@10": 0, "R@100": 0}


def test_bm25_finds_the_word(collection):
    ranking = retrieval.rank_bm25(collection)
    assert max(ranking["q0"], key=ranking["q0"].get) in {k for k, text in collection.documents.items() if "cat" in text}
    values = [s for s in retrieval.score(collection, ranking, seed=0, resamples=20) if s["metric"] == "R@100"]
    assert values[0]["value"] == 100


def test_the_index_ranks_as_brute_force_and_as_mteb(collection, encoder, tmp_path):
    """nDCG@10 through `EmbeddingIndex` equals that of numpy and that of mteb's own retrieval task."""
    pytest.importorskip("faiss")
    mteb = pytest.importorskip("mteb")
    assert mteb
    from benchmarks import embedding
    from benchmarks.mteb_model import wrap

    ranking = retrieval.rank_dense(encoder.model, collection, tmp_path / "index")
    documents = {key: text for key, text in collection.documents.items() if text}
    first = encoder.model.encode(list(collection.queries.values()), normalize_embeddings=True)
    second = encoder.model.encode(list(documents.values()), normalize_embeddings=True)
    for query, line in zip(collection.queries, first @ second.T):
        expected = dict(zip(documents, line.tolist()))
        assert ranking[query] == pytest.approx(expected, abs=1e-4)
    score = retrieval.score(collection, ranking, seed=0, resamples=20)[0]
    task = embedding.local_task("toy", make_data(tmp_path / "data"))
    (other,) = embedding.score_task(wrap(encoder), task, "test", seed=0, resamples=5, progress=False)
    assert score["value"] == pytest.approx(other["value"], abs=0.01)
    assert 0 < score["value"] < 100


def test_a_run_writes_one_file_per_system_and_keeps_it(collection, tmp_path, monkeypatch):
    path = retrieval.run("bm25", [collection], out=tmp_path, resamples=20)
    content = read_json(path)
    assert [score["metric"] for score in content["scores"]] == list(retrieval.METRICS)
    assert np.mean(content["scores"][0]["outcomes"]) == pytest.approx(content["scores"][0]["value"], abs=0.01)
    monkeypatch.setattr(retrieval, "rank_bm25", lambda *a: pytest.fail("a finished collection ran again"))
    retrieval.run("bm25", [collection], out=tmp_path)


def test_a_folder_without_relevant_documents_is_refused(tmp_path):
    folder: Path = make_data(tmp_path) / "retrieval" / "toy"
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t0\n")
    with pytest.raises(ValueError, match="at least one relevant document"):
        read_collection(folder)
