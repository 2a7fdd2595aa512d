"""A tiny base with a byte-level tokenizer, and a small data folder with every file the benchmarks read."""

import gzip
import json
from pathlib import Path

import numpy as np
import torch

from benchmarks import data as local

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
    instructions = [
        {
            "instruction": f"Which {word} is it?",
            "input": f"{word} {sentence(rng, 5 if i == 0 else 40)}",
            "output": "this one",
            "category": ("closed_qa", "information_extraction", "brainstorming")[i % 3],
        }
        for i, word in enumerate(WORDS)
    ]
    write_jsonl(folder / local.DOLLY_FILE, [*instructions, instructions[1] | {"instruction": "Asked again?"}])
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
