"""The encoder view as a module: any text, padding, copies, dtypes, and modules put together by hand."""

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
from ubmoe_st.padding import group_by_length


@pytest.fixture(scope="module")
def model(checkpoint):
    return UBMoE(str(checkpoint))


@pytest.mark.parametrize("text", ["", " ", "\n\t", "\x00", "😀👩‍👩‍👧", "zzz qqq", "the " * 100_000, "\ud800 the"])
@pytest.mark.parametrize("alone", [True, False])
def test_any_text_gives_a_finite_vector(model, text, alone):
    vector = model.encode(text) if alone else model.encode([TEXTS[1], text, TEXTS[0]])[1]
    assert vector.shape == (32,)
    assert np.isfinite(vector).all()
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("text", ["", " ", "s"])
def test_a_text_that_the_pooling_would_leave_out_with_the_prompt_has_a_vector(model, text):
    """Of "cat" and "s" the tokenizer makes one token, which counts as the prompt's."""
    pooled = UBMoE(modules=[model[0], Pooling(32, include_prompt=False), Normalize()], prompts={"q": "the cat"})
    rest = [TEXTS[1], TEXTS[0]]
    vectors = pooled.encode([rest[0], text, rest[1]], prompt_name="q")
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-4)
    stock = SentenceTransformer(modules=list(pooled), prompts=pooled.prompts).encode([*rest, ""], prompt_name="q")
    assert vectors[[0, 2]] == pytest.approx(stock[:2], abs=1e-5)
    assert not stock[2].any()  # what it would be
    whole = UBMoE(modules=[model[0], Pooling(32), Normalize()], prompts=pooled.prompts)
    stock = SentenceTransformer(modules=list(whole), prompts=pooled.prompts)
    assert whole.encode(text, prompt_name="q") == pytest.approx(stock.encode(text, prompt_name="q"), abs=1e-6)


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


def refusal(call):
    try:
        call()
    except ValueError as error:
        return error
    return None


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("alone", [lambda model: model.generator, lambda model: model[0].model])
def test_one_view_alone_in_another_dtype_is_told_what_to_do(checkpoint, alone, low_memory):
    """The views share tensors: the other one would meet two dtypes; converting the whole then mends it."""
    model = UBMoE(str(checkpoint), low_memory=low_memory)
    model.generator_for("bi")
    alone(model).half()
    calls = {
        "encode": lambda: model.encode(TEXTS),
        "generate": lambda: model.generate("the cat", max_new_tokens=1),
        "stream": lambda: "".join(model.generate("the cat", max_new_tokens=1, stream=True)),
        "rank": lambda: model.rank("the cat", TEXTS),
        "bi": lambda: model.generate("the cat", max_new_tokens=1, routing="bi"),
    }
    told = {name: str(error) for name, call in calls.items() if (error := refusal(call))}
    assert all("`model.to(torch.float16)`" in error for error in told.values())
    if alone(model) is model.generator:
        assert set(told) == {"encode", "bi"}
    else:  # low-rank experts stand on the generator's own weights, which follow
        assert set(told) == (set() if low_memory else {"generate", "stream", "rank"})
    model.half()
    wanted = UBMoE(str(checkpoint)).half()
    assert np.abs(model.encode(TEXTS) - wanted.encode(TEXTS)).max() < 1e-2
    assert model.generate("the cat", max_new_tokens=4) == wanted.generate("the cat", max_new_tokens=4)
    assert model.generator.dtype == torch.float16


def test_tokens_beyond_the_embeddings_are_told_what_to_do(checkpoint):
    model = UBMoE(str(checkpoint))
    model.tokenizer.add_tokens([f"new{number}" for number in range(40)])
    for call in (
        lambda: model.encode(["the cat", "new39"]),
        lambda: model.generate("the new39", max_new_tokens=1),
        lambda: model.rank("the cat", ["new39"]),
    ):
        with pytest.raises(ValueError, match=r"beyond the 48 .* `model.generator.resize_token_embeddings"):
            call()
    model.generator.resize_token_embeddings(len(model.tokenizer))
    assert np.isfinite(model.encode("new39")).all()
    assert isinstance(model.generate("the new39", max_new_tokens=1), str)


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
    assert group_by_length([], pass_tokens) == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_computed_and_changes_nothing(checkpoint, side):
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
        model[0].pass_tokens = 1
        grouped = model[0](dict(features))["token_embeddings"]
        assert len(seen) > 1
        assert sum(rows * length for rows, length in seen) < mask.numel() / 1.5
    assert grouped.shape == whole.shape
    assert (grouped - whole)[mask].abs().max() < 1e-5
    assert grouped[mask].abs().max() > 1e-2
    seen.clear()
    model[0](dict(features))  # with gradients, as in training: one pass
    assert seen == [tuple(mask.shape)]
