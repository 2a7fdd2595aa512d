"""Batches: complete, of similar length or equal cost, the same ones again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("peft")

from training.batches import LengthBuckets, RoughCollator, TokenBudget
from training.texts import roughen

RECIPES = Path(__file__).parent.parent / "training" / "recipes"


def test_buckets_hold_every_row_once_in_full_batches_of_similar_length():
    from datasets import Dataset

    texts = ["x" * (1 + (7 * n) % 50) for n in range(103)]
    sampler = LengthBuckets(Dataset.from_dict({"anchor": texts}), 4, False, seed=1)
    batches = list(sampler)
    rows = [row for batch in batches for row in batch]
    assert len(batches) == len(sampler) == 25
    assert all(len(batch) == 4 for batch in batches)
    assert len(set(rows)) == 100
    spread = np.mean([np.ptp([len(texts[r]) for r in batch]) for batch in batches])
    assert spread < 8 < np.ptp([len(t) for t in texts])
    assert batches == list(sampler)
    sampler.set_epoch(1)
    assert batches != list(sampler)


def test_a_token_budget_fills_batches_and_keeps_their_number():
    from datasets import Dataset

    rng = np.random.default_rng(0)
    lengths = [*rng.integers(4, 40, 500).tolist(), 300]
    sampler = TokenBudget(Dataset.from_dict({"anchor": ["x"] * 501}), lengths, 200, seed=1)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert batches == list(sampler)
        assert len(batches) == len(sampler)
        assert sorted(row for batch in batches for row in batch) == list(range(501))
        costs = [max(lengths[row] for row in batch) * len(batch) for batch in batches]
        assert sorted(costs)[-2] <= 200 < sorted(costs)[-1] == 300
        assert np.mean(costs) > 170
        assert sum(costs) < 1.05 * sum(lengths)
        epochs.append({tuple(sorted(batch)) for batch in batches})
    assert len(epochs[0] & epochs[1]) < len(epochs[0]) / 4
    with pytest.raises(ValueError, match="batch_tokens"):
        TokenBudget(Dataset.from_dict({"anchor": []}), [], 200)


def test_rough_inputs_change_some_texts_and_no_words():

    assert [roughen("The Cat sits.", lower) for lower in (False, True)] == ["the Cat sits", "the cat sits"]
    assert roughen("...", True) == "..."
    texts = [f"{text} {number}." for number in range(50) for text in ("The cat sits", "A red Bird")]
    collator = RoughCollator(preprocess_fn=lambda rows, **_: {"texts": rows}, share=0.5, seed=1)

    def read():
        batch = collator([{"anchor": text, "label": number} for number, text in enumerate(texts)])
        assert batch["label"].tolist() == list(range(100))
        return batch["anchor_texts"]

    first = read()
    assert first == read()
    assert 30 < sum(a != b for a, b in zip(texts, first, strict=True)) < 70
    assert all(b.lower() == a.lower().rstrip(".") or a == b for a, b in zip(texts, first, strict=True))
    collator.set_epoch(1)
    assert 20 < sum(a != b for a, b in zip(first, read(), strict=True)) < 80
    collator.share = 0
    assert read() == texts
