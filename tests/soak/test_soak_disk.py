"""No space, no right to write or to read: a clear error, what was there stays whole, and it goes on afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.encoders import HashEncoder
from helpers.kills import ended, forked
from helpers.models import TEXTS
from helpers.training import make_recipe, make_training_data

from ubmoe_st import EmbeddingIndex, UBMoE
from ubmoe_st.checkpoint import verify_sums

ROWS = [{"id": f"d{n}", "text": f"some text number {n}"} for n in range(400)]
NOBODY = 65534


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system in memory, or mounts it again with other options."""
    folder = tmp_path / "small"
    folder.mkdir()

    def call(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return folder

    if shutil.which("mount") is None or not hasattr(os, "geteuid"):
        pytest.skip("no file system can be mounted here: there is no mount")
    yield call
    while os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def as_nobody(work: Callable[[], object]) -> None:
    """Do the work in a child without the rights of root, whom permission bits do not bind."""

    def without_rights() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        work()

    assert ended(forked(without_rights))


def fill(folder: Path, leave: int) -> Path:
    """Take all space of a file system but so many bytes."""
    file = folder / "filler"
    with file.open("wb") as filler:
        left = shutil.disk_usage(folder).free - leave
        filler.write(b"\0" * max(0, left))
    return file


def test_a_full_disk_leaves_checkpoint_and_index_as_they_were(checkpoint, mount, amount, figure):
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    small = mount("size=16m")
    model = UBMoE(str(checkpoint), device="cpu")
    encoder = HashEncoder(16)
    model.save(str(small / "m"))
    sums = (small / "m" / "SHA256SUMS").read_text()
    EmbeddingIndex.build(encoder, ROWS[:9], small / "i", segment_rows=50)
    there = {path.name for path in small.iterdir()}
    tries = amount(6, 100)
    for number in range(tries):
        filler = fill(small, leave=int(number / tries * size))
        with pytest.raises(OSError, match=r"no space left while writing m.*intact"):
            model.save(str(small / "m"))
        filler.unlink()
        assert {path.name for path in small.iterdir()} == there
        assert (small / "m" / "SHA256SUMS").read_text() == sums
        verify_sums(small / "m")
    for number in range(tries):
        filler = fill(small, leave=int(number / tries * 40_000))
        with pytest.raises(OSError, match="intact"):
            EmbeddingIndex.build(encoder, ROWS, small / "i", segment_rows=50, overwrite=True)
        filler.unlink()
        assert len(EmbeddingIndex.open(small / "i", verify=True)) == 9
    model.save(str(small / "m"))
    assert len(EmbeddingIndex.build(encoder, ROWS, small / "i", segment_rows=50, overwrite=True)) == len(ROWS)
    assert np.array_equal(UBMoE(str(small / "m"), device="cpu").encode(TEXTS), model.encode(TEXTS))
    figure(f"{tries} saves and {tries} builds with too little space: a clear error, the old one whole")


def test_a_training_that_found_no_space_goes_on(base, mount, tmp_path, monkeypatch, figure):
    pytest.importorskip("peft")
    from training.contrastive import train

    data = make_training_data(tmp_path)
    monkeypatch.setenv("UBMOE_DATA", str(data))
    saving = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    whole = make_recipe(base, data, tmp_path / "whole")(trainer=saving)
    train(whole, export=False)
    small = mount("size=1m")
    broken = make_recipe(base, data, small / "run")(trainer=saving)
    filler = fill(small, leave=60_000)
    with pytest.raises((OSError, RuntimeError)):  # torch says of a full disk what it says of any stream
        train(broken, export=False)
    filler.unlink()
    train(broken, export=False)
    expected, found = (folder / "trained.safetensors" for folder in (tmp_path / "whole", small / "run"))
    assert found.read_bytes() == expected.read_bytes()
    figure("a training stopped by a full disk ends with the bytes of one that was not")


def test_a_read_only_disk_is_enough_to_read(checkpoint, mount, figure):
    small = mount("size=16m")
    shutil.copytree(checkpoint, small / "m")
    model = UBMoE(str(small / "m"), device="cpu")
    index = EmbeddingIndex.build(model, [{"id": t, "text": t} for t in TEXTS], small / "i")
    expected = model.encode(TEXTS)
    found = index.search(TEXTS, 2)[1]
    mount("remount,ro")
    again = UBMoE(str(small / "m"), device="cpu", verify=True)
    assert np.array_equal(again.encode(TEXTS), expected)
    assert again.generate("the cat", max_new_tokens=3) == model.generate("the cat", max_new_tokens=3)
    assert EmbeddingIndex.open(small / "i", verify=True).search(TEXTS, 2)[1] == found
    for write in (
        lambda: again.save(str(small / "m")),
        lambda: again.save(str(small / "n")),
        lambda: EmbeddingIndex.open(small / "i").delete(TEXTS[0]),
        lambda: EmbeddingIndex.build(again, TEXTS, small / "j"),
    ):
        with pytest.raises(OSError, match=f"(?i)read-only.*{small}"):
            write()
    verify_sums(small / "m")
    figure("encoding, generating and search from a read-only disk; four ways to write refused with its name")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_without_the_right_to_write_nothing_changes(checkpoint, tmp_path, figure):
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_mode & 0o055 != 0o055:
            parent.chmod(parent.stat().st_mode | 0o055)
    shutil.copytree(checkpoint, tmp_path / "m")
    encoder = HashEncoder(16)
    EmbeddingIndex.build(encoder, ROWS[:9], tmp_path / "i")
    model = UBMoE(str(tmp_path / "m"), device="cpu")
    assert model.generate("the cat", max_new_tokens=2)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    locked = tmp_path / "m" / "model-bi.safetensors"
    tmp_path.chmod(0o555)
    for path in tmp_path.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def work():
        for write in (
            lambda: model.save(str(tmp_path / "m")),
            lambda: model.save(str(tmp_path / "n")),
            lambda: EmbeddingIndex.open(tmp_path / "i", model=encoder).delete("d0"),
            lambda: EmbeddingIndex.build(encoder, ROWS, tmp_path / "j"),
        ):
            with pytest.raises(PermissionError, match=str(tmp_path)):
                write()
        assert len(EmbeddingIndex.open(tmp_path / "i", model=encoder, verify=True).search("q", 3)[1][0]) == 3
        verify_sums(tmp_path / "m")

    def read():
        with pytest.raises(PermissionError, match="model-bi"):
            UBMoE(str(tmp_path / "m"), device="cpu")

    as_nobody(work)
    locked.chmod(0o000)
    as_nobody(read)
    locked.chmod(0o644)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    verify_sums(tmp_path / "m")
    tmp_path.chmod(0o755)
    figure("four ways to write without the right to, one to read: refused by name, nothing changed")
