"""The encoder in bf16 and int8: against integers of numpy and torch's autocast; everything else stays as it is."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from helpers.engines import cosine
from helpers.models import TEXTS
from peft import LoraConfig, get_peft_model
from torch import nn
from typer.testing import CliRunner

from ubmoe_st import UBMoE, compute
from ubmoe_st.cli import app
from ubmoe_st.compute import Int8Linear, choose, processor_flags

ALL = {"avx2": True, "avx512_vnni": True, "avx512_bf16": True, "amx": True}
int8 = pytest.mark.skipif(not processor_flags()["avx2"], reason="needs AVX2")


@pytest.fixture(scope="module")
def plain(checkpoint):
    return UBMoE(str(checkpoint), device="cpu")


@pytest.fixture(scope="module")
def quantised(checkpoint):
    return UBMoE(str(checkpoint), device="cpu", compute="int8")


@int8
def test_an_int8_layer_is_the_integer_product_of_numpy():
    random = np.random.default_rng(0)
    x, weight = random.normal(size=(2, 5, 48)).astype("f4"), random.normal(size=(24, 48)).astype("f4")
    x[0, 0] *= 1000  # another scale than its neighbours have
    bias = random.normal(size=24).astype("f4")
    found = Int8Linear(torch.tensor(weight), torch.tensor(bias), 7)(torch.tensor(x)).numpy()
    of_weight = np.abs(weight).max(1) / 127
    of_token = np.abs(x).max(-1, keepdims=True) / 63
    product = np.rint(x / of_token).astype(int) @ np.rint(weight / of_weight[:, None]).astype(int).T
    np.testing.assert_allclose(found, product * of_token * of_weight + bias, rtol=1e-3, atol=1e-3)
    exact = x @ weight.T + bias
    assert 1e-4 < np.abs(found - exact)[1].max() / np.abs(exact[1]).max() < 0.05


@int8
def test_int8_vectors_are_close_and_do_not_depend_on_their_neighbours(plain, quantised):
    expected, found = plain.encode(TEXTS), quantised.encode(TEXTS)
    assert quantised.compute.used == "int8"
    assert 0.98 < cosine(found, expected).min() < 1 - 1e-7
    alone = np.stack([quantised.encode(text, batch_size=1) for text in TEXTS])
    np.testing.assert_allclose(found, alone, atol=1e-5)
    low = UBMoE(str(plain[0].folder), device="cpu", low_memory=True, compute="int8")
    np.testing.assert_allclose(low.encode(TEXTS), found, atol=2e-2)
    report = low.memory_report()
    linear = sum(m.weight.numel() for m in plain[0].model.modules() if isinstance(m, nn.Linear))
    assert report["compute"] == pytest.approx(linear, rel=0.5)  # a byte a weight, and the scales
    assert report["total"] == sum(report[part] for part in ("shared", "uni", "bi", "router", "compute"))
    assert plain.memory_report()["compute"] == 0


@int8
def test_only_encoding_computes_so(plain, quantised, tmp_path):
    ids = torch.tensor([plain.token_ids(TEXTS[0])])
    with torch.inference_mode():
        assert torch.equal(quantised.generator(ids).logits, plain.generator(ids).logits)
    assert quantised.state_dict().keys() == plain.state_dict().keys()
    quantised.save(str(tmp_path / "saved"))
    again = UBMoE(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_array_equal(again.encode(TEXTS), plain.encode(TEXTS))
    assert quantised[0](quantised.preprocess(TEXTS))["token_embeddings"].requires_grad, "training uses the weights"
    copied = pickle.loads(pickle.dumps(quantised))
    np.testing.assert_array_equal(copied.encode(TEXTS), quantised.encode(TEXTS))
    assert copied.compute == quantised.compute
    copied.share_memory()
    np.testing.assert_array_equal(copied.encode(TEXTS), quantised.encode(TEXTS))
    assert copied.compute.used == "int8"
    copied.to("meta")
    assert copied.compute.used == "stored"
    assert "moved to meta" in copied.compute.reason
    with pytest.raises(ValueError, match="computes in int8 already"):
        UBMoE(str(plain[0].folder), device="cpu", low_memory=True, compute="int8").quantize_base()


def with_an_adapter(model):
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["up_proj", "q_proj"], init_lora_weights=False))


def merged_by_peft(model):
    """Through `.data`, which no version counter sees."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=32, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    model[0].model = get_peft_model(model[0].model, lora).merge_and_unload()


def trained(model):
    tuned = [parameter for name, parameter in model.named_parameters() if "mlp" in name]
    optimizer = torch.optim.SGD(tuned, lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        model(model.preprocess(TEXTS))["sentence_embedding"].sum().backward()
        optimizer.step()


def loaded(model):
    torch.manual_seed(1)
    model.load_state_dict(
        {name: tensor + 0.2 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    )


def exchanged(model):
    torch.manual_seed(2)
    layer = model[0].model.layers[1].mlp
    layer.up_proj = nn.Linear(32, 48, bias=False)
    layer.gate_proj.weight = nn.Parameter(torch.randn(48, 32))


@int8
@pytest.mark.parametrize("change", [with_an_adapter, merged_by_peft, trained, loaded, exchanged])
def test_what_is_changed_after_the_copies_were_made_counts(checkpoint, plain, quantised, change):
    """Copies of weights that are not those of the model any more would give other vectors without a word."""
    model, fast = UBMoE(str(checkpoint), device="cpu"), UBMoE(str(checkpoint), device="cpu", compute="int8")
    assert np.array_equal(fast.encode(TEXTS), quantised.encode(TEXTS))
    change(model)
    change(fast)
    expected = model.encode(TEXTS)
    assert cosine(fast.encode(TEXTS), expected).min() > 0.97
    assert cosine(plain.encode(TEXTS), expected).min() < 0.9, "the change changes little: the test says nothing"
    assert fast.compute.used == ("stored" if change is with_an_adapter else "int8")
    if change is with_an_adapter:
        assert np.array_equal(fast.encode(TEXTS), expected)
        fast.delete_adapter("default")
        assert fast.compute.used == "int8"
        assert np.array_equal(fast.encode(TEXTS), quantised.encode(TEXTS))


@int8
def test_layers_that_int8_would_spoil_are_kept(checkpoint, monkeypatch):
    """The same function with one huge input channel, which leaves no bits to the others."""

    def peaked():
        model = UBMoE(str(checkpoint), device="cpu")
        layer = model[0].model.layers[0]
        with torch.no_grad():
            layer.input_layernorm.weight[3] *= 1000
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, name).weight[:, 3] /= 1000
        return model

    expected = UBMoE(str(checkpoint), device="cpu").encode(TEXTS)
    model = peaked()
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-4)
    model[0].compute_in("int8")
    names = {f"layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")}
    assert names <= set(model.compute.kept)
    assert len(model.compute.kept) < 7, "most are kept: vacuous"
    monkeypatch.setattr(compute, "KEPT_ERROR", float("inf"))
    spoilt = peaked()
    spoilt[0].compute_in("int8")
    assert spoilt.compute.kept == ()
    assert cosine(model.encode(TEXTS), expected).min() > cosine(spoilt.encode(TEXTS), expected).min()


def test_bf16_is_that_of_autocast(checkpoint, plain, monkeypatch):
    monkeypatch.setattr(compute, "processor_flags", lambda: ALL)
    model = UBMoE(str(checkpoint), device="cpu", compute="auto")
    assert (model.compute.asked, model.compute.used, model.compute.reason) == ("auto", "bf16", "")
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain.encode(TEXTS)
    found, exact = model.encode(TEXTS), plain.encode(TEXTS)
    assert found.dtype == np.float32
    assert cosine(found, expected).min() > 0.999  # autocast also attends in bf16
    assert 1e-5 < np.abs(found - exact).max() < 0.05
    ids = torch.tensor([plain.token_ids(TEXTS[0])])
    with torch.inference_mode():
        assert torch.equal(model.generator(ids).logits, plain.generator(ids).logits)


def test_what_the_processor_lacks_is_refused_or_said(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(compute, "processor_flags", lambda: dict.fromkeys(ALL, False))
    for asked in ("bf16", "int8"):
        with pytest.raises(ValueError, match=r"not possible here.*compute='auto'"):
            choose(asked, cpu)
    found = choose("auto", cpu)
    assert found.used == "stored"
    assert "AVX512_BF16" in found.reason
    monkeypatch.setattr(compute, "processor_flags", lambda: ALL)
    assert "on meta" in choose("auto", torch.device("meta")).reason
    with pytest.raises(ValueError, match="must be one of stored, auto, bf16, int8, got 'float8'"):
        choose("float8", cpu)


def test_processor_flags_are_those_that_torch_finds():
    asked = {"avx2": "_is_avx2_supported", "avx512_bf16": "_is_avx512_bf16_supported", "amx": "_is_amx_tile_supported"}
    for name, function in asked.items():
        if hasattr(torch.cpu, function):
            assert processor_flags()[name] == getattr(torch.cpu, function)()


@int8
def test_the_command_line_takes_it(checkpoint, quantised, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    arguments = ["encode", str(checkpoint), str(tmp_path / "texts.txt"), "--out", str(tmp_path / "v.npy")]
    assert CliRunner().invoke(app, [*arguments, "--compute", "int8"]).exit_code == 0
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), quantised.encode(TEXTS), atol=1e-5)
