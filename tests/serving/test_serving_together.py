"""Many clients at once: batches, queues, and clients that go away."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from helpers.models import WORDS
from helpers.requests import client, post, running, vectors_of
from helpers.servers import Slow

from ubmoe_st.serving import Settings, create_app
from ubmoe_st.serving.batching import choose


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
