"""Graphs run in onnxruntime and OpenVINO, without torch, and agree with the checkpoint."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.engines import ENCODE, ENGINES, cosine, in_process, tree
from helpers.models import TEXTS, make_checkpoint
from transformers import AutoModelForCausalLM

import ubmoe_st
from ubmoe_st import UBMoE
from ubmoe_st.compute import calibration_texts
from ubmoe_st.export import export
from ubmoe_st.export.graphs import EncoderGraph, peaks, write_onnx

LOGITS = """
ids = np.array(json.loads(sys.argv[2]))
print(json.dumps(run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"].tolist()))
"""
needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs the extra onnx")
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs the extra openvino")


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "format", [pytest.param("onnx", marks=needs_onnx), pytest.param("openvino", marks=needs_openvino)]
)
def test_graph_of_the_encoder(format, architecture, checkpoint_of, tmp_path):
    """In a process without torch and transformers; padded batches, of other sizes than the traced one."""
    export(checkpoint_of(architecture), tmp_path / "out", format=format)
    found = in_process(
        ENGINES[format] + ENCODE,
        tmp_path / "out",
        json.dumps(TEXTS),
        hidden=("ubmoe_st", "torch", "transformers", "sentence_transformers"),
    )
    model = UBMoE(str(checkpoint_of(architecture)))
    expected = model.encode(TEXTS)
    lengths = [len(ids) for ids in model.tokenizer(TEXTS)["input_ids"]]
    assert len(set(lengths)) > 2, "no padding: the test would say nothing of masks"
    assert found["names"] == ["last_hidden_state", "sentence_embedding"]
    assert found["shape"] == [len(TEXTS), max(lengths), 32]
    assert np.abs(np.array(found["vectors"]) - expected).max() < 1e-4
    assert np.abs(np.array(found["alone"]) - expected).max() < 1e-4
    assert np.abs(expected[0] - expected[1]).max() > 0.01


@pytest.mark.parametrize(
    "format", [pytest.param("onnx", marks=needs_onnx), pytest.param("openvino", marks=needs_openvino)]
)
def test_a_graph_gives_the_dimensions_that_the_checkpoint_keeps(format, checkpoint, tmp_path):
    UBMoE(str(checkpoint), truncate_dim=8).save(str(tmp_path / "cut"))
    export(tmp_path / "cut", tmp_path / "out", format=format)
    found = np.array(in_process(ENGINES[format] + ENCODE, tmp_path / "out", json.dumps(TEXTS))["vectors"])
    expected = UBMoE(str(tmp_path / "cut")).encode(TEXTS)
    assert found.shape == expected.shape == (len(TEXTS), 8)
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize(
    "format", [pytest.param("onnx", marks=needs_onnx), pytest.param("openvino", marks=needs_openvino)]
)
def test_graph_of_the_generator(format, checkpoint, base, tmp_path):
    export(checkpoint, tmp_path / "out", view="generator", format=format)
    ids = [[4, 5, 6, 7, 8], [9, 8, 7, 6, 5], [4, 4, 4, 4, 4]]
    found = np.array(in_process(ENGINES[format] + LOGITS, tmp_path / "out", json.dumps(ids)))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(base)(torch.tensor(ids)).logits.numpy()
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.fixture(scope="module")
def peaked(base, tmp_path_factory) -> Path:
    """A checkpoint whose second layer has a few huge activations before its down projection."""
    from transformers import AutoTokenizer

    lm = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        up = lm.model.layers[1].mlp.up_proj.weight
        up[3] *= 300
        lm.model.layers[1].mlp.down_proj.weight[:, 3] /= 300
    folder = tmp_path_factory.mktemp("peaked")
    lm.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "base")
    return make_checkpoint(folder / "base", folder / "checkpoint", low_rank=False)


@pytest.mark.parametrize(
    "format", [pytest.param("onnx", marks=needs_onnx), pytest.param("openvino", marks=needs_openvino)]
)
def test_int8_keeps_peaked_layers_in_fp32(format, peaked, tmp_path):
    ratios = peaks(UBMoE(str(peaked)), TEXTS)
    second, first = sorted(ratios.values())[-2:]
    assert first > 1.5 * second
    options = {"format": format, "quantize": "int8", "calibration": TEXTS}
    facts = export(peaked, tmp_path / "out", **options, peak_limit=(first * second) ** 0.5)
    assert facts["kept_fp32"] == ["layers.1.mlp.down_proj"]
    expected = UBMoE(str(peaked)).encode(TEXTS)
    script = ENGINES[format] + ENCODE
    kept = in_process(script, tmp_path / "out", json.dumps(TEXTS))["vectors"]
    # A random network of 32 dimensions doubles what rounding does; the released model is in docs/experiments.md.
    assert cosine(kept, expected).min() > 0.8
    assert np.abs(np.array(kept) - expected).max() > 1e-5, "nothing was quantised"
    export(peaked, tmp_path / "all", **options, peak_limit=1e9)
    everything = in_process(script, tmp_path / "all", json.dumps(TEXTS))["vectors"]
    if format == "onnx":  # nncf smooths peaks away itself; on a network this small what is left is chance
        assert cosine(everything, expected).mean() < cosine(kept, expected).mean()


@needs_onnx
def test_large_onnx_weights_go_under_the_name_that_optimum_looks_for(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "out", format="onnx")
    graph = tmp_path / "out" / "onnx" / "model.onnx"
    graph.unlink()
    write_onnx(EncoderGraph(UBMoE(str(checkpoint))), graph, None, file_limit_bytes=1000)
    assert {"onnx/model.onnx", "onnx/model.onnx_data"} <= tree(tmp_path / "out")
    found = in_process(ENGINES["onnx"] + ENCODE, tmp_path / "out", json.dumps(TEXTS))
    assert np.abs(np.array(found["vectors"]) - UBMoE(str(checkpoint)).encode(TEXTS)).max() < 1e-4


@needs_onnx
def test_large_int8_weights_do_so_too(checkpoint, tmp_path):
    """Embeddings are not quantised: the model is larger than a quarter of what it was."""
    import onnx

    graph = tmp_path / "model.onnx"
    encoder = EncoderGraph(UBMoE(str(checkpoint)))
    numbers = sum(p.numel() for p in encoder.parameters())
    limit = int(1.1 * numbers)
    write_onnx(encoder, graph, [], file_limit_bytes=limit)
    assert tree(tmp_path) == {"model.onnx", "model.onnx_data"}
    assert graph.with_name("model.onnx_data").stat().st_size > numbers
    model = onnx.load(str(graph))  # and what is beside it
    assert len(model.SerializeToString()) > limit
    assert onnx.TensorProto.INT8 in {tensor.data_type for tensor in model.graph.initializer}


@needs_onnx
def test_exports_name_no_folder_of_this_machine(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "out", format="onnx")
    here = str(Path(ubmoe_st.__file__).parents[1]).encode()
    for name in tree(tmp_path / "out"):
        assert here not in (tmp_path / "out" / name).read_bytes(), name


@needs_onnx
def test_int8_without_texts_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="needs texts"):
        export(checkpoint, tmp_path / "out", format="onnx", quantize="int8", calibration=[])
    with pytest.raises(TypeError, match="list of texts"):
        export(checkpoint, tmp_path / "out", format="onnx", quantize="int8", calibration="the cat sits")
    assert list(tmp_path.iterdir()) == []


def test_the_calibration_texts_are_of_many_kinds():
    texts = calibration_texts()
    assert len(texts) == len(set(texts)) == 32
    assert all(text == text.strip() and text for text in texts)
    assert min(map(len, texts)) < 10
    assert max(map(len, texts)) > 150
