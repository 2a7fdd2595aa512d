"""Embeddings over HTTP are those of `encode`."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.models import TEXTS, save_with_head
from helpers.requests import client, post, running, vectors_of

from ubmoe_st import UBMoE
from ubmoe_st.serving import Settings, create_app
from ubmoe_st.serving.embeddings import texts_of
from ubmoe_st.serving.engine import TorchEngine
from ubmoe_st.serving.schemas import EmbeddingRequest


def test_embeddings_are_those_of_encode(url, model):
    found = post(url, "embeddings", input=TEXTS)
    expected = model.encode(TEXTS)
    assert np.abs(expected[0] - expected[1]).max() > 0.01
    np.testing.assert_allclose(vectors_of(found), expected, atol=1e-5)
    assert [entry["index"] for entry in found["data"]] == [0, 1, 2, 3]
    assert found["model"] == "tiny"
    assert found["usage"]["prompt_tokens"] == sum(len(model.token_ids(text)) for text in TEXTS)


def test_base64_and_lists_of_floats_are_the_same_vectors(url):
    plain = vectors_of(post(url, "embeddings", input=TEXTS[0]))
    packed = post(url, "embeddings", input=TEXTS[0], encoding_format="base64")["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), plain[0])


def test_fewer_dimensions_are_the_first_ones_of_unit_length(url, model):
    found = vectors_of(post(url, "embeddings", input=TEXTS, dimensions=8))
    expected = model.encode(TEXTS)[:, :8]
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


def test_prompts_are_those_of_the_checkpoint(url, model):
    query = vectors_of(post(url, "embeddings", input=TEXTS[:2], input_type="query"))
    np.testing.assert_allclose(query, model.encode_query(TEXTS[:2]), atol=1e-5)
    document = vectors_of(post(url, "embeddings", input=TEXTS[:2], input_type="document"))
    np.testing.assert_allclose(document, model.encode_document(TEXTS[:2]), atol=1e-5)
    assert np.abs(query - document).max() > 0.01
    named = vectors_of(post(url, "embeddings", input=TEXTS[:2], prompt_name="query"))
    np.testing.assert_allclose(named, query, atol=1e-6)


@pytest.mark.parametrize(
    "prompts",
    [
        {"other": "the red ", "query": "a "},
        {"passage": "the old ", "corpus": "a ", "other": "the red "},
        {"passage": "the old ", "document": "a ", "other": "the red "},
    ],
)
def test_a_prompt_is_put_where_encode_puts_it(checkpoint, prompts):
    """Also where it is empty, and beside a default prompt; vectors are cut as the checkpoint says."""
    model = UBMoE(str(checkpoint), device="cpu", prompts=prompts, default_prompt_name="other", truncate_dim=8)
    engine = TorchEngine(model, "tiny")
    vectors = []
    for kind, encode in ((None, model.encode), ("query", model.encode_query), ("document", model.encode_document)):
        body = EmbeddingRequest(input=TEXTS[0], input_type=kind)
        vectors.append(engine.embed(texts_of(engine, body))[0])
        expected = encode(TEXTS[0])
        np.testing.assert_allclose(vectors[-1], expected / np.linalg.norm(expected), atol=1e-5)
    assert vectors[0].shape == (8,) == (engine.dimension,)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01 < np.abs(vectors[0] - vectors[2]).max()
    named = texts_of(engine, EmbeddingRequest(input=TEXTS[0], prompt_name="document"))
    np.testing.assert_allclose(engine.embed(named)[0], vectors[2], atol=1e-6)


def test_vectors_for_classifiers_are_those_of_encode(checkpoint, tmp_path):
    """Also where they wait beside plain ones, which have another width."""
    save_with_head(checkpoint, tmp_path / "head", length=4.0)
    model = UBMoE(str(tmp_path / "head"), device="cpu")
    engine = TorchEngine(model, "tiny")
    texts = TEXTS * 5
    with running(create_app(engine, settings=Settings(batch_wait_ms=200))) as url, ThreadPoolExecutor(6) as pool:
        jobs = [
            pool.submit(post, url, "embeddings", input=texts, **({"task": "classification"} if number % 2 else {}))
            for number in range(6)
        ]
        answers = [vectors_of(job.result()) for job in jobs]
        ids = vectors_of(post(url, "embeddings", input=model.token_ids(TEXTS[0]), task="classification"))
    plain, joined = model.encode(texts), model.encode(texts, task="classification")
    assert joined.shape[1] == plain.shape[1] + 5
    np.testing.assert_allclose(np.linalg.norm(joined, axis=1), 4.0, rtol=1e-5)
    for number, found in enumerate(answers):
        np.testing.assert_allclose(found, joined if number % 2 else plain, atol=1e-5)
    np.testing.assert_allclose(ids[0], joined[0], atol=1e-5)


def test_a_task_without_vectors_of_its_own_is_refused(url, checkpoint, tmp_path):
    def said(address, **body):
        answer = client.post(f"{address}/v1/embeddings", json={"input": "the cat", **body})
        assert answer.status_code == 400
        return answer.json()["error"]["message"]

    assert "head" in said(url, task="classification")
    assert "classification" in said(url, task="clustering")
    save_with_head(checkpoint, tmp_path / "head")
    engines = [
        TorchEngine(UBMoE(str(tmp_path / "head"), device="cpu", **options), "tiny")
        for options in ({}, {"truncate_dim": 8})
    ]
    with running(create_app(engines[0])) as address:
        assert "come whole" in said(address, task="classification", dimensions=8)
    with running(create_app(engines[1])) as address:
        assert "dimensions" in said(address, task="classification")


def test_token_ids_are_taken_as_they_are(url, model):
    rows = [model.token_ids(text) for text in TEXTS]
    found = vectors_of(post(url, "embeddings", input=rows))
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(vectors_of(post(url, "embeddings", input=rows[1])), found[1:2], atol=1e-5)


def test_a_text_without_tokens_has_a_vector(url, model):
    np.testing.assert_allclose(vectors_of(post(url, "embeddings", input="")), model.encode([""]), atol=1e-5)


def test_a_long_text_is_refused_or_cut_as_asked(url, model):
    text = "the cat " * 100
    error = post(url, "embeddings", 400, input=["train", text])["error"]
    assert "position 1" in error["message"]
    assert "truncate" in error["message"]
    assert error["code"] == "context_length_exceeded"
    cut = vectors_of(post(url, "embeddings", input=text, truncate=True))
    np.testing.assert_allclose(cut, model.encode([text]), atol=1e-5)
    ids = model.token_ids(text)
    assert len(ids) > model.max_seq_length
    assert "position 0" in post(url, "embeddings", 400, input=ids)["error"]["message"]


def test_one_long_text_is_not_met_by_many_short_ones(model, monkeypatch):
    """Tokenising pads all to the longest: of a thousand texts one long one would make millions of cells."""
    from ubmoe_st.serving import engine as module

    texts = [f"the {'cat' if n % 3 else 'red bird'}" for n in range(40)] + ["the cat " * 60, ""]
    whole = TorchEngine(model, "tiny").tokenize(texts, None)
    monkeypatch.setattr(module, "_CELLS", 500)
    cells = []
    original = model.preprocess

    def spied(given, **kwargs):
        found = original(given, **kwargs)
        cells.append(found["input_ids"].numel())
        return found

    monkeypatch.setattr(model, "preprocess", spied)
    assert TorchEngine(model, "tiny").tokenize(texts, None) == whole
    assert len(cells) > 1
    assert max(cells) <= 130


def test_a_model_that_is_being_trained_gives_the_vectors_of_encode(model):
    engine = TorchEngine(model, "tiny")
    tokens = engine.tokenize(TEXTS, None)
    model.train()
    engine.embed(tokens)
    assert not any(module.training for module in model.modules())
