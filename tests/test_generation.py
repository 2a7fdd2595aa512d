"""Text in, text out: chats, streaming, and input that cannot be continued."""

from __future__ import annotations

import copy
import random
import threading
import time

import numpy as np
import pytest
import torch
from helpers.benchmark_data import make_base as make_byte_base
from helpers.gguf import sentencepiece_tokenizer
from helpers.models import make_base, make_checkpoint
from transformers import GenerationConfig, LlamaTokenizer, LogitsProcessor, TextStreamer, pipeline

from ubmoe_st import UBMoE
from ubmoe_st.detokenization import IncrementalText

TEMPLATE_WITH_PARTS = (
    "{% for t in tools or [] %}{{ t['function']['name'] + ' ' }}{% endfor %}"
    "{% for m in messages %}{{ m['role'] + ' ' }}"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{{ 'old ' + p['text'] }}{% endfor %}{% endif %}{{ '</s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% if colour is defined %}{{ colour + ' ' }}{% endif %}{% endif %}"
)
NEVER_ENDS = {"eos_token_id": None, "do_sample": False}


@pytest.fixture(scope="module")
def model(checkpoint):
    return UBMoE(str(checkpoint))


@pytest.fixture
def stock(model, base):
    """The stock pipeline on the untouched base; it and the model get a generation config and a template of the test."""
    lm, tokenizer = model.generator, model.tokenizer
    kept = lm.generation_config, tokenizer.chat_template
    generator = pipeline("text-generation", model=str(base), device="cpu")
    lm.generation_config = copy.deepcopy(kept[0])
    yield generator
    lm.generation_config, tokenizer.chat_template = kept


def new_text(stock, prompt, **options) -> str:
    return stock(prompt, return_full_text=False, do_sample=False, **options)[0]["generated_text"]


LIMITS = {
    "none": ({}, {}),
    "max_length": ({}, {"max_length": 9}),
    "max_length beside None": ({}, {"max_length": 9, "max_new_tokens": None}),
    "config of the call": ({}, {"generation_config": GenerationConfig(max_new_tokens=4, do_sample=False)}),
    "max_length of the call's config": ({}, {"generation_config": GenerationConfig(max_length=8, do_sample=False)}),
    "config of the model": ({"max_new_tokens": 7}, {}),
    "max_length of the model": ({"max_length": 10}, {}),
    "call before model": ({"max_new_tokens": 7}, {"max_new_tokens": 3}),
    "call's config before model": (
        {"max_new_tokens": 7},
        {"generation_config": GenerationConfig(max_new_tokens=5, do_sample=False)},
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_limit_of_the_caller_wins_as_in_the_stock_pipeline(model, stock, name):
    of_model, of_call = LIMITS[name]
    for lm in (model.generator, stock.model):
        lm.generation_config.update(**of_model)
        lm.generation_config.eos_token_id = None
    calls = []

    def counted(self, *args, **kwargs):
        calls.append(sum(1 for _ in generate_ids(self, *args, **kwargs)[0]))
        return torch.zeros(1, calls[-1], dtype=torch.long)

    generate_ids = type(model.generator).generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.generator), "generate", counted)
        model.generate(
            "the cat sits", **{"do_sample": False, **of_call} if "generation_config" not in of_call else of_call
        )
        new_text(stock, "the cat sits", **of_call) if "generation_config" not in of_call else stock(
            "the cat sits", **of_call
        )
    ours, theirs = calls
    assert ours == theirs
    assert (ours == 3 + 256) == (name == "none")


def test_max_length_of_a_call_goes_before_a_stored_limit(model, stock):
    model.generator.generation_config.max_new_tokens = 2
    expected = model.generate("the cat sits", max_new_tokens=6, **NEVER_ENDS)
    assert model.generate("the cat sits", max_length=9, **NEVER_ENDS) == expected
    assert model.generate("the cat sits", **NEVER_ENDS) != expected


def test_the_configs_of_a_caller_stay_as_they_are(model):
    config = GenerationConfig(max_new_tokens=4, do_sample=False)
    before = config.to_dict()
    model.generate(["the cat", "a red bird sleeps"], generation_config=config)
    assert config.to_dict() == before
    with pytest.raises(TypeError, match="must be a transformers GenerationConfig, got dict"):
        model.generate("the cat", generation_config={"max_new_tokens": 4})


OPEN = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sits on"}]
CLOSED = OPEN[:1]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]}]


def a_tool(place: str) -> str:
    """Tell what is there.

    Args:
        place: Where.
    """
    return place


@pytest.mark.parametrize(
    ("chat", "options"),
    [
        (OPEN, {}),
        (CLOSED, {}),
        (OPEN, {"continue_final_message": False}),
        (CLOSED, {"continue_final_message": True}),
        (PARTS, {}),
        (CLOSED, {"tools": [a_tool]}),
        (CLOSED, {"chat_template_kwargs": {"colour": "red"}}),
    ],
)
def test_chats_become_the_tokens_of_the_stock_pipeline(model, stock, chat, options):
    model.tokenizer.chat_template = stock.tokenizer.chat_template = TEMPLATE_WITH_PARTS
    theirs = {key: value for key, value in options.items() if key != "chat_template_kwargs"}
    if "chat_template_kwargs" in options:
        theirs["tokenizer_encode_kwargs"] = options["chat_template_kwargs"]
    prompts = []

    def caught(self, input_ids, **kwargs):
        prompts.append(input_ids.tolist())
        return input_ids

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.generator), "generate", caught)
        model.generate(chat, max_new_tokens=4, **options)
        new_text(stock, chat, max_new_tokens=4, **theirs)
    ours, expected = prompts
    assert ours == expected
    assert model.generate(chat, max_new_tokens=4, **options) == new_text(stock, chat, max_new_tokens=4, **theirs)


def test_the_ways_to_write_a_chat_differ(model, stock):
    from ubmoe_st.generation import ChatOptions, chat_text

    tokenizer = model.tokenizer
    tokenizer.chat_template = TEMPLATE_WITH_PARTS
    ways = [(OPEN, {}), (CLOSED, {}), (OPEN, {"continue_final_message": False}), (PARTS, {})]
    ways += [(CLOSED, {"tools": [a_tool]}), (CLOSED, {"chat_template_kwargs": {"colour": "red"}})]
    assert len({chat_text(tokenizer, chat, ChatOptions(**options)) for chat, options in ways}) == len(ways)


def test_parts_are_joined_for_a_template_that_knows_texts_alone(model, stock):
    expected = model.generate(CLOSED, max_new_tokens=5)
    assert model.generate(PARTS, max_new_tokens=5) == expected
    model.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}</s> {% endfor %}assistant "
    )
    assert model.generate(PARTS, max_new_tokens=5) == expected  # this one would print the list
    image = [{"role": "user", "content": [{"type": "image", "url": "cat.png"}]}]
    with pytest.raises(ValueError, match="part of type 'image': this model reads text alone"):
        model.generate(image)


def test_stop_strings_need_no_tokenizer(tmp_path):
    base = make_byte_base(tmp_path / "base")  # transformers finds no stop strings with a vocabulary of whole words
    model = UBMoE(str(make_checkpoint(base, tmp_path / "ubmoe")), device="cpu")
    whole = model.generate("the cat", max_new_tokens=12, **NEVER_ENDS)
    stop = whole[4]
    options = {"max_new_tokens": 12, "eos_token_id": None}
    stock = pipeline("text-generation", model=str(base), device="cpu")
    expected = new_text(stock, "the cat", stop_sequence=stop, **options)
    assert len(expected) < len(whole)
    assert model.generate("the cat", stop_strings=stop, do_sample=False, **options) == expected
    config = GenerationConfig(max_new_tokens=12, stop_strings=[stop], do_sample=False)
    assert model.generate("the cat", generation_config=config, eos_token_id=None) == expected


def test_options_of_chats_are_refused_where_there_is_none(model):
    with pytest.raises(ValueError, match="tools: of use for chats alone"):
        model.generate("the cat", tools=[a_tool])
    with pytest.raises(ValueError, match="'tokenize', which is no variable"):
        model.generate(CLOSED, chat_template_kwargs={"tokenize": True})


def test_chats_go_through_the_chat_template(model):
    chat = [{"role": "user", "content": "the cat"}]
    assert model.generate(chat, max_new_tokens=5) == model.generate("user the cat</s> assistant ", max_new_tokens=5)
    both = model.generate([chat, "the dog"], max_new_tokens=5)
    assert both == [model.generate(chat, max_new_tokens=5), model.generate("the dog", max_new_tokens=5)]


def test_streaming_gives_the_pieces_of_the_text(model):
    pieces = list(model.generate("a red bird", max_new_tokens=6, stream=True))
    assert len(pieces) > 1
    assert "".join(pieces).split() == model.generate("a red bird", max_new_tokens=6).split()


def llama_2_tokenizer():
    """As of Llama 2: spaces are letters, and the decoder strips one from where a text begins."""
    words = ["\u2581def", "\u2581f", "():", "\u2581\u2581\u2581", "\u2581return", "\u25811", "\u2581a", "a", "\u2581"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    return LlamaTokenizer(vocab={name: number for number, name in enumerate(names)}, merges=[])


def test_a_stream_keeps_the_spaces_that_begin_a_line(tmp_path):
    tokenizer = llama_2_tokenizer()
    base = make_base(tmp_path / "base", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(base)
    model = UBMoE(str(make_checkpoint(base, tmp_path / "checkpoint")))
    wanted = "\u2581def \u2581f (): <0x0A> \u2581\u2581\u2581 \u2581return \u25811 </s>".split()
    ids = tokenizer.convert_tokens_to_ids(wanted)
    began = len(tokenizer("a")["input_ids"])

    def force(tokens, scores):
        forced = torch.full_like(scores, -1e9)
        forced[:, ids[tokens.shape[1] - began]] = 0
        return forced

    whole = model.generate("a", max_new_tokens=9, logits_processor=[force])
    assert whole == "def f():\n    return 1"
    pieces = list(model.generate("a", max_new_tokens=9, logits_processor=[force], stream=True))
    assert "".join(pieces) == whole
    assert len(pieces) >= 6


@pytest.mark.parametrize("kind", ["words", "llama-2", "gemma"])
def test_pieces_of_any_tokens_are_their_text(kind, model):
    """Whole characters, though a character may be four tokens."""
    made = {"words": lambda: model.tokenizer, "llama-2": llama_2_tokenizer, "gemma": sentencepiece_tokenizer}
    tokenizer = made[kind]()

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    rng = random.Random(0)
    # Bytes that are no character together have no one text.
    known = [n for n in range(len(tokenizer)) if not tokenizer.convert_ids_to_tokens(n).startswith("<0x")]
    known += [n for n in tokenizer.convert_tokens_to_ids(["<0x0A>"]) if kind != "words"]
    snow = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "\u2603".encode()]
    for _ in range(300):
        ids = rng.choices(known, k=rng.randrange(1, 12))
        if kind != "words":
            at = rng.randrange(len(ids) + 1)
            ids[at:at] = snow
        text = IncrementalText(decode)
        pieces = [text.push(token) for token in ids]
        assert "".join([*pieces, text.rest()]) == decode(ids)
    if kind != "words":
        text = IncrementalText(decode)
        assert [text.push(token) for token in snow] == ["", "", "\u2603"]


def test_a_stream_that_is_abandoned_stops(model):
    before = threading.active_count()
    stream = model.generate("the cat", max_new_tokens=100, stream=True, eos_token_id=None)
    next(stream)
    stream.close()
    for _ in range(100):
        if threading.active_count() <= before:
            break
        threading.Event().wait(0.05)
    assert threading.active_count() <= before


class Slow(LogitsProcessor):
    """A model whose every token takes a moment."""

    def __init__(self):
        self.begun = threading.Semaphore(0)

    def __call__(self, input_ids, scores):
        self.begun.release()
        time.sleep(0.1)
        return scores


def test_nothing_draws_random_numbers_once_a_stream_is_closed(model):
    slow = Slow()
    stream = model.generate(
        "the cat", max_new_tokens=100, stream=True, eos_token_id=None, do_sample=True, logits_processor=[slow]
    )
    next(stream)
    while slow.begun.acquire(blocking=False):
        pass
    slow.begun.acquire()  # in the middle of a token
    stream.close()
    state = torch.get_rng_state()
    time.sleep(0.3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not slow.begun.acquire(blocking=False)


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


def test_what_is_made_of_the_prompts_is_refused(model):
    ids = torch.tensor([[4, 5, 6]])
    for name in ("inputs", "input_ids", "attention_mask"):
        with pytest.raises(ValueError, match=rf"^{name} is made of the prompts here"):
            model.generate("the cat", **{name: ids})
    with pytest.raises(ValueError, match=r"^inputs_embeds is made of the prompts"):
        model.generate("the cat", inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="a streamer of its own"):
        model.generate("the", stream=True, streamer=TextStreamer(model.tokenizer))
    for name in ("return_dict_in_generate", "output_scores"):
        with pytest.raises(ValueError, match=rf"^{name}: texts come back here; call `model.generator.generate"):
            model.generate("the cat", **{name: True})


def test_a_stream_is_of_one_text(model, stock):
    asked = {"do_sample": True, "num_return_sequences": 2}
    assert len(model.generate("the cat", max_new_tokens=3, **asked)) == 2
    for given in (asked, {"generation_config": GenerationConfig(max_new_tokens=3, **asked)}):
        with pytest.raises(ValueError, match="stream=True gives one text, got num_return_sequences=2"):
            model.generate("the cat", stream=True, **given)
    model.generator.generation_config.num_return_sequences = 2
    with pytest.raises(ValueError, match="stream=True gives one text, got num_return_sequences=2"):
        model.generate("the cat", stream=True, do_sample=True)


def test_a_stream_computes_under_the_autocast_of_its_caller(model):
    seen = []
    layer = model.generator.model.layers[0]
    hook = layer.register_forward_hook(lambda module, given, found: seen.append(torch.is_autocast_enabled("cpu")))
    try:
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                pieces = model.generate("the cat", max_new_tokens=3, stream=True)
            assert "".join(pieces) is not None
            assert seen
            assert set(seen) == {enabled}
            seen.clear()
    finally:
        hook.remove()


@pytest.mark.parametrize("limit", [2.5, "3", True, [3]])
def test_a_limit_that_is_no_whole_number_is_named(model, limit):
    with pytest.raises(TypeError, match="whole number"):
        model.generate("the", max_new_tokens=limit)
    for whole in (np.int64(3), torch.tensor(3)):
        assert model.generate("the", max_new_tokens=whole) == model.generate("the", max_new_tokens=3)


def test_a_prompt_beyond_the_context_is_named_and_answered_as_by_the_base(model, stock):
    short, long = "the cat", "the " * 130
    with pytest.warns(UserWarning, match="position 1 has 130 tokens, and the base was made for 128"):
        found = model.generate([short, long], max_new_tokens=3)
    assert found[1] == new_text(stock, long, max_new_tokens=3)


def test_a_call_of_a_tool_needs_no_content(model, stock):
    model.tokenizer.chat_template = stock.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ' ' }}{% if m.content %}{{ m.content + ' ' }}{% endif %}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' }}{% endfor %}{% endfor %}"
    )
    call = [{"type": "function", "function": {"name": "train", "arguments": {}}}]
    for message in (
        {"role": "assistant", "tool_calls": call},
        {"role": "assistant", "content": None, "tool_calls": call},
    ):
        chat = [{"role": "user", "content": "the cat"}, message, {"role": "tool", "content": "red"}]
        expected = new_text(stock, "user the cat assistant train tool red ", max_new_tokens=4)
        assert model.generate(chat, max_new_tokens=4) == expected

    def undocumented(x: int) -> int:
        return x

    with pytest.raises(ValueError, match="does not read tools, so the model would not be told"):
        model.generate(chat, tools=[a_tool])
    with pytest.warns(UserWarning, match="does not read colour, size"):
        model.generate(chat, max_new_tokens=1, chat_template_kwargs={"size": 1, "colour": "red"})
    model.tokenizer.chat_template = TEMPLATE_WITH_PARTS
    with pytest.raises(ValueError, match=r"^tools: .*undocumented"):
        model.generate(chat, tools=[undocumented])
