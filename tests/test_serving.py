"""One HTTP app over one model: what its clients get is what the model gives."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from helpers.models import TEXTS, WORDS, save_with_head
from helpers.servers import Slow, serving

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import uvicorn
from fastapi.testclient import TestClient
from transformers import AutoModelForCausalLM, GenerationConfig

from ubmoe_st import EmbeddingIndex, UBMoE
from ubmoe_st.index import IndexGroup
from ubmoe_st.serving import Settings, create_app
from ubmoe_st.serving.batching import choose
from ubmoe_st.serving.embeddings import texts_of
from ubmoe_st.serving.engine import SHAPING, Sampler, Sampling, TorchEngine, tell_unapplied
from ubmoe_st.serving.rerank import relevance
from ubmoe_st.serving.schemas import EmbeddingRequest
from ubmoe_st.serving.text import TextStream

KEY = "a-key-for-tests"
# One for all requests: making a client reads the certificates, which takes longer than most tests.
client = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


def running(app, **options):
    """The app behind uvicorn on a free port of the loopback."""
    return serving(uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", **options)))


@pytest.fixture(scope="module")
def model(checkpoint):
    loaded = UBMoE(str(checkpoint), low_memory=True, device="cpu")
    loaded.prompts = {"query": "the red ", "document": ""}
    return loaded


@pytest.fixture(scope="module")
def engine(model):
    return TorchEngine(model, "tiny")


@pytest.fixture(scope="module")
def url(engine):
    with running(create_app(engine, local=True)) as address:
        yield address


@pytest.fixture(scope="module")
def lm(base):
    return AutoModelForCausalLM.from_pretrained(base)


def post(url, path, status=200, **body):
    answer = client.post(f"{url}/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def vectors_of(found):
    return np.array([entry["embedding"] for entry in found["data"]], np.float32)


def greedy(lm, model, prompt, count, **options):
    ids = torch.tensor([model.token_ids(prompt)])
    new = lm.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0, **options)[0, ids.shape[1] :]
    return new.tolist()


# --- embeddings ------------------------------------------------------------------------------------------------------


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


# --- generation ------------------------------------------------------------------------------------------------------


def test_a_completion_is_the_base_models(url, lm, model):
    for prompt in ("the cat", "a red bird sleeps in"):
        found = post(url, "completions", prompt=prompt, max_tokens=12)
        tokens = greedy(lm, model, prompt, 12)
        assert found["choices"][0]["text"].strip() == model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert found["usage"]["completion_tokens"] == len(tokens)
        assert found["usage"]["prompt_tokens"] == len(model.token_ids(prompt))
        assert found["choices"][0]["finish_reason"] == ("stop" if tokens[-1] == 2 else "length")


def test_a_chat_goes_through_the_template(url, model):
    chat = [{"role": "user", "content": "the cat"}]
    found = post(url, "chat/completions", messages=chat, max_tokens=6)
    message = found["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"].strip() == model.generate(chat, max_new_tokens=6).strip()
    parts = [{"role": "user", "content": [{"type": "text", "text": "the cat"}]}]
    same = post(url, "chat/completions", messages=parts, max_completion_tokens=6)
    assert same["choices"][0] == found["choices"][0]


def test_a_template_sees_the_names_of_a_chat(url, model, monkeypatch):
    told = "{% for m in messages %}{{ m['name'] or 'nobody' }} {{ m['content'] }} {% endfor %}"
    monkeypatch.setattr(model.tokenizer, "chat_template", told)

    def answered(**name):
        messages = [{"role": "user", "content": "the cat", **name}]
        return post(url, "chat/completions", messages=messages, max_tokens=6)["usage"]["prompt_tokens"]

    assert answered(name="red bird house") == answered() + 2


def test_a_server_generates_as_the_checkpoint_says(checkpoint, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    config = json.loads((other / "generator" / "config.json").read_text())
    config["ubmoe"]["routing"] = "bi"
    (other / "generator" / "config.json").write_text(json.dumps(config))
    loaded = UBMoE(str(other), device="cpu")
    tokens = []
    engine = TorchEngine(loaded, "other")
    engine.generate_tokens(engine.continuation_ids("the cat"), Sampling(6), lambda token: tokens.append(token) or True)
    said = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
    assert said == loaded.generate("the cat", max_new_tokens=6, do_sample=False, routing="bi")
    assert said == loaded.generate("the cat", max_new_tokens=6, do_sample=False)
    assert said != loaded.generate("the cat", max_new_tokens=6, do_sample=False, routing="uni")


def test_what_an_engine_does_not_apply_is_told(caplog):
    asked = {"repetition_penalty": 1.1, "min_p": 0.1, "do_sample": True, "no_repeat_ngram_size": 0, "top_k": 20}
    for defaults, keys, said in (
        (asked, SHAPING, ["min_p", "repetition_penalty"]),
        (asked | {"do_sample": False}, SHAPING, ["repetition_penalty"]),
        (GenerationConfig().to_dict(), SHAPING, []),
    ):
        caplog.clear()
        tell_unapplied(defaults, keys)
        assert [one for one in said if any(one in record.message for record in caplog.records)] == said
        assert len(caplog.records) == len(said)


def test_a_seed_gives_the_same_text_whatever_else_runs(url):
    def draw(seed):
        body = {"prompt": "the cat", "max_tokens": 10, "temperature": 1.5, "top_p": 0.9, "seed": seed}
        return post(url, "completions", **body)["choices"][0]["text"]

    alone = [draw(seed) for seed in range(4)]
    assert len(set(alone)) > 1
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(draw, [seed % 4 for seed in range(12)]))
    assert together == alone * 3


def test_tokens_are_drawn_as_transformers_draws_them():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    random = np.random.default_rng(0)
    for temperature, top_p, top_k in ((0.7, 0.9, 0), (1.3, 1.0, 5), (1.0, 0.5, 10), (2.0, 0.01, 0)):
        logits = random.normal(size=50).astype(np.float32) * 3
        scores = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits[None]))
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        expected = scores.softmax(-1)[0].numpy()
        drawn = Sampler(temperature, top_p, top_k, seed=0)
        np.testing.assert_allclose(drawn.probabilities(logits), expected, atol=1e-6)
    counts = np.bincount([Sampler(1.0, seed=seed)(logits) for seed in range(4000)], minlength=50) / 4000
    expected = torch.tensor(logits).softmax(-1).numpy()
    assert np.abs(counts - expected).max() < 0.03


def test_streamed_pieces_make_the_whole_text(url):
    body = {"prompt": "a red bird", "max_tokens": 12}
    whole = post(url, "completions", **body)
    pieces = list(events(url, "completions", **body, stream=True, stream_options={"include_usage": True}))
    assert pieces[-1]["usage"] == whole["usage"]
    assert pieces[-1]["choices"] == []
    texts = [piece["choices"][0] for piece in pieces[:-1]]
    assert len(texts) > 3
    assert "".join(choice["text"] for choice in texts) == whole["choices"][0]["text"]
    assert [choice["finish_reason"] for choice in texts][-1] == whole["choices"][0]["finish_reason"]
    assert {choice["finish_reason"] for choice in texts[:-1]} == {None}


def events(url, path, **body):
    with client.stream("POST", f"{url}/v1/{path}", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    yield from map(json.loads, lines)


def test_a_stop_text_ends_the_answer_before_it(url):
    whole = post(url, "completions", prompt="the cat", max_tokens=16)["choices"][0]["text"]
    words = whole.split()
    stop = f"{words[3]} {words[4]}"
    expected = whole[: whole.index(stop)]
    found = post(url, "completions", prompt="the cat", max_tokens=16, stop=["never there", stop])
    assert found["choices"][0]["text"] == expected
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] < 16
    pieces = events(url, "completions", prompt="the cat", max_tokens=16, stop=stop, stream=True)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected


class Bytes:
    """Tokens are bytes; 0 is the end."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")

    def is_end(self, token):
        return token == 0


@pytest.mark.parametrize("stops", [[], ["zz"], ["né", "x"], ["ende."]])
def test_pieces_of_text_are_whole_characters_and_hold_nothing_of_a_stop(stops):
    text = "Ein schöner Tag – 日本語 né 🎈 ende"
    place = min([text.find(stop) for stop in stops if stop in text], default=len(text))
    stream = TextStream(Bytes(), stops)
    pieces = []
    for token in [*text.encode(), 0]:
        pieces.append(stream.push(token))
        assert "\N{REPLACEMENT CHARACTER}" not in pieces[-1]
        if stream.finished:
            break
    pieces.append(stream.rest())
    assert "".join(pieces) == text[:place]
    assert sum(map(bool, pieces)) > 5


def test_several_prompts_are_answered_in_order(url):
    found = post(url, "completions", prompt=["the cat", "a red bird"], max_tokens=4)
    alone = [post(url, "completions", prompt=p, max_tokens=4)["choices"][0]["text"] for p in ("the cat", "a red bird")]
    assert [choice["text"] for choice in found["choices"]] == alone
    assert [choice["index"] for choice in found["choices"]] == [0, 1]


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


# --- together --------------------------------------------------------------------------------------------------------


def test_choose_keeps_the_padded_batch_in_the_budget_and_the_order():
    random = np.random.default_rng(0)
    for _ in range(50):
        waiting = list(enumerate(random.integers(1, 60, 40).tolist()))
        taken = []
        while waiting:
            chosen = choose([length for _, length in waiting], 100)
            assert chosen[0] == 0
            rows = [waiting[position][1] for position in chosen]
            assert len(rows) == 1 or len(rows) * max(rows) <= 100
            taken += [waiting[position][0] for position in chosen]
            waiting = [entry for position, entry in enumerate(waiting) if position not in chosen]
        assert sorted(taken) == list(range(40))


class Counted:
    """An engine that notes its batches."""

    def __init__(self, engine):
        self._engine, self.batches = engine, []

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def embed(self, batch):
        self.batches.append(len(batch))
        time.sleep(0.02)
        return self._engine.embed(batch)


def test_concurrent_requests_share_batches_and_get_their_own_vectors(engine, model):
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, size=random.integers(1, 12))) for _ in range(60)]
    expected = model.encode(texts)
    counted = Counted(engine)
    with running(create_app(counted)) as url, ThreadPoolExecutor(32) as pool:
        talk = pool.submit(lambda: post(url, "completions", prompt="the cat", max_tokens=30)["choices"][0]["text"])
        found = list(pool.map(lambda text: vectors_of(post(url, "embeddings", input=text))[0], texts))
        said = talk.result()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert sum(counted.batches) == 60
    assert len(counted.batches) < 30
    assert said.strip() == model.generate("the cat", max_new_tokens=30).strip()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_its_generation(engine, stream):
    slow = Slow(engine)
    slow.context = 10**6
    with running(create_app(slow, settings=Settings(generations=1))) as url:
        body = {"prompt": "the cat", "max_tokens": 10_000, "stream": stream}

        async def leave():
            async with (
                httpx.AsyncClient(timeout=60) as client,
                client.stream("POST", f"{url}/v1/completions", json=body),
            ):
                await asyncio.sleep(0.2)

        if stream:
            asyncio.run(leave())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{url}/v1/completions", json=body, timeout=0.3)
        assert slow.running.wait(10)
        assert slow.ended.wait(10)
        assert 1 < slow.tokens < 5000
        # The only place is free again.
        assert post(url, "completions", prompt="the cat", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_a_full_queue_is_answered_with_429(engine):
    slow = Slow(engine)
    with (
        running(create_app(slow, settings=Settings(generations=1, max_waiting=1))) as url,
        ThreadPoolExecutor(8) as pool,
    ):
        ask = {"prompt": "the cat", "max_tokens": 40}
        answers = list(
            pool.map(
                lambda stream: client.post(f"{url}/v1/completions", json={**ask, "stream": stream}), [False, True] * 3
            )
        )
    codes = [answer.status_code for answer in answers]
    assert codes.count(200) >= 2
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) + codes.count(200) == 6
    assert refused
    assert refused[0].headers["retry-after"] == "1"
    assert refused[0].json()["error"]["type"] == "rate_limit_error"


def test_too_many_waiting_texts_are_answered_with_429(engine):
    entered, go = threading.Event(), threading.Event()

    class Held(Counted):
        def embed(self, batch):
            entered.set()
            assert go.wait(30)
            return self._engine.embed(batch)

    settings = Settings(max_queue=3, batch_tokens=8)
    with running(create_app(Held(engine), settings=settings)) as url, ThreadPoolExecutor(4) as pool:
        first = pool.submit(post, url, "embeddings", input="the cat")
        assert entered.wait(10)
        second = pool.submit(post, url, "embeddings", input=["a dog", "the tree", "a house"])
        while "ubmoe_waiting_texts 3.0" not in client.get(f"{url}/metrics").text:
            time.sleep(0.01)
        error = post(url, "embeddings", 429, input="train")["error"]
        assert "3 texts wait" in error["message"]
        go.set()
        assert len(first.result()["data"]) == 1
        assert len(second.result()["data"]) == 3


def test_a_request_that_takes_too_long_is_answered_with_504(engine):
    slow = Slow(engine)
    with running(create_app(slow, settings=Settings(timeout_s=0.2))) as url:
        assert post(url, "completions", 504, prompt="the cat", max_tokens=60)["error"]["code"] == "timeout"
        assert slow.ended.wait(10)
        assert slow.tokens < 60
        with client.stream(
            "POST", f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 60, "stream": True}
        ) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"


def test_an_error_of_the_model_reaches_only_the_requests_of_its_batch(engine):
    class Broken(Counted):
        def embed(self, batch):
            if len(batch) == 2:
                raise RuntimeError("a secret of the machine")
            return self._engine.embed(batch)

    with running(create_app(Broken(engine))) as url:
        error = post(url, "embeddings", 500, input=["the cat", "a dog"])["error"]
        assert error["type"] == "server_error"
        assert "secret" not in error["message"]
        assert len(post(url, "embeddings", input="the cat")["data"]) == 1


# --- the door --------------------------------------------------------------------------------------------------------


def test_with_a_key_nobody_is_answered_without_it(engine):
    with running(create_app(engine, api_key=KEY)) as url:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": KEY}):
            for path in ("/v1/models", "/metrics", "/nothing"):
                answer = client.get(url + path, headers=headers)
                assert answer.status_code == 401
                assert answer.json()["error"]["type"] == "authentication_error"
                assert answer.headers["WWW-Authenticate"] == "Bearer"
        right = {"Authorization": f"bearer  {KEY}"}  # the name of a scheme has no case
        assert client.get(f"{url}/v1/models", headers=right).json()["data"][0]["id"] == "tiny"
        assert client.get(f"{url}/health").json() == {"status": "ok"}


def test_a_local_server_answers_to_loopback_names_only(url):
    assert client.get(f"{url}/health").status_code == 200
    assert client.get(f"{url}/v1/models", headers={"Host": "pages.example"}).status_code == 400


@pytest.mark.parametrize("chunked", [False, True])
def test_a_request_that_is_too_long_is_refused(engine, chunked):
    with running(create_app(engine, settings=Settings(max_body_bytes=2000))) as url:
        body = json.dumps({"input": "the cat " * 1000}).encode()
        content = (body[i : i + 500] for i in range(0, len(body), 500)) if chunked else body
        answer = client.post(f"{url}/v1/embeddings", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        assert "2,000 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("embeddings", {}, "input"),
        ("embeddings", {"input": []}, "1 to 2048"),
        ("embeddings", {"input": [1.5]}, "input"),
        ("embeddings", {"input": ["a", None]}, "input"),
        ("embeddings", {"input": [999]}, "tokenizer of tiny"),
        ("embeddings", {"input": "a", "dimensions": 33}, "1 to 32"),
        ("embeddings", {"input": "a", "prompt_name": "odd"}, "'query'"),
        ("embeddings", {"input": [1, 2], "input_type": "query"}, "not before token ids"),
        ("embeddings", {"input": "a", "inputtype": "query"}, "inputtype"),
        ("completions", {"prompt": ""}, "empty"),
        ("completions", {"prompt": []}, "1 to 64"),
        ("completions", {"prompt": "the cat", "max_tokens": 0}, "max_tokens"),
        ("completions", {"prompt": "the cat", "max_tokens": 10**6}, "holds 128 tokens"),
        ("completions", {"prompt": "the cat " * 70}, "holds 128 tokens"),
        ("completions", {"prompt": "the cat", "n": 2}, "n is not supported"),
        ("completions", {"prompt": "the cat", "logprobs": 0}, "logprobs is not supported"),
        ("completions", {"prompt": "the cat", "stream_options": {"include_usage": True}}, "stream: true"),
        ("rerank", {"query": "a", "documents": []}, "documents"),
        ("rerank", {"query": " ", "documents": ["a"]}, "query is empty"),
        ("rerank", {"query": "a", "documents": ["a"] * 2049}, "1 to 2048"),
        ("rerank", {"query": "a", "documents": ["a", 3]}, "documents"),
        ("rerank", {"query": "a", "documents": ["a"], "top_n": 0}, "top_n"),
        ("rerank", {"query": "a", "documents": ["a"], "method": "yes_no"}, "yes from no"),
        ("rerank", {"query": "the cat " * 100, "documents": ["a"]}, "shorten the query"),
        ("rerank", {"query": "a", "documents": ["a", " "]}, "position 1 is empty"),
        ("rerank", {"query": "a", "documents": ["a"], "max_tokens_per_doc": 9}, "max_tokens_per_doc is not supported"),
        ("embeddings", {"input": "a", "dimensions": True}, "dimensions: expected a number, got a truth value"),
        ("embeddings", {"input": [-1]}, "greater than or equal to 0"),
        ("completions", {"prompt": "the cat", "max_tokens": True}, "max_tokens: expected a number"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
        ),
        ("chat/completions", {"messages": [{"role": "user", "content": "a", "odd": 1}]}, "messages.0.odd"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "king", "content": "a"}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "f"}]}, "tools"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "top_p": 0}, "top_p"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(url, path, body, said):
    error = post(url, path, 400, **body)["error"]
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (b'{"input": "a"}', "application/x-www-form-urlencoded", "Content-Type: application/json"),
        (b'{"input": "a"}', "text/plain", "Content-Type: application/json"),
        (b'["a"]', "application/json", "expected a JSON object"),
        (b"", "application/json", "expected a JSON object"),
        (b'{"input": ', "application/json", "the body is not JSON"),
        (b'{"input": "\\ud800"}', "application/json", "half a character"),
        (b'{"input": ["a", "\\udc00"]}', "application/json", "half a character"),
    ],
)
def test_a_body_that_is_no_request_is_refused_with_what_to_send(url, content, kind, said):
    answer = client.post(f"{url}/v1/embeddings", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_what_is_not_here_says_what_is(url):
    wrong = client.get(f"{url}/v1/embeddings")
    assert (wrong.status_code, wrong.headers["Allow"]) == (405, "POST")
    gone = client.post(f"{url}/v1/responses", json={})
    assert gone.status_code == 404
    assert "POST /v1/responses" in gone.json()["error"]["message"]
    assert client.head(f"{url}/health").status_code == 200


def test_null_asks_for_nothing(url):
    null = dict.fromkeys(["temperature", "stop", "stream", "functions", "verbosity", "max_completion_tokens", "n"])
    asked = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 3}
    plain, other = (post(url, "chat/completions", **asked, **more)["choices"] for more in ({}, null))
    assert other == plain
    post(url, "embeddings", input="a", encoding_format=None, dimensions=None)
    assert "input" in post(url, "embeddings", 400, input=None)["error"]["message"]


def test_an_answer_can_come_back_as_clients_write_it(url):
    ask = {"role": "user", "content": "the cat"}
    said = {"role": "assistant", "content": "sits"}
    empty = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    plain, other = (
        post(url, "chat/completions", messages=[ask, answer, ask], max_tokens=3)["choices"]
        for answer in (said, said | empty)
    )
    assert other == plain
    calls = said | {"tool_calls": [{"id": "x"}]}
    assert "messages.1.tool_calls" in post(url, "chat/completions", 400, messages=[ask, calls])["error"]["message"]


def test_documents_of_a_ranking_come_back_as_they_were(url):
    documents = [{"text": "the cat", "id": 5}, {"text": "a red bird", "title": "Birds"}]
    asked = {"query": "the bird", "return_documents": True, "rank_fields": ["text"], "truncation": True, "priority": 1}
    found = post(url, "rerank", documents=documents, **asked)["results"]
    assert [result["document"] for result in found] == [documents[result["index"]] for result in found]
    plain = post(url, "rerank", query="the bird", documents=[document["text"] for document in documents])["results"]
    assert [result["index"] for result in found] == [result["index"] for result in plain]


def test_a_chat_that_the_template_refuses_is_the_clients_matter(url, model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ raise_exception('System role not supported') }}")
    error = post(url, "chat/completions", 400, messages=[{"role": "system", "content": "a"}])["error"]
    assert "System role not supported" in error["message"]


@pytest.mark.parametrize("temperature", [1e-320, 1e-10])
def test_a_temperature_near_0_is_greedy(url, temperature):
    greedy = post(url, "completions", prompt="the cat", max_tokens=5, temperature=0)["choices"]
    assert post(url, "completions", prompt="the cat", max_tokens=5, temperature=temperature)["choices"] == greedy


def test_another_model_is_refused_and_neutral_fields_are_taken(url):
    assert "only 'tiny'" in post(url, "embeddings", 404, input="a", model="other")["error"]["message"]
    neutral = {"n": 1, "user": "me", "logprobs": None, "presence_penalty": 0.0, "tools": None, "logit_bias": {}}
    assert post(url, "completions", prompt="the cat", max_tokens=2, model="tiny", **neutral)["choices"]


def test_health_models_and_metrics(url, engine):
    post(url, "embeddings", input=TEXTS)
    post(url, "completions", prompt="the cat", max_tokens=3)
    client.get(f"{url}/nothing/here")
    assert client.get(f"{url}/v1/models/tiny").json()["dimension"] == engine.dimension
    assert client.get(f"{url}/v1/models/other").status_code == 404
    page = client.get(f"{url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert float(values['ubmoe_requests_total{route="/v1/embeddings",status="200"}']) >= 1
    assert float(values['ubmoe_requests_total{route="other",status="404"}']) >= 1
    assert float(values["ubmoe_generated_tokens_total"]) >= 3
    assert float(values["ubmoe_embedded_tokens_total"]) >= 20
    assert float(values["ubmoe_running_generations"]) == 0
    paths = client.get(f"{url}/openapi.json").json()["paths"]
    assert {"/v1/embeddings", "/v1/chat/completions", "/v1/completions", "/v1/rerank", "/health"} <= set(paths)
    assert client.get(f"{url}/docs").status_code == 200


@pytest.mark.parametrize("name", ["batch_tokens", "generations", "timeout_s", "max_queue"])
def test_settings_refuse_what_makes_no_sense(name):
    with pytest.raises(ValueError, match=name):
        Settings(**{name: 0})
