"""Text in, text out: chats, streaming, and input that cannot be continued."""

from __future__ import annotations

import pytest

from ubmoe_st import UBMoE


@pytest.fixture(scope="module")
def model(checkpoint):
    return UBMoE(str(checkpoint))


def test_chats_go_through_the_chat_template(model):
    chat = [{"role": "user", "content": "the cat"}]
    assert model.generate(chat, max_new_tokens=5) == model.generate("user the cat</s> assistant ", max_new_tokens=5)
    both = model.generate([chat, "the dog"], max_new_tokens=5)
    assert both == [model.generate(chat, max_new_tokens=5), model.generate("the dog", max_new_tokens=5)]


def test_streaming_gives_the_pieces_of_the_text(model):
    pieces = list(model.generate("a red bird", max_new_tokens=6, stream=True))
    assert len(pieces) > 1
    assert "".join(pieces).split() == model.generate("a red bird", max_new_tokens=6).split()


def test_a_stream_that_is_abandoned_stops(model):
    import threading

    before = threading.active_count()
    stream = model.generate("the cat", max_new_tokens=100, stream=True, eos_token_id=None)
    next(stream)
    stream.close()
    for _ in range(100):
        if threading.active_count() <= before:
            break
        threading.Event().wait(0.05)
    assert threading.active_count() <= before


def test_bad_generation_input(model):
    with pytest.raises(ValueError, match="max_tokens"):
        model.generate("the", max_tokens=3)
    with pytest.raises(ValueError, match="max_tokens"):
        list(model.generate("the", max_tokens=3, stream=True))
    with pytest.raises(ValueError, match="routing must be one of"):
        model.generate("the", routing="gate")
    with pytest.raises(ValueError, match="needs trained routers"):
        model.generate("the", routing="router")
    with pytest.raises(ValueError, match="takes one prompt"):
        model.generate(["the", "a"], stream=True)
    with pytest.raises(ValueError, match="position 1 is empty"):
        model.generate(["the", ""])
    with pytest.raises(TypeError, match="position 1 must be a text"):
        model.generate(["the", 3])
    with pytest.raises(ValueError, match="at least 1"):
        model.generate("the", max_new_tokens=0)
    assert model.generate([]) == []
