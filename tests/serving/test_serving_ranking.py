"""Reranking and searching over HTTP."""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from helpers.models import TEXTS
from helpers.requests import client, post, running

from ubmoe_st import EmbeddingIndex
from ubmoe_st.index import IndexGroup
from ubmoe_st.serving import Settings, create_app
from ubmoe_st.serving.rerank import relevance

# --- reranking -------------------------------------------------------------------------------------------------------


DOCUMENTS = ["a cat sits on the mat", "a red bird sleeps in the old tree", "train", "dog and cat"]


@pytest.mark.parametrize("path", ["v1/rerank", "v2/rerank", "rerank"])
def test_a_reranking_is_that_of_rank(url, model, path):
    expected = model.rank("the red bird", DOCUMENTS)
    assert [result["corpus_id"] for result in expected] != [0, 1, 2, 3]
    body = {"model": "tiny", "query": "the red bird", "documents": DOCUMENTS}
    found = client.post(f"{url}/{path}", json=body).json()
    assert [result["index"] for result in found["results"]] == [result["corpus_id"] for result in expected]
    scores = [result["relevance_score"] for result in found["results"]]
    np.testing.assert_allclose(np.log(scores), [result["score"] for result in expected], atol=1e-4)
    assert set(found["results"][0]) == {"index", "relevance_score"}
    assert found["usage"]["total_tokens"] > sum(len(model.token_ids(text)) for text in DOCUMENTS)
    objects = [{"text": text} for text in DOCUMENTS]
    best = client.post(f"{url}/{path}", json={**body, "documents": objects, "top_n": 2, "return_documents": True})
    assert best.json()["results"] == [
        {**result, "document": {"text": DOCUMENTS[result["index"]]}} for result in found["results"][:2]
    ]


def test_relevance_is_between_0_and_1_in_the_order_of_the_scores():
    for method, scores in {"likelihood": [-1e9, -700.0, -3.0, 0.0], "yes_no": [-800.0, -1.0, 0.0, 2.0, 800.0]}.items():
        values = [relevance(score, method) for score in scores]
        assert values == sorted(values)
        assert values[0] == 0.0
        assert values[-1] == 1.0
    assert relevance(2.0, "yes_no") == pytest.approx(torch.tensor(2.0).sigmoid().item())


def test_a_long_document_is_refused_or_cut_as_asked(url, model):
    long = "the cat " * 100
    error = post(url, "rerank", 400, query="the red bird", documents=["train", long])["error"]
    assert "position 1" in error["message"]
    assert error["code"] == "context_length_exceeded"
    found = post(url, "rerank", query="the red bird", documents=["train", long], truncate=True)["results"]
    with pytest.warns(UserWarning, match="1 of 2 documents"):
        expected = model.rank("the red bird", ["train", long])
    assert [result["index"] for result in found] == [result["corpus_id"] for result in expected]


def test_a_client_that_goes_away_stops_its_ranking(engine):
    class Patient:
        """An engine that ranks until it is told to stop."""

        began, ended = threading.Event(), threading.Event()

        def __getattr__(self, name):
            return getattr(engine, name)

        def rank(self, reading, go_on):
            self.began.set()
            while go_on():
                time.sleep(0.005)
            self.ended.set()
            return [0.0] * len(reading.rows)

    patient = Patient()
    settings = Settings(generations=1, max_waiting=1)
    with running(create_app(patient, settings=settings)) as url, ThreadPoolExecutor(2) as pool:
        body = {"query": "a", "documents": ["train", "cat"]}
        first = pool.submit(lambda: httpx.post(f"{url}/v1/rerank", json=body, timeout=0.5))
        assert patient.began.wait(20)
        with pytest.raises(httpx.TimeoutException):
            first.result()
        assert patient.ended.wait(20)
        # The turn is free again.
        assert post(url, "completions", prompt="the cat", max_tokens=2)["choices"]


def test_rankings_wait_for_their_turn_and_too_many_are_answered_with_429(engine):
    class Held:
        """An engine whose rankings last until the test lets them end."""

        free = threading.Event()

        def __getattr__(self, name):
            return getattr(engine, name)

        def rank(self, reading, go_on):
            self.free.wait(20)
            return engine.rank(reading, go_on)

    held, body = Held(), {"query": "the red bird", "documents": DOCUMENTS}
    app = create_app(held, settings=Settings(generations=1, max_waiting=1))
    with running(app) as url, ThreadPoolExecutor(2) as pool:
        taken = [pool.submit(post, url, "rerank", **body) for _ in range(2)]
        generations = app.state.service.generations
        while not (generations.running and generations.waiting):
            assert not any(answer.done() for answer in taken)
            time.sleep(0.005)
        assert post(url, "rerank", 429, **body)["error"]["code"] == "server_busy"
        held.free.set()
        assert [len(answer.result()["results"]) for answer in taken] == [4, 4]


# --- searching -------------------------------------------------------------------------------------------------------


def test_a_search_reads_a_question_whole_or_is_told_to_cut_it(engine, model, tmp_path):
    """And a filter that is nested without an end is the client's fault, not the server's."""
    rows = [{"id": str(number), "text": text} for number, text in enumerate(TEXTS)]
    index = EmbeddingIndex.build(model, rows, tmp_path / "index")
    with TestClient(create_app(engine, index=index)) as client:
        refused = client.post("/v1/search", json={"query": "the cat", "mode": "bm25"})
        assert refused.status_code == 400
        assert "ubmoe index --bm25" in refused.json()["error"]["message"]
    index.build_bm25()
    long = "the cat " * 100
    with TestClient(create_app(engine, index=EmbeddingIndex.open(tmp_path / "index", model=model))) as client:
        for path, field, more in (("search", "query", {}), ("ask", "question", {"max_tokens": 2, "k": 1})):
            refused = client.post(f"/v1/{path}", json={field: long, **more})
            assert refused.status_code == 400
            assert refused.json()["error"]["code"] == "context_length_exceeded"
            assert refused.json()["error"]["param"] == field
        assert client.post("/v1/search", json={"query": long, "mode": "bm25"}).json()["data"]
        with pytest.warns(UserWarning, match="compared by their beginning"):
            found = client.post("/v1/search", json={"query": long, "truncate": True, "k": 1}).json()["data"]
        with pytest.warns(UserWarning, match="compared by their beginning"):
            assert found == [{**hit.as_dict(), "index": "index"} for hit in index.search_entries([long], 1)[0]]
        assert client.post("/v1/search", json={"query": "the cat", "mode": "hybrid"}).status_code == 200
        nested = '{"query": "the cat", "filter": {"a": ' + "[" * 900 + "]" * 900 + "}}"
        refused = client.post("/v1/search", content=nested, headers={"Content-Type": "application/json"})
        assert refused.status_code == 400
        assert "lists in lists" in refused.json()["error"]["message"]
    group = IndexGroup([EmbeddingIndex.open(tmp_path / "index", model=model)] * 2)
    with TestClient(create_app(engine, index=group)) as client:
        assert len(client.post("/v1/search", json={"query": "the cat", "k": 8}).json()["data"]) == 8
        refused = client.post("/v1/search", json={"query": "the cat", "mode": "bm25"})
        assert refused.status_code == 400
        assert "several" in refused.json()["error"]["message"]


def test_a_server_searches_what_was_written_after_it_began(engine, model, tmp_path, caplog):
    rows = [{"id": str(number), "text": text} for number, text in enumerate(TEXTS)]
    writer = EmbeddingIndex.build(model, rows, tmp_path / "index")
    held = EmbeddingIndex.open(tmp_path / "index", model=model)

    def first(client):
        return client.post("/v1/search", json={"query": TEXTS[0], "k": 1}).json()["data"][0]["id"]

    with TestClient(create_app(engine, index=held)) as client:
        assert first(client) == "0"
        writer.upsert([{"id": "new", "text": TEXTS[0]}])
        writer.delete(["0"])
        assert first(client) == "new"
        asked = client.post("/v1/ask", json={"question": TEXTS[0], "k": 1, "max_tokens": 2}).json()
        assert asked["entries"][0]["id"] == "new"
        shutil.move(tmp_path / "index", tmp_path / "away")
        assert first(client) == "new"
    assert "searched as it was" in caplog.text


@pytest.mark.parametrize(("field", "said"), [('"\\ud800"', "half a character"), ("NaN", "not JSON compliant")])
def test_a_field_that_cannot_come_back_is_refused(url, field, said):
    body = f'{{"query": "the cat", "documents": [{{"text": "the dog", "x": {field}}}], "return_documents": true}}'
    answer = client.post(f"{url}/v1/rerank", content=body.encode(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
