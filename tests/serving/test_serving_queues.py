"""Who waits for what: searches beside other routes, cancellations, several prompts, Ray Serve that others use."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from helpers.servers import Slow, serving

pytest.importorskip("fastapi")

import uvicorn
from fastapi.testclient import TestClient

from ubmoe_st import UBMoE
from ubmoe_st.index import Hit
from ubmoe_st.serving import Settings, TorchEngine, create_app, ray_app
from ubmoe_st.serving.batching import Busy, Generations, within
from ubmoe_st.serving.command import ending_server


@pytest.fixture(scope="module")
def engine(checkpoint):
    return TorchEngine(UBMoE(str(checkpoint), low_memory=True, device="cpu"), "tiny")


class HeldIndex:
    """An index whose searches last until the test lets them end."""

    def __init__(self):
        self.free, self.began = threading.Event(), threading.Semaphore(0)

    def refresh(self):
        return False

    def search_entries(self, queries, k, **options):
        self.began.release()
        self.free.wait(30)
        return [[Hit("a", 1.0, "text", None, None, 0, 4, {}, 0, "/a/place/of/the/server")]]


def test_slow_searches_take_nothing_from_other_routes_and_too_many_get_429(engine):
    index = HeldIndex()
    settings = Settings(searches=1, max_waiting=2)
    with TestClient(create_app(engine, index=index, settings=settings)) as client:
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(client.post("/v1/search", json={"query": "the cat"})))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        assert index.began.acquire(timeout=20)
        while sum(answer.status_code == 429 for answer in found) < 5:
            assert len(found) <= 5
        assert client.post("/v1/embeddings", json={"input": "the cat"}).status_code == 200
        asked = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 2}
        assert client.post("/v1/chat/completions", json=asked).status_code in (200, 400)  # without a chat template
        assert not index.began.acquire(blocking=False), "more searches at a time than were allowed"
        index.free.set()
        for thread in threads:
            thread.join(20)
        good = [answer.json()["data"] for answer in found if answer.status_code == 200]
        assert len(good) == 3
        assert good[0][0]["index"] == "server"
        assert client.post("/v1/search", json={"query": "the cat"}).status_code == 200


def test_a_cancellation_in_the_moment_of_the_result_is_not_lost():
    async def attempt():
        loop = asyncio.get_running_loop()
        result, given_back = loop.create_future(), []
        waiting = asyncio.ensure_future(within(result, 30, give_back=lambda: given_back.append(1)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        result.set_result("a turn")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert given_back == [1]
        with pytest.raises(TimeoutError):
            await within(asyncio.sleep(30), 0.01)
        assert await within(asyncio.sleep(0, "result"), 30) == "result"

    asyncio.run(attempt())


def test_a_turn_that_comes_with_the_cancellation_is_given_back():
    class Quiet:
        def generate_tokens(self, ids, sampling, on_token):
            pass

    async def attempt():
        generations = Generations(Quiet(), Settings(generations=1))
        await generations._slots.acquire()
        waiting = asyncio.ensure_future(generations._begin(lambda: None, threading.Event()))
        while not generations.waiting:
            await asyncio.sleep(0)
        generations._slots.release()
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert generations.running == generations.waiting == 0
        await asyncio.wait_for(generations._slots.acquire(), 5)

    asyncio.run(attempt())


def test_a_text_of_a_request_that_was_taken_in_waits_however_many_do(engine):
    async def attempt():
        generations = Generations(engine, Settings(generations=1, max_waiting=1))
        await generations._slots.acquire()
        generations.waiting = 1
        sampling = types.SimpleNamespace(max_tokens=1)
        with pytest.raises(Busy):
            await anext(generations.run([5], sampling))
        later = asyncio.ensure_future(anext(generations.run([5], sampling, taken=True)))
        await asyncio.sleep(0.01)
        assert not later.done()
        later.cancel()
        await asyncio.gather(later, return_exceptions=True)

    asyncio.run(attempt())


def test_newer_names_and_truth_values_are_read_alike_on_every_route(engine):
    index = HeldIndex()
    index.free.set()
    with TestClient(create_app(engine, index=index)) as client:
        refused = client.post("/v1/completions", json={"prompt": "the cat", "n": True})
        assert refused.status_code == 400
        assert "n is not supported" in refused.text
        asked = client.post("/v1/ask", json={"question": "the cat", "max_completion_tokens": 0})
        assert asked.status_code == 400
        assert "max_completion_tokens" in asked.text
        body = {"prompt": "the cat", "max_completion_tokens": 2, "max_tokens": 9}
        assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] <= 2


@pytest.mark.parametrize("others", [False, True])
def test_ray_serve_of_others_stays_when_the_command_ends(monkeypatch, others):
    done = {}

    class Serve:
        @staticmethod
        def status():
            return types.SimpleNamespace(proxies={"node": "HEALTHY"} if others else {})

        @staticmethod
        def start(http_options):
            done["start"] = http_options

        @staticmethod
        def run(application, name, route_prefix):
            done["run"] = application
            threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()

        @staticmethod
        def delete(name):
            done["delete"] = name

        @staticmethod
        def shutdown():
            done["shutdown"] = True

    ray = types.ModuleType("ray")
    ray.is_initialized = lambda: True
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(ray_app, "import_serve", lambda: Serve)
    monkeypatch.setattr(ray_app, "build", lambda arguments: arguments)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        options = {"replicas": 1, "host": "127.0.0.1", "port": 8000, "settings": Settings()}
        ray_app.run("model", **options, api_key=None)
        assert done["run"]["local"] is True, "without a key only loopback names are answered"
        assert ("start" in done, "shutdown" in done, "delete" in done) == (not others, not others, others)
        ray_app.run("model", **options, api_key="a key")
        assert done["run"]["local"] is False
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_chat_template_may_break_loops_mark_answers_and_write_json():
    from ubmoe_st.serving.native import NativeUBMoE

    pytest.importorskip("jinja2")
    template = (
        "{% for message in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ message.content }}{% endgeneration %}{{ message | tojson(false, 1) }}{% endfor %}"
    )
    engine = object.__new__(NativeUBMoE)
    engine.parts = types.SimpleNamespace(chat_template=template, special_tokens={})
    said = [{"role": "user", "content": "ä"}, {"role": "user", "content": "never"}]
    assert engine._chat_text(said) == 'ä{\n "role": "user",\n "content": "ä"\n}'
    engine.parts.chat_template = "{% nothing %}"
    with pytest.raises(ValueError, match="the chat template does not take this chat"):
        engine._chat_text(said)


WAITING = {
    "completions": {"prompt": "the cat", "max_tokens": 10_000},
    "streamed": {"prompt": "the cat", "max_tokens": 10_000, "stream": True},
    "rerank": {"query": "the cat", "documents": ["a dog"]},
}


@pytest.mark.parametrize("kind", WAITING)
def test_a_server_that_ends_says_so_to_who_waits(engine, kind):
    """Those whose text is generated, and those who wait for their turn."""
    held = Slow(engine)
    held.context = 10**6
    app = create_app(held, settings=Settings(generations=1))
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=10)
    server = ending_server(config, app.state.service.generations.end, 0.2)
    path = kind.replace("streamed", "completions")
    with serving(server) as url, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(httpx.post, f"{url}/v1/{path}", json=WAITING[kind], timeout=30) for _ in range(2)]
        assert held.running.wait(20)
        while not app.state.service.generations.waiting:
            time.sleep(0.01)
        server.should_exit = True
        answers = [one.result() for one in asked]
    for answer in answers:
        if kind == "streamed":
            last = answer.text.strip().rpartition("data: ")[2]
            assert json.loads(last)["error"]["code"] == "server_ending"
        else:
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "server_ending"
