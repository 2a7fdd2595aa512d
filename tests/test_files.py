"""A name shows the old content or the new content, never a part, and nothing is left over when a write fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest

from ubmoe_st import files


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


def put(path, kind, content):
    """Write `content` (bytes) in each of the ways a place can be taken."""
    if kind == "writer":
        with files.replacing(path) as file:
            file.write(content)
    elif kind == "name":
        with files.replacing_by_name(path) as temporary:
            temporary.write_bytes(content)
            temporary.chmod(0o600)  # as some libraries do
    else:
        context = files.replacing_folder if kind == "folder" else files.replacing_by_name
        with context(path) as temporary:
            temporary.mkdir(exist_ok=True)
            (temporary / "inner").mkdir()
            (temporary / "inner" / "file").write_bytes(content)
            (temporary / "inner" / "file").chmod(0o600)


def held(path):
    return (path / "inner" / "file" if path.is_dir() else path).read_bytes()


KINDS = ["writer", "name", "folder", "folder-by-name"]


def test_hashes_are_those_of_hashlib(tmp_path):
    data = os.urandom(files.COPY_BYTES + 7)
    with files.replacing(tmp_path / "file") as file:
        assert file.write(data[:5]) + file.write(memoryview(data)[5:]) == len(data)
        record = file.record()
    assert (tmp_path / "file").read_bytes() == data
    expected = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert record == files.record_of(tmp_path / "file") == expected
    assert files.sha256_of(tmp_path / "file") == expected["sha256"]


def test_a_full_disk_names_what_was_asked_for(tmp_path):
    """Not the file inside of it that did not fit."""

    def write():
        with files.replacing_by_name(tmp_path / "outer") as temporary:
            temporary.mkdir()
            with files.replacing_by_name(temporary / "inner"):
                raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="no space left while writing outer; everything") as told:
        write()
    assert told.value.filename == str(tmp_path / "outer")
    assert str(told.value.__cause__) == "[Errno 28] No space left on device"
    assert not names(tmp_path)


@pytest.mark.parametrize("kind", ["name", "folder", "folder-by-name"])
def test_what_a_link_leads_to_is_replaced(tmp_path, kind):
    (tmp_path / "there").mkdir()
    put(tmp_path / "there" / "target", kind, b"old")
    (tmp_path / "link").symlink_to(tmp_path / "there" / "target")
    put(tmp_path / "link", kind, b"new")
    assert held(tmp_path / "there" / "target") == b"new"
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["target"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_there_is_replaced(tmp_path, kind):
    put(tmp_path / "a", kind, b"old")
    put(tmp_path / "a", kind, b"new")
    assert held(tmp_path / "a") == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_a_failure_at_any_call_leaves_the_old_content_or_the_new(tmp_path, monkeypatch, kind, call, error):
    """The first, second, ... fsync or rename fails, until a write gets through."""
    real, failed = getattr(os, call), 0
    put(tmp_path / "a", kind, b"old")
    while True:
        calls = iter(range(100))

        def fail(*args, _calls=calls, _at=failed):
            if next(_calls) == _at:
                raise error
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            if call == "replace":  # as where two names cannot be exchanged
                patch.setattr(files, "_exchange", lambda one, other: False)
            told = ""
            try:
                put(tmp_path / "a", kind, b"new")
                break
            except (KeyboardInterrupt, OSError) as raised:
                told = str(raised)
        assert ("no space left while writing a" in told) == isinstance(error, OSError)
        # The folder by name has no old content to keep once its place is being taken.
        if (tmp_path / "a").exists() or kind != "folder-by-name":
            assert held(tmp_path / "a") in (b"old", b"new")
        assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
        failed += 1
    assert failed
    assert held(tmp_path / "a") == b"new"


def test_other_errors_pass_as_they_are(tmp_path):
    for context in (files.replacing, files.replacing_by_name, files.replacing_folder):
        with pytest.raises(PermissionError, match="mine"), context(tmp_path / "a"):
            raise PermissionError(errno.EACCES, "mine")
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_modes_are_those_of_the_umask(tmp_path, kind, umask, file_mode, folder_mode):
    before = os.umask(umask)
    try:
        put(tmp_path / "a", kind, b"x")
    finally:
        os.umask(before)
    found = {path.is_dir(): path.stat().st_mode & 0o777 for path in [tmp_path / "a", *(tmp_path / "a").rglob("*")]}
    expected = {True: folder_mode, False: file_mode}
    assert found == {is_dir: expected[is_dir] for is_dir in found}


@pytest.mark.parametrize("kind", ["writer", "name"])
def test_a_file_does_not_replace_a_folder(tmp_path, kind):
    put(tmp_path / "a", "folder", b"old")
    with pytest.raises(OSError, match="directory"):
        put(tmp_path / "a", kind, b"new")
    assert held(tmp_path / "a") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_temporary_file_of_a_killed_process_is_taken_over(tmp_path):
    (tmp_path / "a.tmp").write_bytes(b"half")
    put(tmp_path / "a", "writer", b"new")
    (tmp_path / "a.tmp").mkdir()
    (tmp_path / "a.tmp" / "half").write_bytes(b"half")
    put(tmp_path / "a", "name", b"newer")
    assert names(tmp_path) == ["a"]


def test_unique_names_leave_the_files_of_others_alone(tmp_path):
    (tmp_path / "a.tmp").write_text("mine")
    with files.replacing(tmp_path / "a", unique=True) as first, files.replacing(tmp_path / "a", unique=True) as second:
        first.write(b"first")
        second.write(b"second")
    assert (tmp_path / "a").read_bytes() == b"first"  # it ends last
    assert names(tmp_path) == ["a", "a.tmp"]
    assert (tmp_path / "a.tmp").read_text() == "mine"


def test_the_first_of_several_wins_where_asked(tmp_path):
    with files.replacing_by_name(tmp_path / "a", unique=True, first_wins=True) as temporary:
        temporary.mkdir()
        put(tmp_path / "a", "folder", b"first")
    assert held(tmp_path / "a") == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_replaced_folder_keeps_what_is_asked(tmp_path):
    target = tmp_path / "a"
    target.mkdir()
    (target / "ours.bin").write_text("old")
    (target / "notes").mkdir()
    (target / "notes" / "n.txt").write_text("mine")
    with files.replacing_folder(target, keep=lambda entry: entry.suffix != ".bin") as temporary:
        (temporary / "new").write_text("new")
    assert names(target) == ["n.txt", "new", "notes"]
    with pytest.raises(FileExistsError, match="not empty"), files.replacing_folder(target, overwrite=False):
        pass
    with pytest.raises(FileExistsError, match="is a file"), files.replacing_folder(target / "new"):
        pass
    assert names(tmp_path) == ["a", "n.txt", "new", "notes"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", ["rename", "rmtree", "before"])
def test_a_kill_while_a_folder_is_replaced_leaves_one_of_both(tmp_path, moment):
    """Killed after the first rename, or before the old folder is removed: files of others are there."""
    target = tmp_path / "a"
    target.mkdir()
    (target / "ours.bin").write_text("old")
    (target / "notes").mkdir()
    (target / "notes" / "n.txt").write_text("mine")
    (target / "link").symlink_to("notes")
    pid = os.fork()
    if pid == 0:
        real = os.replace

        def dies(*arguments, **options):
            if len(arguments) == 2:
                real(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        if moment == "rename":
            os.replace = dies
        if moment != "before":
            files.shutil.rmtree = dies
        with files.replacing_folder(target, keep=lambda entry: entry.suffix != ".bin") as temporary:
            (temporary / "new.bin").write_text("new")
            if moment == "before":
                dies()
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert (target / ("ours.bin" if moment == "before" else "new.bin")).is_file()
    assert (target / "notes" / "n.txt").read_text() == "mine"
    assert (target / "link").is_symlink()
    assert len(list(tmp_path.iterdir())) == 2, "nothing was left, so that there is nothing to tidy"
    with files.replacing_folder(target, keep=lambda entry: entry.suffix != ".bin") as temporary:
        with files.replacing_folder(target):  # the next does not remove what a living writer has
            pass
        (temporary / "newer.bin").write_text("newer")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert names(target) == ["link", "n.txt", "newer.bin", "notes"]


def test_without_an_exchange_of_names_a_folder_is_replaced_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for content in ("old", "new"):
        with files.replacing_folder(tmp_path / "a", keep=lambda entry: False) as temporary:
            (temporary / content).write_text(content)
    assert names(tmp_path) == ["a", "new"]


def test_removing_takes_anything(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    files.remove(tmp_path / "link")
    assert names(tmp_path) == ["file", "folder"]
    for name in ("folder", "nothing"):
        files.remove(tmp_path / name)
    assert names(tmp_path) == []


def test_json_round_trip_and_bad_content(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"ä": [1]})
    assert path.read_bytes() == '{\n  "ä": [\n    1\n  ]\n}\n'.encode()
    assert files.read_json(path) == {"ä": [1]}
    files.write_json(path, [1], indent=1, unique=True)
    assert json.loads(path.read_text()) == [1]
    with pytest.raises(ValueError, match=r"a\.json: expected a JSON object, got list"):
        files.read_json(path)
    for content in (b"{", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
            files.read_json(path)
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "absent")


def test_it_loads_neither_torch_nor_numpy():
    check = "import ubmoe_st.files, sys; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
