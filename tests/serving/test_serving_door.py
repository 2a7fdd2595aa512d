"""Who is let in, and what is refused, with which words."""

from __future__ import annotations

import json

import pytest
from helpers.models import TEXTS
from helpers.requests import client, post, running
from pydantic import ValidationError

from ubmoe_st.serving import Settings, create_app
from ubmoe_st.serving.schemas import ChatRequest, CompletionRequest, EmbeddingRequest, RerankRequest

KEY = "a-key-for-tests"


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
    for host in ("127.0.0.2:8000", "LOCALHOST", "[::1]:80"):
        assert client.get(f"{url}/v1/models", headers={"Host": host}).status_code == 200, host
    for host in ("pages.example", "127.0.0.1.pages.example:80", "10.0.0.1", "", "["):
        answer = client.get(f"{url}/v1/models", headers={"Host": host})
        assert answer.status_code == 400, host
        assert "this server answers to 127.0.0.1 and localhost" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (EmbeddingRequest, {"input": [{}] * 5000}),
        (EmbeddingRequest, {"input": [[0.5] * 50] * 100}),
        (EmbeddingRequest, {"input": ["a"] * 5000 + [None] * 5000}),
        (EmbeddingRequest, {"input": "a", **{f"x{number}": 1 for number in range(5000)}}),
        (ChatRequest, {"messages": [{}] * 5000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 5000}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": "a", **{f"x{n}": 1 for n in range(5000)}}]}),
        (CompletionRequest, {"prompt": [[-1] * 5000] * 9}),
        (RerankRequest, {"query": "a", "documents": [1] * 5000}),
    ],
)
def test_a_body_in_which_everything_is_wrong_makes_few_errors(kind, body):
    """They are made in the event loop, and everybody waits."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert 1 <= caught.value.error_count() <= 8


def test_a_refused_field_is_named(url):
    huge = {"prompt": "the cat", "logit_bias": {str(number): 1 for number in range(5000)}}
    for body, param in (
        ({"prompt": "the cat", "n": 2}, "n"),
        (huge, "logit_bias"),
    ):
        error = post(url, "completions", status=400, **body)["error"]
        assert error["param"] == param
        assert len(error["message"]) < 300


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
