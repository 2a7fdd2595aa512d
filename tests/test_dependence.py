"""Dependence against a ten-line reference on every architecture."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers.models import ARCHITECTURES, TEXTS, make_tokenizer
from transformers import AutoModelForCausalLM

from ubmoe_st import UBMoE, dependence
from ubmoe_st.dependence import BUCKETS, plot_dependence

LONG = " ".join(["the red bird and the old cat sit under a tree with the blue dog"] * 8)  # 120 tokens
SMALL = ((0, 8), (8, 32), (32, 128))


def reference(lm, ids):
    """Ten lines: hooks take q and k behind the rotary embedding from the stock eager function."""
    import importlib

    source = importlib.import_module(type(lm).__module__)
    stock, rows = source.eager_attention_forward, []

    def spy(module, query, key, value, mask, **kwargs):
        k = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = query @ k.transpose(-1, -2) * kwargs["scaling"]
        cap = kwargs.get("softcap")
        scores = scores if cap is None else torch.tanh(scores / cap) * cap
        a = scores.softmax(-1).mean((0, 1))
        parts = [a.diagonal().sum(), a.tril(-1).sum(), a.triu(1).sum()]
        rows.append(100 * torch.stack(parts) / len(a))
        return stock(module, query, key, value, mask, **kwargs)

    source.eager_attention_forward = spy
    try:
        with torch.inference_mode():
            logits = lm(ids).logits
    finally:
        source.eager_attention_forward = stock
    return torch.stack(rows), logits


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_parts_equal_the_reference_and_add_to_100(architecture, base_of):
    lm = AutoModelForCausalLM.from_pretrained(base_of(architecture), attn_implementation="eager").eval()
    tokenizer = make_tokenizer()
    for text in (TEXTS[0], LONG):
        (name, found), *others = dependence(lm, [text], tokenizer=tokenizer, buckets=SMALL).items()
        assert not others
        expected, _ = reference(lm, tokenizer(text, return_tensors="pt")["input_ids"])
        layers = torch.tensor(found.layers)
        assert len(expected) == lm.config.num_hidden_layers
        assert torch.allclose(layers, expected, atol=1e-3), name
        assert torch.allclose(layers.sum(1), torch.full((3,), 100.0), atol=1e-4)
        assert found.main + found.before + found.after == pytest.approx(100, abs=1e-6)
        # Not vacuous: without the mask, later tokens do get attention, and layers differ.
        assert found.after > 1
        assert not torch.allclose(layers[0], layers[1], atol=0.1)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral-sliding"])
def test_the_forward_pass_stays_causal_and_blocks_of_queries_change_nothing(architecture, base_of, monkeypatch):
    import sys

    module = sys.modules["ubmoe_st.dependence"]
    lm = AutoModelForCausalLM.from_pretrained(base_of(architecture), attn_implementation="eager").eval()
    ids = make_tokenizer()(LONG, return_tensors="pt")["input_ids"]
    whole = module._document_parts(module._measuring_copy(lm), ids)
    monkeypatch.setattr(module, "_QUERY_BLOCK", 7)
    copied = module._measuring_copy(lm)
    assert torch.allclose(module._document_parts(copied, ids), whole, atol=1e-4)
    with torch.inference_mode():
        logits, expected = copied(ids).logits, lm(ids).logits
    assert torch.allclose(logits, expected, atol=1e-4)
    assert expected.abs().max() > 0.1


def test_the_model_is_not_touched_and_threads_may_use_it(checkpoint):
    model = UBMoE(str(checkpoint))
    before = model.encode(TEXTS), model.generate(TEXTS[0], max_new_tokens=4)
    implementation = model.generator.config._attn_implementation
    wrong = []

    def work():
        for _ in range(20):
            if model.generate(TEXTS[0], max_new_tokens=4) != before[1]:
                wrong.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(5):
        bi = dependence(model, [LONG], buckets=SMALL)
    thread.join()
    uni = dependence(model, [LONG], buckets=SMALL, routing="uni")
    assert not wrong
    assert model.generator.config._attn_implementation == implementation
    assert (model.encode(TEXTS) == before[0]).all()
    assert abs(bi["32-128"].after - uni["32-128"].after) > 1e-3


def test_buckets_count_documents_and_stop_early(checkpoint):
    model = UBMoE(str(checkpoint))
    read = []

    def texts():
        for text in ["dog", *TEXTS, LONG, LONG, *TEXTS]:
            read.append(text)
            yield text

    found = dependence(model, texts(), buckets=SMALL)
    assert {name: bucket.documents for name, bucket in found.items()} == {"0-8": 4, "8-32": 2, "32-128": 2}
    total = len(read)
    read.clear()
    as_json = dependence(model, texts(), buckets=[list(bucket) for bucket in SMALL], per_bucket=1)
    assert list(as_json) == list(found)
    assert len(read) < total
    assert BUCKETS[-1] == (1024, 2048)


def test_wrong_arguments_are_refused(checkpoint, base):
    model = UBMoE(str(checkpoint))
    with pytest.raises(ValueError, match="tokenizer"):
        dependence(AutoModelForCausalLM.from_pretrained(base), TEXTS)
    with pytest.raises(ValueError, match="ascending"):
        dependence(model, TEXTS, buckets=((8, 2),))
    with pytest.raises(TypeError, match="texts"):
        dependence(model, [1])  # type: ignore[list-item]


def test_the_plot_is_the_same_svg_each_time(checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    model = UBMoE(str(checkpoint))
    results = {"bi": dependence(model, [*TEXTS, LONG], buckets=SMALL)}
    plot_dependence(results, tmp_path / "a.svg", title="t")
    plot_dependence(results, tmp_path / "b.svg", title="t")
    content = (tmp_path / "a.svg").read_text()
    assert content == (tmp_path / "b.svg").read_text()
    assert "<svg" in content
    assert "after, 32-128 tokens" in content
    with pytest.raises(ValueError, match="no document fell into a bucket"):
        plot_dependence({}, tmp_path / "c.svg")


def test_the_public_name_can_be_called_whatever_was_imported_first(checkpoint):
    import importlib

    import ubmoe_st

    model = UBMoE(str(checkpoint))
    expected = dependence(model, TEXTS, buckets=SMALL)
    assert expected
    for found in (ubmoe_st.dependence, importlib.import_module("ubmoe_st.dependence")):
        assert found(model, TEXTS, buckets=SMALL) == expected


def test_one_text_is_no_list_of_documents(checkpoint):
    with pytest.raises(TypeError, match="got one text"):
        dependence(UBMoE(str(checkpoint)), "the cat sits")
