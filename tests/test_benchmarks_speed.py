"""Speed measurements: rates by hand, seeded texts, workers on tiny models."""

from pathlib import Path

import pytest
from helpers.benchmark_data import make_base, make_data

from benchmarks import speed
from benchmarks.peers import open_encoder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def test_rates_are_median_and_range_over_all_repeats():
    found = speed.rates([{"seconds": [1.0, 2.0], "tokens": 100}, {"seconds": [4.0], "tokens": 100}])
    assert found == {"value": 50.0, "low": 25.0, "high": 100.0, "n": 3}


def test_texts_are_a_seeded_sample(data):
    first = speed.sample_texts(data, "short", 5, 0)
    assert first == speed.sample_texts(data, "short", 5, 0) != speed.sample_texts(data, "short", 5, 1)
    assert len(first) == 5


def test_the_encode_worker_counts_the_tokens_of_the_texts(base, tmp_path):
    open_encoder("base-causal", base=str(base)).model.save(str(tmp_path / "stock"))
    task = {"kind": "encode", "system": "stock", "model": str(tmp_path / "stock"), "texts": ["cat", "birds"]}
    found = speed.worker({**task, "repeats": 2, "batch_size": 2, "threads": 1})
    assert found["tokens"] == len("cat") + len("birds")
    assert len(found["seconds"]) == 2


def test_the_generate_worker_makes_the_tokens_asked_for(base):
    task = {"kind": "generate", "system": "base", "base": str(base), "model": "", "repeats": 2, "new_tokens": 5}
    found = speed.worker({**task, "threads": 1})
    assert found["tokens"] == 5
    assert len(found["seconds"]) == 2


def test_memory_counts_each_tensor_once(base):
    """The tied head of the tiny base is not counted twice."""
    from transformers import AutoModelForCausalLM

    found = speed.measure({"kind": "memory", "system": "base", "base": str(base), "model": "", "threads": 1})
    model = AutoModelForCausalLM.from_pretrained(base)
    assert found["weights"] == sum(p.numel() * 4 for p in model.parameters())
    assert found["private"] > found["weights"] / 2  # of a process whose libraries were loaded before


def test_a_failing_worker_is_named():
    with pytest.raises(RuntimeError, match="nothing with base"):
        speed.measure({"kind": "nothing", "system": "base", "threads": 1})
