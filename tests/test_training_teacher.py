"""The teacher: vectors against a plain forward pass, resume on disk, targets against numpy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.models import TEXTS, make_tokenizer
from transformers import AutoModelForCausalLM

import training.teacher as stage
from training.teacher import Teacher, teacher_targets, teacher_vectors

SENTENCES = [f"{a} {b} cat runs on the mat"[: 20 + n] for n, (a, b) in enumerate(zip(TEXTS * 3, TEXTS[::-1] * 3))]


@pytest.fixture
def teacher(tmp_path):
    return Teacher(
        prefix="the cat sits on ",
        suffix=" in the",
        layers=[1, 2],
        folder=str(tmp_path / "t"),
        dimension=6,
        batch_size=5,
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen2-sliding", "phi3-fused"])
@pytest.mark.parametrize("layers", [[1, 2], [0, 3]])
def test_vectors_are_those_of_one_plain_causal_pass_over_the_whole_prompt(
    base_of, teacher, architecture, layers, monkeypatch
):
    # AutoTokenizer puts its own class over the tokenizer of some model types.
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **kwargs: make_tokenizer())
    teacher.layers = layers
    found = teacher_vectors(base_of(architecture), teacher, SENTENCES)
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(base_of(architecture)).eval(), make_tokenizer()
    expected = []
    for text in SENTENCES:
        ids = tokenizer(teacher.prefix + text + teacher.suffix, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            states = lm(ids, output_hidden_states=True).hidden_states
        expected.append(torch.stack([states[layer][0, -1] for layer in layers]).numpy())
    assert found.dtype == np.float16
    assert np.abs(found - np.stack(expected)).max() < 2e-2 * np.abs(expected).max()
    assert np.abs(found[0] - found[1]).max() > 0.1
    if layers == [1, 2]:  # other last tokens, or another prompt, would be noticed
        teacher.suffix, teacher.folder = " on the", teacher.folder + "2"
        assert np.abs(teacher_vectors(base_of(architecture), teacher, SENTENCES) - found).max() > 0.1


def test_an_interrupted_run_goes_on_and_shards_fill_one_file(base, teacher, monkeypatch):
    monkeypatch.setattr(stage, "CHUNK", 4)
    computed = []
    original = stage.PromptedBase.vectors

    def spy(self, texts):
        if len(computed) == 1:
            raise KeyboardInterrupt
        computed.append(list(texts))
        return original(self, texts)

    monkeypatch.setattr(stage.PromptedBase, "vectors", spy)
    with pytest.raises(KeyboardInterrupt):
        teacher_vectors(base, teacher, SENTENCES)
    with pytest.raises(ValueError, match="lacks 2 of 3 chunks"):
        teacher_vectors(base, teacher, SENTENCES, compute=False)
    monkeypatch.setattr(stage.PromptedBase, "vectors", original)
    teacher_vectors(base, teacher, SENTENCES, shard=(0, 2))
    with pytest.raises(ValueError, match="lacks 1 of 3"):
        teacher_vectors(base, teacher, SENTENCES, compute=False)
    teacher_vectors(base, teacher, SENTENCES, shard=(1, 2))
    found = np.array(teacher_vectors(base, teacher, SENTENCES, compute=False))
    teacher.folder += "-whole"
    assert np.array_equal(found, teacher_vectors(base, teacher, SENTENCES))
    assert np.abs(found).min(axis=(1, 2)).max() > 0
    assert (np.abs(found).max(axis=(1, 2)) > 0.1).all()


def test_vectors_of_something_else_are_refused(base, base_of, teacher):
    teacher_vectors(base, teacher, SENTENCES)
    with pytest.raises(ValueError, match="another sentences_sha256"):
        teacher_vectors(base, teacher, SENTENCES[::-1])
    with pytest.raises(ValueError, match="another base_sha256"):
        teacher_vectors(base_of("llama-untied"), teacher, SENTENCES)
    manifest = json.loads((stage.Path(teacher.folder) / stage.MANIFEST).read_text())
    assert manifest["shape"] == [len(SENTENCES), 2, 32]
    teacher.suffix = "x"
    with pytest.raises(ValueError, match="another suffix"):
        teacher_vectors(base, teacher, SENTENCES)


@pytest.mark.parametrize("whitening", [0.0, 0.25, 1.0])
def test_targets_equal_the_formula_in_numpy(teacher, whitening, monkeypatch):
    monkeypatch.setattr(stage, "CHUNK", 7)
    teacher.whitening = whitening
    vectors = (np.random.default_rng(0).normal(size=(50, 2, 8)) * np.arange(1, 9) + 3).astype(np.float16)
    found = teacher_targets(vectors, teacher).numpy()
    x = vectors.astype(np.float64)
    x = x - x.mean(0)
    x = (x / np.linalg.norm(x, axis=-1, keepdims=True)).reshape(50, -1)
    x = x - x.mean(0)
    _, s, v = np.linalg.svd(x, full_matrices=False)
    y = x @ v[:6].T * (s[:6] / s[0]) ** -whitening
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    # Components have no sign of their own: compare similarities.
    assert np.abs(found @ found.T - y @ y.T).max() < 1e-4
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-5
    assert np.abs(y @ y.T - np.eye(50)).max() > 0.3
    with pytest.raises(ValueError, match=r"lower teacher\.dimension"):
        teacher_targets(vectors[:5], teacher)
