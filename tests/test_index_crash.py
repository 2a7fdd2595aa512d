"""An index build survives being killed: at every commit point, at random moments, with a full disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers.encoders import HashEncoder, Stops
from helpers.index_driver import CUT, drive, small

from ubmoe_st.index import CorpusError, EmbeddingIndex


def content(folder: Path):
    """Everything an index says, without going through the library: vectors as bytes, entries, dead rows."""
    import pyarrow as pa

    info = json.loads((folder / "index_info.json").read_text())
    vectors = b"".join(np.load(folder / s["folder"] / "vectors.npy").tobytes() for s in info["segments"])
    entries = []
    for segment in info["segments"]:
        with pa.OSFile(str(folder / segment["folder"] / "entries.arrow")) as file:
            entries += pa.ipc.open_file(file).read_all().to_pylist()
    dead = np.load(folder / info["dead"]["file"]).tolist() if info["dead"] else []
    return vectors, entries, dead, (folder / info["index"]["file"]).read_bytes()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    generator = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    with path.open("w") as file:
        for number in range(110):
            words = " ".join(f"w{generator.integers(500)}" for _ in range(int(generator.integers(1, 60))))
            name = f"d{number - 20}" if number % 25 == 0 else f"d{number}"
            file.write(json.dumps({"id": name, "text": words if number % 31 else ""}) + "\n")
    return path


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "i"
    drive("build(sys.argv[2], sys.argv[3])", str(corpus), str(folder))
    found = content(folder)
    assert len(found[1]) > 150
    assert found[2], "no row was replaced, so this test would be vacuous"
    assert len(json.loads((folder / "index_info.json").read_text())["segments"]) > 2
    return found


def test_a_kill_at_every_commit_point_loses_nothing(corpus, uninterrupted, tmp_path):
    """Killed before or after the renames of a whole build, then run again: the same bytes."""
    body = """
    corpus, out = sys.argv[2], Path(sys.argv[3])
    real = os.replace
    def killing(at):
        count = 0
        def replace(a, b):
            nonlocal count
            count += 1
            if 2 * count - 1 == at:
                os.kill(os.getpid(), signal.SIGKILL)
            real(a, b)
            if 2 * count == at:
                os.kill(os.getpid(), signal.SIGKILL)
        return replace
    at = 0
    while True:
        at += 3  # odd: before a rename, even: after it
        folder = out / f"{at:04d}"
        def work():
            os.replace = killing(at)
            build(corpus, folder)
        outcome = finish(attempt(work))
        if outcome == "killed":
            finish(attempt(lambda: build(corpus, folder)))
        else:
            break
    print(at)
    """
    points = int(drive(body, str(corpus), str(tmp_path)))
    assert points > 60
    for number in range(3, points + 1, 3):
        folder = tmp_path / f"{number:04d}"
        assert content(folder) == uninterrupted, number
        assert not (folder / "build").exists()
        assert not list(folder.rglob("*.tmp")), number
    assert EmbeddingIndex.open(folder, verify=True).verify() == []


def test_kills_at_random_moments_lose_nothing(corpus, uninterrupted, tmp_path):
    """Killed again and again wherever it happens to be, until a run ends by itself: the same bytes."""
    body = """
    corpus, out, kills = sys.argv[2], Path(sys.argv[3]), 0
    def wait(pid, seconds):
        end = time.time() + seconds
        while time.time() < end and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001)
    for trial in range(6):
        random.seed(trial)
        patience = 1.0  # grows, so that a machine that is busy with other things gets there, too
        while True:
            pid = attempt(lambda: build(corpus, out / str(trial), delay=0.008))
            wait(pid, patience * random.uniform(0.05, 0.3))
            patience *= 1.1
            os.kill(pid, signal.SIGKILL)
            if finish(pid) == "done":
                break
            kills += 1
    print(kills)
    """
    kills = int(drive(body, str(corpus), str(tmp_path)))
    assert kills >= 6
    for trial in range(6):
        assert content(tmp_path / str(trial)) == uninterrupted


def stopped(tmp_path: Path, corpus: list[dict], **options) -> Path:
    with pytest.raises(KeyboardInterrupt):
        EmbeddingIndex.build(Stops(9, **options), corpus, tmp_path / "i", **CUT)
    assert json.loads((tmp_path / "i" / "build" / "journal.json").read_text())["rows"] > 0
    return tmp_path / "i"


def test_a_resumed_build_embeds_only_what_is_left(tmp_path):
    corpus = small(tmp_path)
    folder = stopped(tmp_path, corpus)
    done = json.loads((folder / "build" / "journal.json").read_text())["rows"]
    encoder = HashEncoder(16, batch_noise=1e-3)
    EmbeddingIndex.build(encoder, corpus, folder, **CUT)
    assert sum(encoder.batches) - 8 == 60 - done  # 8 probes
    whole = EmbeddingIndex.build(HashEncoder(16, batch_noise=1e-3), corpus, tmp_path / "whole", **CUT)
    assert content(folder) == content(whole.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": HashEncoder(16, salt="other")}, "the model changed"),
        ({"encoder": HashEncoder(17)}, "dimension: was 16, is 17"),
        ({"prompts": {"document": "passage: "}}, "prompts"),
        ({"options": {"chunk_tokens": 5}}, "options"),
        ({"options": {"dtype": "float16"}}, "dtype: was 'float32', is 'float16'"),
        ({"options": {"text_field": "id"}}, "fields"),
        ({"rows": lambda rows: [{**rows[0], "text": "changed"}, *rows[1:]]}, "not the one this build began with"),
        ({"rows": lambda rows: rows[1:]}, "not the one this build began with"),
        ({"rows": lambda rows: rows[:2]}, "not the one this build began with"),
        ({"rows": lambda rows: []}, "not the one this build began with"),
    ],
)
def test_a_changed_model_prompt_option_or_corpus_is_refused(tmp_path, change, message):
    corpus = small(tmp_path)
    folder = stopped(tmp_path, corpus)
    encoder = change.get("encoder", HashEncoder(16, batch_noise=1e-3))
    encoder.prompts = change.get("prompts", {})
    corpus = change.get("rows", lambda rows: rows)(corpus)
    with pytest.raises(ValueError, match=message):
        EmbeddingIndex.build(encoder, corpus, folder, **{**CUT, **change.get("options", {})})
    if corpus:
        index = EmbeddingIndex.build(encoder, corpus, folder, **{**CUT, **change.get("options", {})}, overwrite=True)
        assert len(index) == len(corpus)


def test_rows_after_a_bad_one_can_be_indexed_once_it_is_mended(tmp_path):
    corpus = small(tmp_path)
    bad = [*corpus[:50], {"id": "d50"}, *corpus[51:]]
    with pytest.raises(CorpusError, match="row 50"):
        EmbeddingIndex.build(HashEncoder(16, batch_noise=1e-3), bad, tmp_path / "i", **CUT)
    encoder = HashEncoder(16, batch_noise=1e-3)
    index = EmbeddingIndex.build(encoder, corpus, tmp_path / "i", **CUT)
    assert len(index) == 60
    assert sum(encoder.batches) < 60
    whole = EmbeddingIndex.build(HashEncoder(16, batch_noise=1e-3), corpus, tmp_path / "whole", **CUT)
    assert content(index.path) == content(whole.path)


def test_a_second_writer_is_refused_and_readers_are_not(tmp_path):
    corpus = small(tmp_path)
    index = EmbeddingIndex.build(HashEncoder(16), corpus, tmp_path / "i")
    refused = []

    class Nosy(HashEncoder):
        def encode(self, inputs, **kwargs):
            with pytest.raises(RuntimeError, match="another writer") as error:
                EmbeddingIndex.build(HashEncoder(16), corpus, tmp_path / "i", overwrite=True)
            refused.append(error)
            assert EmbeddingIndex.open(tmp_path / "i", model=HashEncoder(16)).search("q", 3)[0].shape == (1, 3)
            return super().encode(inputs, **kwargs)

    EmbeddingIndex.build(Nosy(16, salt="new"), corpus[:9], tmp_path / "i", overwrite=True)
    assert refused
    assert len(index) == 60
    assert len(EmbeddingIndex.open(tmp_path / "i")) == 9


@pytest.mark.parametrize("at", range(1, 60, 4))
def test_a_full_disk_leaves_what_was_committed(tmp_path, monkeypatch, at):
    """The n-th sync finds no space: a clear error, the index from before still opens, a repeated build completes."""
    corpus = small(tmp_path)
    EmbeddingIndex.build(HashEncoder(16), corpus[:7], tmp_path / "i")
    calls = 0
    real = os.fsync

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="intact"):
            EmbeddingIndex.build(HashEncoder(16, batch_noise=1e-3), corpus, tmp_path / "i", overwrite=True, **CUT)
    before = EmbeddingIndex.open(tmp_path / "i", model=HashEncoder(16), verify=True)
    assert len(before) == 7
    assert before.search("q", 7)[0].shape == (1, 7)
    index = EmbeddingIndex.build(HashEncoder(16, batch_noise=1e-3), corpus, tmp_path / "i", overwrite=True, **CUT)
    assert len(index) == 60
    whole = EmbeddingIndex.build(HashEncoder(16, batch_noise=1e-3), corpus, tmp_path / "whole", **CUT)
    assert content(index.path) == content(whole.path)


def test_a_truncated_part_of_an_unfinished_build_is_refused(tmp_path):
    corpus = small(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        EmbeddingIndex.build(Stops(9), corpus, tmp_path / "i", window_tokens=60, batch_tokens=20)
    part = next((tmp_path / "i" / "build").glob("part-*.npy"))
    part.write_bytes(part.read_bytes()[:-3])
    with pytest.raises(ValueError, match=rf"{part.name}.*truncated"):
        EmbeddingIndex.build(
            HashEncoder(16, batch_noise=1e-3), corpus, tmp_path / "i", window_tokens=60, batch_tokens=20
        )
