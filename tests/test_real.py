"""The promises on the released 135M model; `make test-real` assembles it first."""

from __future__ import annotations

import csv
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubmoe_st import UBMoE
from ubmoe_st.bases import resolve_base

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "ubmoe-135m"
DATA = Path(os.environ.get("UBMOE_DATA", ROOT.parent / "shared" / "data"))
PROMPTS = ["The capital of France is", "def fibonacci(n):", "Once upon a time, in a very small village by the sea,"]

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not MODEL.is_dir(), reason="models/ubmoe-135m is not assembled: run `make model`"),
]


@pytest.fixture(scope="module")
def base():
    return resolve_base("smollm2-135m").path


def test_digits_are_split_as_the_gguf_says(base):
    """Its pre-tokenizer `smollm` (llama.cpp) cuts at every digit first, so blanks before a number stay together."""
    tokens = AutoTokenizer.from_pretrained(base).tokenize("x\n\n 42 items  77%")
    assert tokens == ["x", "ĊĊĠ", "4", "2", "Ġitems", "ĠĠ", "7", "7", "%"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_p1_logits_and_tokens_are_those_of_the_base(base, dtype):
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = UBMoE(str(MODEL), model_kwargs={"dtype": dtype})
    for prompts in (PROMPTS[:1], PROMPTS):
        inputs = tokenizer(prompts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            expected = reference(**inputs)
            found = model.generator(**inputs)
            assert torch.equal(found.logits, expected.logits)
            assert not torch.equal(model.generator_for("bi")(**inputs).logits, expected.logits)
        for sample, cache in ((False, True), (True, True), (False, False)):
            options = {"max_new_tokens": 12, "do_sample": sample, "use_cache": cache}
            torch.manual_seed(0)
            tokens = reference.generate(**inputs, **options)
            torch.manual_seed(0)
            assert torch.equal(model.generator.generate(**inputs, **options), tokens)
    # One token at a time is the matrix-vector product, which rounds by the alignment of the weights.
    step = torch.tensor([[504]])
    with torch.inference_mode():
        assert torch.equal(model.generator(step).logits, reference(step).logits)


def test_p2_stock_sentence_transformers_gives_the_same_vectors():
    texts = ["A man is playing a guitar.", "Someone makes music.", "The train is late."]
    stock, ours = SentenceTransformer(str(MODEL)).encode(texts), UBMoE(str(MODEL)).encode(texts)
    assert np.array_equal(stock, ours)
    similarity = stock @ stock.T
    assert similarity[0, 1] > similarity[0, 2] + 0.1


def test_p3_both_views_fit_in_the_memory_of_the_base():
    report = UBMoE(str(MODEL), low_memory=True).memory_report()
    assert report["ratio"] <= 1.05
    assert report["base"] == 134_515_008 * 4


def test_p4_threads_get_the_serial_results():
    model = UBMoE(str(MODEL))
    texts = ["A man is playing a guitar.", "The train is late."]
    vectors, text = model.encode(texts), model.generate(PROMPTS[0], max_new_tokens=4)
    wrong = []

    def work(right):
        for _ in range(5):
            if not right():
                wrong.append(right)

    jobs = [
        lambda: np.array_equal(model.encode(texts), vectors),
        lambda: model.generate(PROMPTS[0], max_new_tokens=4) == text,
    ]
    threads = [threading.Thread(target=work, args=(job,)) for job in jobs * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_p6_vectors_do_not_depend_on_the_batch():
    texts = ["Hi.", "A man is playing a guitar on the stage of a small theatre.", "The train is late."]
    model = UBMoE(str(MODEL))
    alone = np.stack([model.encode(text) for text in texts])
    assert np.abs(model.encode(texts) - alone).max() < 1e-5


@pytest.mark.skipif(not (DATA / "eval" / "sts").is_dir(), reason="no evaluation data; set UBMOE_DATA")
def test_stsb_dev_through_stock_sentence_transformers():
    with open(DATA / "eval" / "sts" / "STSB-dev.tsv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    evaluator = EmbeddingSimilarityEvaluator(
        [row["s1"] for row in rows], [row["s2"] for row in rows], [float(row["score"]) / 5 for row in rows]
    )
    score = evaluator(SentenceTransformer(str(MODEL)))["spearman_cosine"]
    assert len(rows) == 1500
    assert score >= 0.70
