"""Reranked results are the first ones in the order of the model's `rank`, and keep their cosines."""

from __future__ import annotations

import json

import pytest
from helpers.models import TEXTS

from ubmoe_st import UBMoE
from ubmoe_st.index import EmbeddingIndex

WORDS = "the cat dog bird train house tree mat".split()


@pytest.fixture(scope="module")
def model(checkpoint):
    return UBMoE(str(checkpoint), device="cpu")


@pytest.fixture(scope="module")
def index(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rerank")
    corpus = folder / "corpus.jsonl"
    texts = [*TEXTS, *(f"{a} in the {b}" for a in WORDS[:3] for b in WORDS[3:])]
    corpus.write_text("".join(json.dumps({"id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    return EmbeddingIndex.build(model, corpus, folder / "index", kind="flat")


def test_the_first_results_come_in_the_order_of_rank(model, index):
    queries = ["the red bird", "a dog runs"]
    changed = 0
    for query, hits, plain in zip(
        queries, index.search_entries(queries, 8, rerank=5), index.search_entries(queries, 8)
    ):
        order = [result["corpus_id"] for result in model.rank(query, [hit.text for hit in plain[:5]])]
        assert hits == [plain[number] for number in order] + plain[5:]
        changed += order != sorted(order)
    assert changed, "the order of rank is that of the cosines, so this test would be vacuous"


def test_more_are_reranked_than_returned(model, index):
    wide = index.search_entries("the red bird", len(index))[0]
    ranked = model.rank("the red bird", [hit.text for hit in wide], top_k=2)
    scores, ids = index.search("the red bird", 2, rerank=len(index))
    assert ids == [[wide[result["corpus_id"]].id for result in ranked]]
    assert scores[0].tolist() == pytest.approx([wide[result["corpus_id"]].score for result in ranked], abs=1e-6)


def test_what_cannot_be_reranked_is_refused(model, index):
    with pytest.raises(ValueError, match="rerank is a whole number of at least 1"):
        index.search("the cat", rerank=0)
    with pytest.raises(TypeError, match="rerank needs queries as texts, got ndarray"):
        index.search(model.encode(["the cat"]), rerank=3)
    assert index.search_entries("the cat", filter={"lang": "en"}, rerank=3) == [[]]
