"""Killed at random moments: the old or the new thing is there whole, and the next run goes on."""

from __future__ import annotations

import json
import os
import shutil
import time
import urllib.request

import numpy as np
import pytest
from helpers.encoders import HashEncoder
from helpers.kills import ended, forked, kill_often
from helpers.loopback_hub import TOKEN, LoopbackHub
from helpers.models import TEXTS, make_base, make_checkpoint
from helpers.training import make_recipe, make_training_data
from huggingface_hub import constants

from ubmoe_st import EmbeddingIndex, UBMoE
from ubmoe_st.checkpoint import SUMS_FILE, verify_sums
from ubmoe_st.files import sha256_of
from ubmoe_st.hub import plan, push

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
REPO = "org/ubmoe-tiny"


@pytest.fixture(scope="module")
def two(checkpoint_of, tmp_path_factory):
    """Two checkpoints of different weights."""
    other = tmp_path_factory.mktemp("other")
    return [checkpoint_of("llama"), make_checkpoint(make_base(other / "base"), other / "m", low_rank=False)]


def test_a_killed_save_leaves_the_old_or_the_new_checkpoint(two, tmp_path, amount, figure):
    models = [UBMoE(str(path), device="cpu") for path in two]
    vectors = [model.encode(TEXTS) for model in models]
    assert not np.array_equal(*vectors)
    out = tmp_path / "m"
    sums = []
    for model in models:
        model.save(str(out))
        sums.append((out / SUMS_FILE).read_text())
    notes = out / "notes.txt"
    notes.write_text("of somebody else")
    turns, seen = [0], set()

    def work():
        models[turns[0] % 2].save(str(out))

    def check():
        turns[0] += 1
        verify_sums(out)
        now = sums.index((out / SUMS_FILE).read_text())
        seen.add(now)
        assert notes.read_text() == "of somebody else"
        if turns[0] % 20 == 0:
            assert np.array_equal(UBMoE(str(out), device="cpu").encode(TEXTS), vectors[now])

    kills = amount(8, 200)
    whole = kill_often(work, check, kills)
    assert seen == {0, 1}
    models[0].save(str(out))
    assert (out / SUMS_FILE).read_text() == sums[0]
    assert os.listdir(tmp_path) == ["m"], "what a killed save left is still there"
    figure(f"{kills} kills and {whole} whole saves: old or new checkpoint whole each time, nothing left over")


def test_a_killed_index_change_leaves_the_old_or_the_new_index(tmp_path, amount, figure):
    """Built over, added to and compacted in turn; content against a plain dictionary."""
    rng = np.random.default_rng(0)
    encoder = HashEncoder(16)
    out = tmp_path / "i"

    def rows(count, start=0):
        return {f"d{n}": " ".join(f"w{w}" for w in rng.integers(500, size=6)) for n in range(start, start + count)}

    def listed(content):
        return [{"id": identity, "text": text} for identity, text in content.items()]

    def read():
        index = EmbeddingIndex.open(out, model=encoder, verify=True)
        return {entry.id: entry.text for entry in index.entries(list(index))}

    sizes = {"window_tokens": 100, "batch_tokens": 50, "segment_rows": 40}
    before = rows(60)
    EmbeddingIndex.build(encoder, listed(before), out, **sizes)
    jobs, done = [], [0]

    def next_job():
        kind = done[0] % 3
        new = rows(60, 60 * (done[0] % 2)) if kind < 2 else {}
        after = new if kind == 0 else {**before, **new}
        jobs[:] = [kind, new, after]

    def work():
        kind, new, _ = jobs
        if kind == 0:
            EmbeddingIndex.build(encoder, listed(new), out, overwrite=True, **sizes)
        elif kind == 1:
            EmbeddingIndex.open(out, model=encoder).upsert(listed(new))
        else:
            EmbeddingIndex.open(out, model=encoder).compact()

    def check():
        nonlocal before
        found = read()
        assert found in (before, jobs[2])
        committed = not (out / "build").exists() if jobs[0] == 2 else found == jobs[2]
        if committed:
            before = found
            done[0] += 1
            next_job()

    next_job()
    kills = amount(8, 200)
    whole = kill_often(work, check, kills)
    assert done[0] > 2, "no change came to its end"
    assert ended(forked(work))
    assert read() == jobs[2]
    figure(f"{kills} kills of builds, upserts and compactions, {done[0]} committed ({whole} runs unkilled)")


def test_a_killed_training_goes_on_to_the_same_weights(base, tmp_path, monkeypatch, amount, figure):
    pytest.importorskip("peft")
    from training.contrastive import train

    data = make_training_data(tmp_path)
    monkeypatch.setenv("UBMOE_DATA", str(data))
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}

    def run(name):
        train(make_recipe(base, data, tmp_path / name)(trainer=saving), export=False)

    assert ended(forked(lambda: run("whole")))
    expected = sha256_of(tmp_path / "whole" / "trained.safetensors")
    number, runs = [0], []

    def work():
        run(f"run-{number[0]}")

    def check():
        final = tmp_path / f"run-{number[0]}" / "trained.safetensors"
        if final.is_file():
            assert sha256_of(final) == expected, number
            runs.append(number[0])
            shutil.rmtree(final.parent)
            number[0] += 1

    kills = amount(2, 200)
    kill_often(work, check, kills)
    assert ended(forked(work))
    check()
    figure(f"{kills} kills while training, {len(runs)} runs came to their end, all with the bytes of a run without")


def test_a_killed_push_leaves_the_old_or_the_new_commit(two, tmp_path, monkeypatch, amount, figure):
    wanted = [{u.path: u.sha256 for u in plan(path, REPO) if u.path.endswith(".safetensors")} for path in two]
    assert wanted[0] != wanted[1]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with LoopbackHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        turn, seen = [0], set()

        def work():
            time.sleep = lambda seconds: None  # the client's pauses between attempts
            push(two[turn[0] % 2], REPO, exist_ok=True)

        def content():
            with urllib.request.urlopen(f"{hub.url}/api/models/{REPO}/tree/main?recursive=true") as answer:
                listed = json.load(answer)
            return {file["path"]: file["lfs"]["oid"] for file in listed if "lfs" in file}

        def check():
            now = wanted.index(content())
            seen.add(now)
            turn[0] = now + 1

        kills = amount(6, 200)
        whole = kill_often(work, check, kills)
        assert seen == {0, 1}
        # What a killed process had in flight may be half a request; nothing else may be odd.
        cut = ("JSONDecodeError", "commit: one header")
        assert [problem for problem in hub.problems if not any(word in problem for word in cut)] == []
    figure(f"{kills} kills while pushing, {whole} whole pushes: the old or the new commit each time")
