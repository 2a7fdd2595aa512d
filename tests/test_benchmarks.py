"""Result records, bootstrap, local data and peers of the benchmarks; tiny random models, no network."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.benchmark_data import make_base, make_data
from helpers.models import save_with_head
from scipy.stats import spearmanr

from benchmarks import data as local
from benchmarks.mteb_model import wrap
from benchmarks.peers import PROMPT_PREFIX, PROMPT_SUFFIX, open_encoder, open_generator
from benchmarks.results import (
    ResultFile,
    bootstrap_mean,
    bootstrap_spearman,
    command_line,
    fingerprint,
    interval,
    nearest,
    read_json,
    run_record,
)
from training.data import data_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def test_bootstrap_spearman_is_scipys_on_the_same_draws():
    rng = np.random.default_rng(1)
    gold = rng.integers(0, 6, 50).astype(float)
    predicted = gold + rng.normal(0, 2, 50)
    draws = bootstrap_spearman(gold, predicted, seed=3, resamples=5)
    generator = np.random.default_rng(3)
    for draw in draws:
        rows = generator.integers(0, 50, 50)
        assert draw == pytest.approx(100 * spearmanr(gold[rows], predicted[rows])[0], abs=1e-9)
    assert np.std(draws) > 0
    assert np.array_equal(draws, bootstrap_spearman(gold, predicted, seed=3, resamples=5))
    assert not np.array_equal(draws, bootstrap_spearman(gold, predicted, seed=4, resamples=5))


def test_bootstrap_interval_of_a_mean_is_near_the_normal_one():
    values = np.random.default_rng(0).normal(10, 3, 400)
    low, high = interval(bootstrap_mean(values, seed=0, resamples=2000))
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.05)
    assert high == pytest.approx(values.mean() + half, abs=0.05)


def test_a_result_file_is_continued_for_the_same_model_only(tmp_path):
    def open_file(mark: str, limit: int | None = None, seed: int = 0) -> ResultFile:
        run = {
            "fingerprint": mark,
            "seed": seed,
            "dtype": "float32",
            "prompt": "none",
            "pooling": "mean",
            "command": "c",
            "date": "d",
        }
        return ResultFile(tmp_path / "r.json", benchmark="embedding", row="m", run=run, limit=limit)

    open_file("one").add({"task": "A", "split": "test", "metric": "x", "value": 1.0})
    open_file("one").add({"task": "B", "split": "test", "metric": "x", "value": 2.0})
    again = open_file("one")
    assert [score["task"] for score in again.content["scores"]] == ["A", "B"]
    again.add({"task": "A", "split": "test", "metric": "x", "value": 3.0})
    assert {s["task"]: s["value"] for s in read_json(tmp_path / "r.json")["scores"]} == {"A": 3.0, "B": 2.0}
    assert open_file("two").content["scores"] == []
    assert len(open_file("one", seed=1).content["scores"]) == 2  # of whole sets, where it only draws the intervals
    assert open_file("one", limit=9, seed=1).content["scores"] == []  # of a sample, which the seed has drawn


def test_a_broken_result_file_is_refused_by_name(tmp_path):
    (tmp_path / "r.json").write_text('{"schema": 1')
    with pytest.raises(ValueError, match=r"broken one at .*r\.json"):
        read_json(tmp_path / "r.json")


def test_a_run_record_names_what_is_needed_to_repeat_it(tmp_path):
    record = run_record(command_line("benchmarks.embedding", ["--out", str(tmp_path)]), seed=7, dtype="float32")
    assert record["seed"] == 7
    assert {"command", "date", "commit", "versions", "cpu", "threads", "dtype"} <= set(record)
    assert record["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(record)


def test_the_fingerprint_follows_the_weights(tmp_path):
    first, same, other = (make_base(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert fingerprint(first) == fingerprint(same) != fingerprint(other)


def test_nearest_names_come_first():
    assert nearest("STSBenchmak", ["STS12", "STSBenchmark", "SICK-R"]).startswith("nearest: STSBenchmark")
    assert nearest("zzzz", ["STS12"]) == "known: STS12"


def test_a_missing_data_folder_says_what_is_needed(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="UBMOE_DATA"):
        data_folder(tmp_path / "nothing")
    monkeypatch.setenv("UBMOE_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    with pytest.raises(FileNotFoundError, match=r"STS12\.tsv"):
        local.sts_pairs(tmp_path, "STS12", "test")


def test_a_collection_keeps_only_queries_with_a_relevant_document(data):
    collection = local.read_collection(data / "retrieval" / "toy")
    assert set(collection.queries) == set(collection.relevance) == {f"q{i}" for i in range(6)}
    assert collection.relevance["q0"] == {"d0": 2, "d1": 1, "d2": 0}


def test_the_prompted_peer_is_the_last_token_of_the_whole_prompt(base):
    """The cached prefix and the padded batch give what one plain causal pass over each whole string gives."""
    from transformers import AutoModel, AutoTokenizer

    encoder = open_encoder("base-prompted", base=str(base))
    texts = ["a cat", "the dog ran over the road to the river", "x"]
    model, tokenizer = AutoModel.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        expected = [
            model(**tokenizer(PROMPT_PREFIX + text + PROMPT_SUFFIX, return_tensors="pt")).last_hidden_state[0, -1]
            for text in texts
        ]
    found = encoder.model.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 0.01
    long = encoder.model.encode(["cat " * 1000, "cat " * 2000])
    assert np.isfinite(long).all()
    assert np.allclose(long[0], long[1], atol=1e-5)


@pytest.mark.parametrize(("name", "sees_the_future"), [("base-causal", False), ("base-bidirectional", True)])
def test_only_the_bidirectional_peer_sees_later_tokens(base, name, sees_the_future):
    transformer = open_encoder(name, base=str(base)).model[0]
    first, second = (
        transformer(transformer.preprocess([text]))["token_embeddings"][0, 0] for text in ("cat dog", "cat sun")
    )
    difference = float((first - second).abs().max().detach())
    assert difference > 1e-3 if sees_the_future else difference < 1e-6


def test_a_result_says_in_what_a_checkpoint_computed(checkpoint, monkeypatch):
    texts, found = ["a cat", "the dog ran over the road"], {}
    for can in (True, False):
        flags = {"avx2": can, "avx512_vnni": can, "avx512_bf16": can, "amx": can}
        monkeypatch.setattr("ubmoe_st.compute.processor_flags", lambda flags=flags: flags)
        for compute in ("stored", "auto"):
            encoder = open_encoder(str(checkpoint), compute=compute)
            found[can, compute] = encoder.dtype, encoder.model.encode(texts)
    assert found[True, "auto"][0] == "float32, products in bf16"
    assert {found[key][0] for key in found if key != (True, "auto")} == {"float32"}
    assert 1e-5 < np.abs(found[True, "auto"][1] - found[True, "stored"][1]).max() < 0.05
    with pytest.raises(ValueError, match="bf16"):
        open_encoder(str(checkpoint), compute="bf16")


def test_vectors_for_a_task_are_a_row_of_their_own(base, checkpoint, tmp_path):
    model = save_with_head(checkpoint, tmp_path / "headed")
    plain, encoder = (open_encoder(str(tmp_path / "headed"), task=task) for task in (None, "classification"))
    assert (encoder.row, encoder.label) == ("headed-classification", 'headed, task="classification"')
    assert encoder.fingerprint != plain.fingerprint
    texts = ["a cat", "the dog"]
    wanted = model.encode(texts, task="classification")
    np.testing.assert_array_equal(wrap(encoder).model.encode(texts), wanted)
    assert wrap(plain).model.encode(texts).shape == (2, 32)
    assert wanted.shape == (2, 37)
    with pytest.raises(ValueError, match="has none"):
        open_encoder(str(checkpoint), task="classification")
    with pytest.raises(ValueError, match="Expected a checkpoint"):
        open_encoder("base-causal", base=str(base), task="classification")


def test_unknown_peers_and_models_are_refused(base):
    with pytest.raises(ValueError, match="base-prompted"):
        open_encoder("base-promted", base=str(base))
    with pytest.raises(FileNotFoundError, match="make model"):
        open_encoder("./no/such/model")


def test_a_model_without_a_generator_is_refused(base):
    with pytest.raises(ValueError, match="without a `generator` folder"):
        open_generator(str(base), routing="uni")
    model, tokenizer = open_generator(str(base), routing="base")
    assert model.config.vocab_size == len(tokenizer)
