"""`UBMoE` as a SentenceTransformer: its whole API, odd input, saving."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models import TEXTS
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM

from ubmoe_st import UBMoE


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


@pytest.mark.parametrize(("bad", "name"), [(3, "int"), (None, "NoneType"), (b"the", "bytes"), (["the"], "list")])
def test_a_list_with_something_else_names_position_and_type(model, bad, name):
    with pytest.raises(TypeError, match=rf"position 2 is of type {name}"):
        model.encode(["the", "a", bad])
    with pytest.raises(TypeError):
        model.encode(7)
    with pytest.raises(ValueError, match="keyword"):
        model.encode("the", colour="red")


@pytest.mark.parametrize("text", ["", " " * 9, "\n\t " * 1000])
def test_a_text_without_tokens_of_any_length_has_a_vector(model, text):
    """Alone and in a batch the same one, of length 1."""
    alone = model.encode(text)
    assert np.linalg.norm(alone) == pytest.approx(1)
    assert np.abs(model.encode([text, "the cat"])[0] - alone).max() < 1e-6
    assert np.array_equal(alone, model.encode(""))


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


def test_a_stock_first_module_is_refused(checkpoint):
    with pytest.raises(ValueError, match="must be a UBMoETransformer"):
        UBMoE(modules=list(SentenceTransformer(str(checkpoint))))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ((text for text in TEXTS), "got generator: give `list"),
        ({"the cat"}, "got set: give `list"),
        (pytest.importorskip("pandas").Series(TEXTS), "got Series: give `list"),
        (np.array(["the cat", None]), "position 1 is of type NoneType"),
        (["the cat", b"dog"], "position 1 is of type bytes"),
        (3, "got int"),
    ],
)
def test_what_is_no_list_of_texts_is_told_what_to_give(checkpoint, texts, message):
    with pytest.raises(TypeError, match=message):
        UBMoE(str(checkpoint)).encode(texts)


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5])
def test_dimensions_that_are_none_are_refused(checkpoint, wrong):
    """Slices would make vectors without dimensions, or without the last ones."""
    for call in (
        lambda: UBMoE(str(checkpoint), truncate_dim=wrong),
        lambda: UBMoE(str(checkpoint)).encode("the cat", truncate_dim=wrong),
    ):
        with pytest.raises((TypeError, ValueError), match="truncate_dim must be"):
            call()


def test_encode_still_sets_evaluation_mode_and_looks_where_tensors_are(checkpoint, monkeypatch):
    """What is asked at every call in a cheaper way is asked of every module and tensor all the same."""
    model, stock = UBMoE(str(checkpoint), device="cpu"), SentenceTransformer(str(checkpoint), device="cpu")
    expected = model.encode("the cat")
    np.testing.assert_allclose(expected, stock.encode("the cat"), atol=1e-5)
    deep = model[0].model.layers[1].mlp
    deep.register_forward_hook(lambda module, inputs, output: output * (2.0 if module.training else 1.0))
    deep.train()
    np.testing.assert_array_equal(model.encode("the cat"), expected)
    assert not deep.training
    assert model.train().training
    assert model[0].training
    moved = []
    monkeypatch.setattr(SentenceTransformer, "_resolve_inference_device", lambda self, device: moved.append(device))
    model._resolve_inference_device(None)
    assert moved == []
    deep.register_buffer("elsewhere", torch.zeros(1, device="meta"))
    model._resolve_inference_device(None)
    assert moved == [None], "a tensor elsewhere is left to the stock way"


def test_both_views_can_be_compiled(checkpoint, base):
    """Graphs of torch.compile give what the modules give, in full attention and in causal."""
    model = UBMoE(str(checkpoint), device="cpu")
    expected, ids = model.encode(TEXTS[0]), torch.tensor([model.token_ids(TEXTS[0])])
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.inference_mode():
        found = torch.compile(model.generator, backend=backend)(ids, use_cache=False).logits
        assert torch.equal(found, AutoModelForCausalLM.from_pretrained(base)(ids, use_cache=False).logits)
    assert graphs
    graphs.clear()
    model[0].model = torch.compile(model[0].model, backend=backend)
    np.testing.assert_allclose(model.encode(TEXTS[0]), expected, atol=1e-5)
    assert graphs


def test_a_backend_without_generator_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"ubmoe export CHECKPOINT OUT --format onnx"):
        UBMoE(str(checkpoint), backend="onnx")


def test_an_adapter_on_low_rank_experts_is_refused_with_the_way_out(checkpoint):
    model = UBMoE(str(checkpoint), low_memory=True)
    with pytest.raises(ValueError, match="load the checkpoint again, without low_memory"):
        model.add_adapter(LoraConfig(target_modules=["up_proj"]))
    model = UBMoE(str(checkpoint), low_memory=True)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
