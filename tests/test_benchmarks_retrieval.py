"""Retrieval metrics against numpy, BM25, and the index against mteb's own search."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers.benchmark_data import WORDS, make_base, make_data

pytest.importorskip("ir_measures")

from benchmarks import retrieval
from benchmarks.data import DOLLY_DEV, Collection, dolly_dev, open_collection, read_collection, read_jsonl
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


def test_dolly_dev_asks_contexts_of_their_kind_once(tmp_path):
    """Two kinds of instructions, contexts of more than 30 words, the first question of each."""
    folder = make_data(tmp_path)
    found = open_collection(folder, DOLLY_DEV)
    rows = [row for row in read_jsonl(folder / "instruct" / "dolly_partial.jsonl.gz")]
    first = {row["input"]: row["instruction"] for row in reversed(rows)}
    expected = {c for c in first if len(c.split()) > 30 and (WORDS.index(c.split()[0]) % 3) < 2}
    assert set(found.documents.values()) == expected
    assert len(expected) == 9
    for query, text in found.queries.items():
        ((document, grade),) = found.relevance[query].items()
        assert (first[found.documents[document]], grade) == (text, 1)
    assert found == dolly_dev(folder)
    fewer = dolly_dev(folder, queries=2, documents=4, words=7)
    assert (len(fewer.documents), len(fewer.queries)) == (4, 2)
    assert {len(text.split()) for text in fewer.documents.values()} == {7}
    (folder / "instruct" / "dolly_partial.jsonl.gz").write_bytes(gzip.compress(json.dumps(rows[2]).encode()))
    with pytest.raises(ValueError, match="questions with a context"):
        dolly_dev(folder)


def test_fusion_by_rank_and_by_weight_is_that_worked_out_by_hand():
    dense, sparse = {"q": {"a": 0.9, "b": 0.7, "c": 0.5}}, {"q": {"c": 12.0, "d": 4.0}}
    found = retrieval.rank_rrf(dense, sparse)["q"]
    assert found == pytest.approx({"c": 1 / 63 + 1 / 61, "a": 1 / 61, "b": 1 / 62, "d": 1 / 62})
    assert next(iter(found)) == "c"
    found = retrieval.rank_weighted(dense, sparse, 0.8)["q"]
    assert found == pytest.approx({"a": 0.8, "b": 0.4, "c": 0.2, "d": 0.0})
    assert list(retrieval.rank_weighted(dense, sparse, 1.0, depth=2)["q"]) == ["a", "b"]
    assert list(retrieval.rank_weighted(dense, {"q": {}}, 0.3)["q"]) == ["a", "b", "c"]
    assert retrieval.matches({"q": {"c": 12.0, "x": 0.0}}) == {"q": {"c": 12.0}}


def test_the_weight_is_the_best_on_the_development_set():
    """Vectors that are right want 1 or what is near, those that are wrong 0."""
    grades = {f"q{n}": {f"d{n}": 1} for n in range(5)}
    collection = Collection("Dolly-dev", {f"d{n}": "t" for n in range(5)}, dict.fromkeys(grades, "?"), grades)
    right = {query: {f"d{n}": float(f"d{n}" in grades[query]) for n in range(5)} for query in grades}
    wrong = {query: {name: 1 - value for name, value in found.items()} for query, found in right.items()}
    assert retrieval.choose_weight(collection, right, wrong) > 0.5
    assert retrieval.choose_weight(collection, wrong, right) < 0.5


def test_hybrid_rows_stand_beside_their_parts(collection, encoder, tmp_path, monkeypatch):
    dev = dolly_dev(make_data(tmp_path / "data"))
    facts = {"out": tmp_path, "indexes": tmp_path / "indexes", "resamples": 20}
    retrieval.run(encoder, [dev, collection], **facts)
    paths = retrieval.run_hybrid(encoder, [dev, collection], dev=dev, **facts)
    assert [path.name for path in paths] == [f"retrieval-base-causal-{name}.json" for name in ("rrf", "weighted")]
    rrf, weighted = map(read_json, paths)
    assert weighted["weight"] in retrieval.WEIGHTS
    assert weighted["weight_chosen_on"] == DOLLY_DEV
    assert {(s["task"], s["split"]) for s in rrf["scores"]} == {("Dolly-dev", "dev"), ("toy", "test")}
    dense = retrieval.rank_dense(encoder.model, dev, tmp_path / "again")
    ranking = retrieval.rank_weighted(dense, retrieval.matches(retrieval.rank_bm25(dev)), weighted["weight"])
    value = retrieval.score(dev, ranking, seed=0, resamples=2)[0]["value"]
    assert weighted["scores"][0]["value"] == pytest.approx(value)
    alone = read_json(tmp_path / "retrieval-base-causal.json")["scores"][0]["value"]
    assert value >= alone
    with pytest.raises(ValueError, match="Give --weight"):
        retrieval.run_hybrid(encoder, [collection], **facts)
    monkeypatch.setattr(retrieval, "rank_rrf", lambda *a: pytest.fail("a finished collection ran again"))
    retrieval.run_hybrid(encoder, [dev, collection], weight=0.5, **facts)
    assert read_json(paths[1])["weight"] == 0.5


def test_the_mean_is_that_of_the_three_test_collections():
    scores = [
        {"task": n, "metric": "nDCG@10", "value": v, "sd": 3.0} for n, v in zip(retrieval.COLLECTIONS, (9, 1, 2, 6))
    ]
    (found,) = retrieval.averages(scores).values()
    assert found["value"] == 3
    assert found["sd"] == pytest.approx(math.sqrt(3))
    assert retrieval.averages(scores[:-1]) == {}


def test_a_folder_without_relevant_documents_is_refused(tmp_path):
    folder: Path = make_data(tmp_path) / "retrieval" / "toy"
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t0\n")
    with pytest.raises(ValueError, match="expected a relevant document"):
        read_collection(folder)
