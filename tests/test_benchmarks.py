"""Result records, bootstrap, local data and peers of the benchmarks; tiny random models, no network."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from benchmarks import data as local
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

WORDS = "cat dog bird fish tree house river stone bread music paper light night day road".split()


def make_base(folder: Path, seed: int = 0) -> Path:
    """A tiny random Llama with a byte-level tokenizer, saved as a plain decoder folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<eos>": 0, "<pad>": 1}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", bos_token="<eos>", pad_token="<pad>", model_max_length=1024
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def sentence(generator: np.random.Generator, count: int = 5) -> str:
    return " ".join(generator.choice(WORDS, count))


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


def make_data(folder: Path, rows: int = 24) -> Path:
    """A small data folder with every file the benchmarks read."""
    rng = np.random.default_rng(0)
    for name in {file for files in local.STS_FILES.values() for file in files}:
        path = folder / "eval" / "sts" / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{rng.integers(0, 6)}\t{sentence(rng)}\t{sentence(rng)}\tx" for _ in range(rows)]
        path.write_text("\n".join(["score\ts1\ts2\tgenre", *lines]) + "\n")
    choices = [{"query": sentence(rng), "choices": [sentence(rng), sentence(rng)], "gold": i % 2} for i in range(rows)]
    lm = folder / "lm"
    write_jsonl(lm / "piqa_validation.jsonl.gz", choices)
    for name in ("arc_easy", "arc_challenge"):
        write_jsonl(lm / f"{name}_test.jsonl.gz", choices)
    write_jsonl(
        lm / "hellaswag_validation.jsonl.gz", [{**row, "query": f"Topic: {row['query']}: more"} for row in choices]
    )
    write_jsonl(
        lm / "winogrande_validation.jsonl",
        [
            {
                "sentence": f"{sentence(rng, 2)} _ {sentence(rng, 2)}.",
                "option1": "cat",
                "option2": "dog",
                "answer": 1 + i % 2,
            }
            for i in range(rows)
        ],
    )
    answers = {"best_answer": "a cat", "correct_answers": ["a cat", "one cat."], "incorrect_answers": ["a dog"]}
    write_jsonl(lm / "truthfulqa.jsonl.gz", [{"question": f"What {w}?", **answers} for w in WORDS])
    question = {"choices": ["a", "b", "c", "d"], "answer": 1}
    subjects = ("anatomy", "virology")
    write_jsonl(
        lm / "mmlu_test.jsonl.gz",
        [{"subject": s, "question": f"{sentence(rng)}?", **question} for s in subjects for _ in range(6)],
    )
    write_jsonl(lm / "mmlu_dev.jsonl", [{"subject": s, "question": "Why?", **question} for s in subjects])
    pages = " \n = Cat = \n \n A cat , a dog . \n\n = = Life = = \n \n It sleeps . \n \n = Dog = \n \n A dog runs . \n"
    (lm / "wikitext2_tokens_test.txt.gz").write_bytes(gzip.compress(pages.encode()))
    corpus = [{"_id": f"d{i}", "title": "", "text": f"{word} {sentence(rng, 8)}"} for i, word in enumerate(WORDS)]
    retrieval = folder / "retrieval" / "toy"
    write_jsonl(retrieval / "corpus.jsonl", [*corpus, {"_id": "empty", "title": "", "text": ""}])
    queries = [{"_id": f"q{i}", "text": f"{word} please"} for i, word in enumerate(WORDS[:6])]
    write_jsonl(retrieval / "queries.jsonl", [*queries, {"_id": "unjudged", "text": "nothing"}])
    judged = [f"q{i}\td{i}\t2\nq{i}\td{i + 1}\t1\nq{i}\td{i + 2}\t0" for i in range(6)]
    (retrieval / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged, "unjudged\td1\t0"]) + "\n")
    labelled = [
        {"text": sentence(rng), "label": "ab"[i % 2], "split": "train" if i < 20 else "test"} for i in range(40)
    ]
    for name in ("banking77", "trec"):
        write_jsonl(folder / "classification" / f"{name}.jsonl.gz", labelled)
    write_jsonl(
        folder / "classification" / "mr.jsonl.gz",
        [{**row, "split": "all"} for row in sorted(labelled, key=lambda row: row["label"])],
    )
    return folder


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
    def open_file(mark: str) -> ResultFile:
        run = {
            "fingerprint": mark,
            "dtype": "float32",
            "prompt": "none",
            "pooling": "mean",
            "command": "c",
            "date": "d",
        }
        return ResultFile(tmp_path / "r.json", benchmark="embedding", row="m", run=run)

    open_file("one").add({"task": "A", "split": "test", "metric": "x", "value": 1.0})
    open_file("one").add({"task": "B", "split": "test", "metric": "x", "value": 2.0})
    again = open_file("one")
    assert [score["task"] for score in again.content["scores"]] == ["A", "B"]
    again.add({"task": "A", "split": "test", "metric": "x", "value": 3.0})
    assert {s["task"]: s["value"] for s in read_json(tmp_path / "r.json")["scores"]} == {"A": 3.0, "B": 2.0}
    assert open_file("two").content["scores"] == []


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
        local.data_dir(tmp_path / "nothing")
    monkeypatch.setenv("UBMOE_DATA", str(tmp_path))
    assert local.data_dir() == tmp_path
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
