"""Completions and chats over HTTP are those of the base model."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.requests import client, greedy, post
from transformers import GenerationConfig

from ubmoe_st import UBMoE
from ubmoe_st.serving.engine import NOT_SERVED, SHAPING, Sampler, Sampling, TorchEngine, sampler, tell_unapplied
from ubmoe_st.serving.text import TextStream


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


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"prompt_lookup_num_tokens": 3}, None),
        ({"num_beams": 3}, "num_beams=3"),
        ({"num_beams": 2, "num_return_sequences": 2}, "num_return_sequences=2"),
        ({"stop_strings": ["red"]}, "stop_strings=['red']"),
    ],
)
def test_what_a_base_asks_for_beside_one_greedy_text_is_told(lm, model, monkeypatch, caplog, asked, told):
    config = GenerationConfig.from_dict({**model.generator.generation_config.to_dict(), **asked})
    monkeypatch.setattr(model.generator, "generation_config", config)
    engine = TorchEngine(model, "tiny")
    prompt = "the cat the cat the cat the"
    tokens = []
    engine.generate_tokens(engine.continuation_ids(prompt), Sampling(12), lambda token: tokens.append(token) or True)
    assert tokens == greedy(lm, model, prompt, 12)
    assert (told in caplog.text) if told else not caplog.records


def test_what_an_engine_does_not_apply_is_told(caplog):
    asked = {"repetition_penalty": 1.1, "min_p": 0.1, "do_sample": True, "no_repeat_ngram_size": 0, "top_k": 20}
    for defaults, keys, said in (
        (asked, SHAPING, ["min_p", "repetition_penalty"]),
        (asked | {"do_sample": False}, SHAPING, ["repetition_penalty"]),
        ({"guidance_scale": 2.0, "max_time": 3.0}, SHAPING, ["guidance_scale", "max_time"]),
        ({"guidance_scale": 2.0, "max_time": 3.0}, NOT_SERVED, []),
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


def test_tokens_are_drawn_where_a_request_says_from_how_many():
    """As in OpenAI's API, whose temperature is 1 where none is given."""
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32) * 3
    for asked in ({"top_p": 0.9}, {"top_k": 5}):
        drawn, wanted = (sampler(Sampling(4, **asked, **more), {}) for more in ({}, {"temperature": 1.0}))
        np.testing.assert_array_equal(drawn.probabilities(logits), wanted.probabilities(logits))
        assert (drawn.probabilities(logits) > 0).sum() > 1
        assert sampler(Sampling(4, temperature=0.0, **asked), {}) is None
        of_base = sampler(Sampling(4, **asked), {"do_sample": True, "temperature": 0.5})
        assert (of_base.probabilities(logits) != wanted.probabilities(logits)).any()
    assert sampler(Sampling(4), {}) is None


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
