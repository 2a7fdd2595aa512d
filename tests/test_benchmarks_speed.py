"""Speed measurements: rates by hand, seeded texts, workers on tiny models."""

from pathlib import Path

import pytest
from helpers.benchmark_data import make_base, make_data

from benchmarks import ceiling, speed
from benchmarks.peers import open_encoder
from ubmoe_st import UBMoE


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


# --- beside the ceiling ----------------------------------------------------------------------------------------------


def test_scores_are_rates_ratios_of_turns_and_shares_of_the_ceiling():
    seconds = {"ubmoe": [2.0, 4.0, 8.0], "stock": [4.0, 4.0, 8.0], ceiling.CEILING: [1.0, 2.0, 2.0]}
    ubmoe, stock, products = ceiling.scores_of("encode, 16 tokens", seconds, 100, "tokens/s", "stock", 6.0)
    assert (ubmoe["value"], ubmoe["low"], ubmoe["high"]) == (25.0, 12.5, 50.0)
    assert (ubmoe["ratio"], ubmoe["share"]) == (1.0, 0.5)  # medians of 2, 1, 1 and of 0.5, 0.5, 0.25
    assert stock["ratio"] == 1.0
    assert (products["value"], products["metric"], products["share"]) == (3.0, "GFLOP/s", 1.0)
    assert "ratio" not in products


def test_systems_take_turns_and_the_first_turn_does_not_count():
    order, now = [], iter(range(100))
    seconds = ceiling.in_turns({name: lambda name=name: order.append(name) for name in "ab"}, 2, lambda: next(now))
    assert order == list("ababab")
    assert seconds == {"a": [1, 1], "b": [1, 1]}


def test_the_ceiling_counts_every_linear_layer(checkpoint):
    model = UBMoE(str(checkpoint), device="cpu")
    _, gflop = ceiling.products(model[0].model, 7)
    weights = sum(p.numel() for name, p in model[0].model.named_parameters() if name.endswith("proj.weight"))
    assert gflop == pytest.approx(2e-9 * 7 * weights)


def test_a_checkpoint_is_measured_in_turns(checkpoint, base):
    sizes = ceiling.Sizes((4, 8, 10**6), 16, 2, 2, 4, 2, 1)
    scores, facts = ceiling.measure_encoding(str(checkpoint), ["the cat", "a red bird sleeps"], "the dog", sizes, 1)
    tasks = {score["task"] for score in scores}
    assert tasks == {"load", "encode, 4 tokens", "encode, 8 tokens", "encode, mixed", "one line"}
    assert {"ubmoe", "stock", ceiling.CEILING} <= {score["split"] for score in scores}
    assert all(score["value"] > 0 for score in scores)
    assert set(facts["kept_layers"]) <= {"bf16", "int8"}
    scores = ceiling.measure_generating(str(checkpoint), str(base), sizes, 1)
    assert {score["task"] for score in scores} == {"prefill", "decode", "training step"}
    assert {score["split"] for score in scores if score["task"] == "decode"} == {"generator", "base", ceiling.CEILING}
