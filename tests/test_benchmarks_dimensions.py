"""Dimensions and precision: forms against numpy, similarities against Hamming distance, the table and its file."""

import numpy as np
import pytest
from helpers.benchmark_data import make_base, make_data
from scipy.stats import spearmanr

pytest.importorskip("ir_measures")

from benchmarks import data as local
from benchmarks import dimensions
from benchmarks.peers import open_encoder
from benchmarks.report import own_tables
from benchmarks.results import read_json

VECTORS = np.random.default_rng(0).normal(size=(40, 24)).astype(np.float32)


def test_float32_is_the_truncated_vector_of_length_one():
    found = dimensions.reduced(VECTORS, 16, "float32")
    expected = VECTORS[:, :16] / np.linalg.norm(VECTORS[:, :16], axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(dimensions.similarities(found, found, "float32"), expected @ expected.T, atol=1e-5)


def test_binary_is_a_bit_a_dimension_and_ranks_as_hamming_distance():
    found = dimensions.reduced(VECTORS, 16, "binary")
    assert found.dtype == np.uint8
    assert found.shape == (40, 2)
    bits = VECTORS[:, :16] > 0
    hamming = (bits[:, None] != bits[None]).sum(-1)
    np.testing.assert_array_equal(dimensions.similarities(found, found, "binary"), 16 - 2 * hamming)


def test_int8_codes_have_255_steps_between_the_ends_of_each_dimension():
    found = dimensions.reduced(VECTORS, None, "int8")
    unit = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    low, high = unit.min(0), unit.max(0)
    expected = np.clip(np.floor((unit - low) / ((high - low) / 255)), 0, 255) - 128
    assert found.dtype == np.int8
    assert np.abs(found - expected).max() <= 1
    assert {found.min(), found.max()} == {-128, 127}


def test_forms_have_no_more_dimensions_than_the_model():
    assert dimensions.forms(32, (64, 16))[::3] == [(32, "float32"), (16, "float32")]
    assert [precision for _, precision in dimensions.forms(32, ())] == ["float32", "int8", "binary"]


def test_a_run_measures_every_form_and_keeps_it(tmp_path, monkeypatch):
    folder = make_data(tmp_path / "data")
    encoder = open_encoder("base-causal", base=str(make_base(tmp_path / "base")))
    options = {"dimensions": (16, 8), "out": tmp_path, "resamples": 20}
    content = read_json(dimensions.run(encoder, folder, collections=("Dolly-dev", "toy"), **options))
    scores = {(s["task"], s["dimension"], s["precision"]): s for s in content["scores"]}
    assert len(scores) == 27
    sizes = {(s["dimension"], s["precision"]): s["bytes"] for s in content["scores"]}
    assert sizes[32, "float32"] == 128
    assert sizes[16, "int8"] == 16
    assert sizes[8, "binary"] == 1
    pairs = local.sts_pairs(folder, "STSBenchmark", "validation")
    first, second = (encoder.model.encode(pairs[side], truncate_dim=8) for side in ("sentence1", "sentence2"))
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    expected = 100 * spearmanr((first * second).sum(1) / norms, pairs["score"])[0]
    assert scores["STSBenchmark", 8, "float32"]["value"] == pytest.approx(expected, abs=1e-3)
    assert len({round(s["value"], 4) for s in scores.values()}) > 12
    table = own_tables([content])["dimensions-base-causal"]
    assert "| 16 | int8 | 16 |" in table
    assert f"{expected:.2f}" in table

    monkeypatch.setattr(dimensions, "sts_scores", lambda *a, **k: pytest.fail("a finished task ran again"))
    said: list[str] = []
    dimensions.run(encoder, folder, **options, say=said.append)
    assert said == ["base-causal STSBenchmark: kept", "base-causal Dolly-dev: kept"]
