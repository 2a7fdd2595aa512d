"""The clients that people use, against `ubmoe serve` on the loopback."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from helpers.models import TEXTS
from typer.testing import CliRunner

from ubmoe_st import EmbeddingIndex, UBMoE
from ubmoe_st.cli import app as command_line

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

KEY = "a-key-for-tests"
CHAT = [{"role": "user", "content": "the cat"}]


# Where torchao is installed, transformers imports it, and it tells of its libraries for other processors.
TORCHAO_SAYS = re.compile(r"^Failed to load \S*torchao|torch/utils/_pytree\.py:\d+\] <enum ")


@contextmanager
def served(*arguments):
    """`ubmoe serve` in a process of its own; gives its address and ends it as a terminal would."""
    command = [sys.executable, "-m", "ubmoe_st.cli", "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "UBMOE_API_KEY"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline().strip()
            assert line.startswith("http"), process.stderr.read()
            yield line
        finally:
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
    assert process.returncode in (0, -signal.SIGTERM), rest
    own = [line for line in rest.splitlines() if not TORCHAO_SAYS.search(line)]
    assert not own, rest


@pytest.fixture(scope="module")
def corpus_index(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving") / "index"
    rows = [{"id": str(number), "text": text, "n": number} for number, text in enumerate(TEXTS)]
    EmbeddingIndex.build(UBMoE(str(checkpoint), device="cpu"), rows, folder)
    return folder


@pytest.fixture(scope="module")
def url(checkpoint, corpus_index):
    with served(checkpoint, "--api-key", KEY, "--index", corpus_index, "--name", "tiny") as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def model(checkpoint):
    return UBMoE(str(checkpoint), device="cpu")


def test_openai_embeds(client, model):
    # The client asks for base64 by itself and unpacks it.
    found = client.embeddings.create(model="tiny", input=TEXTS)
    np.testing.assert_allclose([entry.embedding for entry in found.data], model.encode(TEXTS), atol=1e-5)
    query = client.embeddings.create(model="tiny", input=TEXTS[0], extra_body={"input_type": "query"}, dimensions=8)
    expected = model.encode_query(TEXTS[0])[:8]
    np.testing.assert_allclose(query.data[0].embedding, expected / np.linalg.norm(expected), atol=1e-5)


def test_openai_chats_whole_and_streamed(client, model):
    whole = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=8)
    text = whole.choices[0].message.content
    assert text.strip() == model.generate(CHAT, max_new_tokens=8).strip()
    pieces = list(
        client.chat.completions.create(
            model="tiny", messages=CHAT, max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text
    assert pieces[-1].usage == whole.usage
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    completion = client.completions.create(model="tiny", prompt="the cat", max_tokens=8)
    assert completion.choices[0].text.strip() == model.generate("the cat", max_new_tokens=8).strip()
    assert [entry.id for entry in client.models.list()] == ["tiny"]


def test_openai_raises_its_own_errors(client, url):
    with pytest.raises(openai.AuthenticationError, match="Bearer KEY"):
        openai.OpenAI(base_url=url, api_key="other", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError, match="only 'tiny'"):
        client.embeddings.create(model="other", input="a")
    with pytest.raises(openai.BadRequestError, match="longest the encoder takes") as caught:
        client.embeddings.create(model="tiny", input="the cat " * 100)
    assert caught.value.code == "context_length_exceeded"


def test_async_clients_at_once_get_the_serial_results(url, model):
    async def ask():
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as client:
            embed = [client.embeddings.create(model="tiny", input=TEXTS[i % 4]) for i in range(24)]
            talk = [client.completions.create(model="tiny", prompt="the cat", max_tokens=8) for _ in range(6)]
            return await asyncio.gather(*embed), await asyncio.gather(*talk)

    embedded, said = asyncio.run(ask())
    expected = model.encode(TEXTS)
    for position, found in enumerate(embedded):
        np.testing.assert_allclose(found.data[0].embedding, expected[position % 4], atol=1e-5)
    assert len({found.choices[0].text for found in said}) == 1


def test_langchain_embeds_and_chats(url, model):
    langchain = pytest.importorskip("langchain_openai")
    options = {"base_url": url, "api_key": KEY, "model": "tiny"}
    # Otherwise it cuts texts into tokens of a tokenizer of OpenAI's.
    embeddings = langchain.OpenAIEmbeddings(**options, check_embedding_ctx_length=False)
    np.testing.assert_allclose(embeddings.embed_documents(TEXTS), model.encode(TEXTS), atol=1e-5)
    chat = langchain.ChatOpenAI(**options, max_tokens=8, temperature=0, seed=1)
    expected = model.generate(CHAT, max_new_tokens=8)
    assert chat.invoke("the cat").content.strip() == expected.strip()
    assert "".join(piece.content for piece in chat.stream("the cat")).strip() == expected.strip()


def test_curl_searches_and_asks(url, corpus_index, model):
    def curl(path, body):
        command = ["curl", "-sS", f"{url}/{path}", "-H", f"Authorization: Bearer {KEY}", "-H"]
        command += ["Content-Type: application/json", "-d", json.dumps(body)]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    index = EmbeddingIndex.open(corpus_index, model=model)
    expected = [hit.as_dict() for hit in index.search_entries("the cat", 3)[0]]
    found = curl("search", {"query": "the cat", "k": 3})["data"]
    assert [hit["id"] for hit in found] == [hit["id"] for hit in expected]
    np.testing.assert_allclose([h["score"] for h in found], [h["score"] for h in expected], atol=1e-5)
    only = curl("search", {"query": "the cat", "filter": {"n": {">": 2}}})["data"]
    assert [hit["metadata"] for hit in only] == [{"n": 3}]
    answer = curl("ask", {"question": "the cat", "k": 1, "max_tokens": 4})
    assert [hit["id"] for hit in answer["entries"]] == [expected[0]["id"]]
    assert answer["usage"]["completion_tokens"] <= 4
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert "entry" in curl("ask", {"question": "the cat", "filter": {"n": 99}})["error"]["message"]
    assert "mode" in curl("search", {"query": "the cat", "mode": "odd"})["error"]["message"]
    assert "bm25" in curl("search", {"query": "the cat", "mode": "bm25"})["error"]["message"].lower()


# --- the command -----------------------------------------------------------------------------------------------------


def refused(*arguments):
    result = CliRunner().invoke(command_line, ["serve", *map(str, arguments)], env={"UBMOE_API_KEY": ""})
    assert result.exit_code == 1, result.output
    error = result.stderr[result.stderr.index("error:") :]
    assert len(error.strip().splitlines()) == 1
    return error


def test_without_a_key_it_listens_on_loopback_only(checkpoint):
    assert "this machine only" in refused(checkpoint, "--host", "0.0.0.0")
    from ubmoe_st.serving.app import check_host

    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        check_host(host, None)
    for host in ("0.0.0.0", "::", "192.168.0.2", "example.org", ""):
        with pytest.raises(ValueError, match="this machine only"):
            check_host(host, None)
        check_host(host, KEY)
    with pytest.raises(ValueError, match="empty"):
        check_host("0.0.0.0", " ")
    for key in ("a key\n", " key", "кey", "a\tkey"):
        with pytest.raises(ValueError, match="a header cannot carry"):
            check_host("127.0.0.1", key)


def test_what_cannot_be_served_is_told_before_anything_is_loaded(checkpoint, tmp_path):
    import socket

    assert "not a UBMoE checkpoint" in refused(tmp_path)
    for engine in ("ray", "torch"):
        assert "--engine llama.cpp" in refused(checkpoint, "--gguf", "x.gguf", "--engine", engine)
        assert "--engine llama.cpp" in refused(checkpoint, "--context", 64, "--engine", engine)
    assert "--engine ray" in refused(checkpoint, "--replicas", 2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in refused(checkpoint, "--port", taken.getsockname()[1])
