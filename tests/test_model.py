"""`UBMoE` as a SentenceTransformer: its whole API, odd input, generation and chat."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from helpers.models import TEXTS, make_tokenizer, random_experts
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoModelForCausalLM

from ubmoe_st import UBMoE, UBMoETransformer
from ubmoe_st.model import group_by_length


@pytest.fixture(scope="module")
def model(checkpoint):
    return UBMoE(str(checkpoint))


def test_vectors_equal_those_of_stock_sentence_transformers(checkpoint, model):
    stock = SentenceTransformer(str(checkpoint))
    assert type(stock[0]).__module__.startswith("sentence_transformers.")
    assert np.array_equal(stock.encode(TEXTS), model.encode(TEXTS))
    assert len({row.tobytes() for row in model.encode(TEXTS)}) == len(TEXTS)


def test_the_sentence_transformers_api(checkpoint):
    model = UBMoE(str(checkpoint), prompts={"query": "the red", "document": "a"}, truncate_dim=8)
    stock = SentenceTransformer(str(checkpoint))
    expected = stock.encode([f"the red{TEXTS[0]}"])[:, :8]
    assert np.allclose(model.encode_query([TEXTS[0]]), expected)
    assert model.encode_document(TEXTS).shape == (4, 8)
    scores = model.similarity(model.encode_query(TEXTS), model.encode_document(TEXTS))
    assert scores.shape == (4, 4)
    assert model.encode(TEXTS, precision="int8").dtype == np.int8
    assert model.encode(TEXTS, convert_to_tensor=True).shape == (4, 8)
    assert model.encode(TEXTS, output_value="token_embeddings")[2].shape == (1, 32)


def test_multi_process_encoding_keeps_the_order(model):
    texts = TEXTS * 5
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        found = model.encode(texts, pool=pool, chunk_size=3)
    finally:
        model.stop_multi_process_pool(pool)
    assert np.abs(found - model.encode(texts)).max() < 1e-6


@pytest.mark.parametrize("text", ["", " ", "\n\t", "\x00", "😀👩‍👩‍👧", "zzz qqq", "the " * 100_000, "\ud800 the"])
@pytest.mark.parametrize("alone", [True, False])
def test_any_text_gives_a_finite_vector(model, text, alone):
    vector = model.encode(text) if alone else model.encode([TEXTS[1], text, TEXTS[0]])[1]
    assert vector.shape == (32,)
    assert np.isfinite(vector).all()
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("bad", "name"), [(3, "int"), (None, "NoneType"), (b"the", "bytes"), (["the"], "list")])
def test_a_list_with_something_else_names_position_and_type(model, bad, name):
    with pytest.raises(TypeError, match=rf"position 2 is of type {name}"):
        model.encode(["the", "a", bad])
    with pytest.raises(TypeError):
        model.encode(7)
    with pytest.raises(ValueError, match="keyword"):
        model.encode("the", colour="red")


def test_an_empty_list_gives_no_vectors(model):
    assert len(model.encode([])) == 0


def test_save_pretrained_round_trip(model, checkpoint, tmp_path):
    model.save_pretrained(str(tmp_path / "saved"))
    again = UBMoE(str(tmp_path / "saved"), verify=True)
    assert np.array_equal(again.encode(TEXTS), model.encode(TEXTS))
    low = UBMoE(str(checkpoint), low_memory=True)
    low.save_pretrained(str(tmp_path / "low"))
    assert np.abs(UBMoE(str(tmp_path / "low")).encode(TEXTS) - model.encode(TEXTS)).max() < 1e-5
    ids = torch.arange(4, 9)[None]
    assert torch.equal(UBMoE(str(tmp_path / "low")).generator(ids).logits, model.generator(ids).logits)
    with pytest.raises(ValueError, match="safetensors only"):
        model.save_pretrained(str(tmp_path / "unsafe"), safe_serialization=False)
    assert not (tmp_path / "unsafe").exists()


def test_stock_transformers_opens_the_generator_folder(base, checkpoint):
    stock = AutoModelForCausalLM.from_pretrained(checkpoint / "generator")
    ids = torch.arange(4, 12)[None]
    assert torch.equal(stock(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits)


def test_the_root_as_a_causal_lm_is_not_the_generator(base, checkpoint):
    root = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = torch.arange(4, 12)[None]
    assert not torch.allclose(root(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits)
    assert "not** the generator" in (checkpoint / "README.md").read_text()


def test_copies_and_pickles_work(model):
    text = model.generate("the cat", max_new_tokens=4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(twin.encode(TEXTS), model.encode(TEXTS))
        assert twin.generate("the cat", max_new_tokens=4) == text


def test_the_generator_follows_the_model_to_another_dtype(checkpoint, base):
    model = UBMoE(str(checkpoint))
    model.generate("the", max_new_tokens=1)
    model.to(torch.bfloat16)
    reference = AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16)
    ids = torch.arange(4, 9)[None]
    assert torch.equal(model.generator(ids).logits, reference(ids).logits)


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


def test_modules_made_by_hand_train_and_save(base, tmp_path):
    module = UBMoETransformer.from_base(base)
    stock = SentenceTransformer(modules=[module, Pooling(32), Normalize()], device="cpu")
    reference = AutoModelForCausalLM.from_pretrained(base)
    reference.config.is_causal = False
    ids = make_tokenizer()(TEXTS[0], return_tensors="pt")["input_ids"]
    expected = reference.model(ids).last_hidden_state[0].mean(0)
    found = torch.tensor(stock.encode(TEXTS[0]))
    assert torch.allclose(found, torch.nn.functional.normalize(expected, dim=0), atol=1e-6)
    module.set_low_rank_experts(random_experts(module))
    UBMoE(modules=[module, Pooling(32), Normalize()], device="cpu").save(str(tmp_path / "out"))
    assert np.abs(UBMoE(str(tmp_path / "out")).encode(TEXTS) - stock.encode(TEXTS)).max() < 1e-6


def test_a_stock_first_module_is_refused(checkpoint):
    with pytest.raises(ValueError, match="must be a UBMoETransformer"):
        UBMoE(modules=list(SentenceTransformer(str(checkpoint))))


@pytest.mark.parametrize("seed", range(5))
def test_groups_of_similar_length_cost_least(seed):
    """Against every way to cut the sorted rows."""
    rng = np.random.default_rng(seed)
    lengths, pass_tokens = rng.integers(1, 60, 8).tolist(), int(rng.integers(1, 80))
    order = sorted(lengths, reverse=True)

    def cost(groups):
        return sum(max(group) * len(group) + pass_tokens for group in groups)

    best = min(
        cost([order[a:b] for a, b in zip((0, *cuts), (*cuts, len(order)))])
        for count in range(len(order))
        for cuts in itertools.combinations(range(1, len(order)), count)
    )
    groups = group_by_length(lengths, pass_tokens)
    assert sorted(row for group in groups for row in group) == list(range(8))
    assert cost([[lengths[row] for row in group] for group in groups]) == best
    assert group_by_length([]) == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_computed_and_changes_nothing(checkpoint, monkeypatch, side):
    model = UBMoE(str(checkpoint))
    model.tokenizer.padding_side = side
    texts = ["cat", "the cat sat on the mat " * 6, "a dog", "the dog ran " * 3]
    features = model.preprocess(texts)
    features = {k: v for k, v in features.items() if isinstance(v, torch.Tensor)}
    mask = features["attention_mask"].bool()
    seen = []
    embeddings = model[0].model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    with torch.inference_mode():
        whole = Transformer.forward(model[0], dict(features))["token_embeddings"]
        assert seen == [tuple(mask.shape)]
        seen.clear()
        monkeypatch.setattr("ubmoe_st.model.group_by_length", lambda lengths: group_by_length(lengths, 1))
        grouped = model[0](dict(features))["token_embeddings"]
        assert len(seen) > 1
        assert sum(rows * length for rows, length in seen) < mask.numel() / 1.5
    assert grouped.shape == whole.shape
    assert (grouped - whole)[mask].abs().max() < 1e-5
    assert grouped[mask].abs().max() > 1e-2
    seen.clear()
    model[0](dict(features))  # with gradients, as in training: one pass
    assert seen == [tuple(mask.shape)]
