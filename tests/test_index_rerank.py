"""Reranked results are the first ones in the order of the model's `rank`, or of MaxSim, and keep their cosines."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from helpers.benchmark_data import make_base as make_byte_base
from helpers.encoders import HashEncoder
from helpers.models import TEXTS, make_checkpoint
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from ubmoe_st import UBMoE
from ubmoe_st.index import EmbeddingIndex, IndexGroup

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
    for method in (3, "likelihood", "maxsim"):
        assert index.search_entries("the cat", filter={"lang": "en"}, rerank=method) == [[]]
        with pytest.raises(ValueError, match="query 1 is empty"):
            index.search(["the cat", " "], rerank=method)
    with pytest.raises(ValueError, match="or one of likelihood, yes_no, maxsim; got 'tokens'"):
        index.search("the cat", rerank="tokens")
    with pytest.raises(ValueError, match=r"candidates is a whole number of at least 1.*got 0"):
        index.search("the cat", rerank="maxsim", candidates=0)
    with pytest.raises(ValueError, match="candidates=3 needs rerank='likelihood'"):
        index.search("the cat", candidates=3)


def test_maxsim_needs_token_vectors(tmp_path):
    index = EmbeddingIndex.build(HashEncoder(), [{"id": "a", "text": "a"}], tmp_path / "index")
    with pytest.raises(TypeError, match="begins with a Transformer, got HashEncoder"):
        index.search("a", rerank="maxsim")


def unit_tokens(folder, text: str) -> np.ndarray:
    """Unit vectors of the tokens of one text, by stock transformers, (T, D)."""
    encoder, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        vectors = encoder(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].numpy()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("stock", [False, True])
def test_maxsim_is_that_of_numpy(index, checkpoint, stock):
    """Also with the stock model, which `open` loads by itself."""
    queries = ["the red bird", "a dog runs"]
    model = SentenceTransformer(str(checkpoint), device="cpu") if stock else UBMoE(str(checkpoint), device="cpu")
    opened = EmbeddingIndex.open(index.path, model=model)
    changed = 0
    for query, hits, plain in zip(
        queries, opened.search_entries(queries, 8, rerank="maxsim", candidates=6), index.search_entries(queries, 8)
    ):
        asked = unit_tokens(checkpoint, query)
        scores = [(asked @ unit_tokens(checkpoint, hit.text).T).max(1).sum() for hit in plain[:6]]
        assert np.diff(np.sort(scores)).min() > 1e-4
        order = np.argsort(-np.array(scores)).tolist()
        assert [hit.id for hit in hits] == [plain[number].id for number in order] + [hit.id for hit in plain[6:]]
        assert [hit.score for hit in hits[:6]] == pytest.approx([plain[number].score for number in order], abs=1e-5)
        changed += order != sorted(order)
    assert changed, "the order of MaxSim is that of the cosines, so this test would be vacuous"


@pytest.mark.parametrize("method", ["likelihood", "maxsim"])
def test_a_group_reranks_as_one_index_over_all_rows(model, index, tmp_path, method):
    rows = [{"id": entry, "text": text} for entry, text in zip(index, index.texts(list(index)))]
    parts = [EmbeddingIndex.build(model, half, tmp_path / name) for name, half in (("a", rows[:7]), ("b", rows[7:]))]
    queries = ["the red bird", "a dog runs"]
    expected = index.search(queries, 5, rerank=method, candidates=12)
    scores, ids = IndexGroup(parts).search(queries, 5, rerank=method, candidates=12)
    assert ids == expected[1] != index.search(queries, 5)[1]
    np.testing.assert_allclose(scores, expected[0], atol=1e-5)
    hits = IndexGroup(parts).search_entries(queries, 5, rerank=method, candidates=12)
    assert [[hit.id for hit in line] for line in hits] == ids
    with pytest.raises(TypeError, match="rerank needs queries as texts"):
        IndexGroup(parts).search(model.encode(queries), rerank=method)


def test_candidates_that_are_read_in_part_are_counted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    model = UBMoE(str(make_checkpoint(make_byte_base(folder / "base"), folder / "ubmoe")), device="cpu")
    model.max_seq_length = 24
    rows = [{"id": "long", "text": "bird " * 9}, {"id": "short", "text": "a red bird"}]
    index = EmbeddingIndex.build(model, rows, folder / "index")
    assert index.info["sources"][0]["entries_cut"] == 1
    with pytest.warns(UserWarning, match="1 of 2 candidates are longer than the 24 tokens"):
        index.search("a bird", rerank="maxsim")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index.search("a bird", 1, rerank="maxsim", candidates=1)
