"""Batches: complete, of similar length or equal cost, the same ones again."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler

pytest.importorskip("peft")

from training.batches import PROMPT_CHARACTERS, GroupBudget, LengthBuckets, RoughCollator, TokenBudget, as_begun
from training.variants import roughen

RECIPES = Path(__file__).parent.parent / "training" / "recipes"


def test_buckets_hold_every_row_once_in_full_batches_of_similar_length():
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
    with pytest.raises(ValueError, match=r"lower trainer\.per_device_train_batch_size"):
        LengthBuckets(Dataset.from_dict({"anchor": texts}), 104, False)


def test_texts_that_come_alone_are_counted(caplog):
    """30 of 80 texts are as long as a batch; two long ones of 502 are not worth a word."""
    lengths = [10] * 50 + [150] * 30
    dataset = Dataset.from_dict({"anchor": ["x"] * 80})
    sampler = TokenBudget(dataset, lengths, 200)
    alone = sum(len(batch) == 1 for batch in sampler)
    assert alone == 30
    assert f"batch_tokens=200: {alone} of 80 texts (38 %)" in caplog.text
    caplog.clear()
    GroupBudget(dataset, lengths, [[row] for row in range(80)], 200)
    assert "of 80 texts" in caplog.text
    caplog.clear()
    TokenBudget(Dataset.from_dict({"anchor": ["x"] * 502}), [10] * 500 + [300] * 2, 200)
    GroupBudget(dataset, lengths, [[row] for row in range(80)], 600)
    assert not caplog.text


def test_a_token_budget_fills_batches_and_keeps_their_number():
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
    with pytest.raises(ValueError, match="batch_tokens=5 holds one text at a time"):
        TokenBudget(Dataset.from_dict({"anchor": ["x"] * 3}), [4, 4, 5], 5)


@functools.cache
def rows_of(count):
    return Dataset.from_dict({"anchor": ["x" * (1 + n % 5) for n in range(count)]})


def sampler_of(kind, rows, processes, drop_last):
    """As a trainer in so many processes has it."""
    data, lengths = rows_of(rows), [1 + n % 5 for n in range(rows)]
    if kind == "lengths":
        return LengthBuckets(data, 3, False, seed=1)
    if kind == "tokens":
        return TokenBudget(data, lengths, 9, seed=1)
    if kind == "groups":
        groups = [list(range(start, min(start + 3, rows))) for start in range(0, rows, 3)]
        return GroupBudget(data, lengths, groups, 12, seed=1)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).tolist()
    return DefaultBatchSampler(order, batch_size=3, drop_last=drop_last or processes > 1)


def steps(sampler, processes, accumulation):
    """The batches of each step of an epoch, as accelerate gives them to processes."""
    even = not isinstance(sampler, (TokenBudget, GroupBudget))
    shards = [sampler]
    if processes > 1:
        shards = [BatchSamplerShard(sampler, processes, process, even_batches=even) for process in range(processes)]
    read = [list(shard) for shard in shards]
    assert len({len(batches) for batches in read}) == 1
    assert {len(shard) for shard in shards} == {len(read[0])}
    parts = range(0, len(read[0]), accumulation)
    return [sorted(b for batches in read for b in batches[start : start + accumulation]) for start in parts]


def shared_or_none(sampler, rows, begun, processes, drop_last):
    try:
        return as_begun(sampler, rows, begun, processes, drop_last=drop_last)
    except ValueError as error:
        if "go on with 1" not in str(error):
            raise
    return None


@pytest.mark.parametrize(("begun", "accumulation"), [(1, 4), (2, 1), (2, 3), (3, 2), (4, 1)])
def test_other_processes_have_the_same_batches_in_each_step(begun, accumulation):
    """Also of the last step of an epoch, whatever remains for it; or they are refused."""
    together = begun * accumulation
    shared, refused = 0, 0
    divisors = [n for n in range(1, together + 1) if together % n == 0]
    kinds = ("lengths", "tokens", "groups", "stock")
    for kind, rows, drop_last in itertools.product(kinds, (48, 61), (False, True)):
        before = sampler_of(kind, rows, begun, drop_last)
        wanted = steps(as_begun(before, rows, begun, begun, drop_last=drop_last), begun, accumulation)
        for processes in divisors:
            sampler = sampler_of(kind, rows, processes, drop_last)
            found = shared_or_none(sampler, rows, begun, processes, drop_last)
            if found is None:
                assert begun % processes  # divisors always can
                refused += 1
                continue
            assert steps(found, processes, together // processes) == wanted, (kind, rows, processes)
            shared += processes != begun
    assert shared > 10
    assert (refused > 0) == (accumulation > 1)


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


def test_rough_inputs_keep_their_prompts():
    collator = RoughCollator(preprocess_fn=lambda rows, **_: {"texts": rows}, share=1.0, seed=1)
    prompts = ["Query: ", "Passage. ", ""] * 20
    rows = [{"anchor": f"{p}Where Is {n}?", PROMPT_CHARACTERS: len(p), "label": n} for n, p in enumerate(prompts)]
    batch = collator(rows)
    assert sorted(batch) == ["anchor_texts", "label"]
    assert {text[len(p) :][0] for text, p in zip(batch["anchor_texts"], prompts, strict=True)} == {"w"}
    assert all(text.startswith(p) for text, p in zip(batch["anchor_texts"], prompts, strict=True))
    assert any("Is" in text for text in batch["anchor_texts"])
    assert PROMPT_CHARACTERS in rows[0]


def test_a_group_budget_keeps_groups_whole_and_the_number_of_batches():
    rng = np.random.default_rng(0)
    rows = rng.permutation(400).tolist()
    groups = [rows[start : start + 4] for start in range(0, 360, 4)] + [[row] for row in rows[360:390]]
    lengths = rng.integers(4, 60, 400).tolist()
    sampler = GroupBudget(Dataset.from_dict({"anchor": ["x"] * 400}), lengths, groups, 600, seed=1)
    orders = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert batches == list(sampler)
        assert len(batches) == len(sampler)
        for batch in batches:
            assert sum(lengths[row] for row in batch) <= 600
            assert all(not set(group) & set(batch) or set(group) <= set(batch) for group in groups)
        seen = {row for batch in batches for row in batch}
        assert seen <= set(rows[:390])
        assert len(seen) > 370
        orders.append(batches)
    assert orders[0] != orders[1]
    assert sum(lengths[row] for batch in orders[0] for row in batch) / len(sampler) > 450
    with pytest.raises(ValueError, match="lower batch_tokens"):
        GroupBudget(Dataset.from_dict({"anchor": ["x"]}), [5], [[0]], 600)
