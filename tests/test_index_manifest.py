"""The folder of an index: which files are its own, what the manifest says of them, and that nothing else is touched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from test_index_crash import Stops
from test_index_encoders import HashEncoder

from ubmoe_st.index import EmbeddingIndex

ROWS = [{"id": f"d{n}", "text": f"some text number {n}"} for n in range(12)]
FOREIGN = [
    "index_notes.md",
    "index.html",
    "index/page.txt",
    "index-000099.faiss",
    "dead_letters.txt",
    "dead-000002.npy",
    "dead.npy.tmp",
    "probes.txt",
    "bad_rows.csv",
    "bm25-notes.txt",
    "bm25-000002/mine.txt",
    "segments/notes.txt",
    "segments/000009/vectors.npy",
    "segments/000001.tmp",
    "build/output.o",
]


def put(folder: Path, names: list[str]) -> dict[Path, bytes]:
    """Files that are none of the index's, as far as their names are free; with what they hold."""
    held = {}
    for number, name in enumerate(names):
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(path):
                continue
            path.write_bytes(f"precious {number}".encode())
        except OSError:  # a name the file system does not take
            continue
        held[path] = f"precious {number}".encode()
    return held


def check(held: dict[Path, bytes]) -> None:
    lost = [path.name for path, content in held.items() if not path.is_file() or path.read_bytes() != content]
    assert not lost


CHANGES = {
    "delete": lambda index: index.delete(next(iter(index))),
    "add": lambda index: index.upsert(
        [{"id": "d1", "text": f"version {index.version}"}, {"id": f"v{index.version}", "text": "x"}]
    ),
    "compact": lambda index: index.compact(),
    "reindex": lambda index: index.reindex("faiss:SQ8" if index.kind == "flat" else "flat", faiss_file=True),
    "bm25": lambda index: index.build_bm25(),
    "tune": lambda index: index.tune(0.01, k=1) if index.kind != "flat" else None,
    "overwrite": lambda index: EmbeddingIndex.build(
        HashEncoder(8), [*ROWS, {"id": "more", "text": str(index.version)}], index.path, overwrite=True
    ),
    "stopped": lambda index: stopped(index.path),
}


def stopped(folder: Path) -> None:
    """An addition that ends before its commit, and is thrown away."""
    index = EmbeddingIndex.open(folder, model=Stops(4, salt=""))
    index._embedder.model.dimension = 8
    with pytest.raises(KeyboardInterrupt):
        index.add([{"id": f"s{n}", "text": f"some text number {n}"} for n in range(60)])
    assert index.discard_unfinished()


@pytest.mark.parametrize("name", FOREIGN)
def test_a_change_touches_no_file_of_others(tmp_path, name):
    index = EmbeddingIndex.build(HashEncoder(8), ROWS, tmp_path / "i")
    held = put(index.path, [name])
    assert held
    for change in ("delete", "add", "bm25", "reindex", "compact", "overwrite"):
        if change != "bm25" or pytest.importorskip("bm25s"):
            CHANGES[change](EmbeddingIndex.open(index.path, model=HashEncoder(8)))
            check(held)
    assert EmbeddingIndex.open(index.path).verify() == []


def test_an_index_in_a_folder_called_segments_keeps_its_vectors(tmp_path):
    index = EmbeddingIndex.build(HashEncoder(8), ROWS, tmp_path / "segments")
    index.delete("d1")
    again = EmbeddingIndex.open(tmp_path / "segments", model=HashEncoder(8), verify=True)
    assert again.search("some text number 3", 1)[1] == [["d3"]]


def test_bm25_interrupted_before_its_commit_is_made_again(tmp_path, monkeypatch):
    """Any number of times: what was left behind neither stands in the way nor stays."""
    pytest.importorskip("bm25s")
    index = EmbeddingIndex.build(HashEncoder(8), ROWS, tmp_path / "i")
    real = os.replace

    def stop(source, target):
        if Path(target).name == "index_info.json":
            raise KeyboardInterrupt
        real(source, target)

    for _ in range(4):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stop)
            with pytest.raises(KeyboardInterrupt):
                index.build_bm25()
    index.build_bm25()
    assert index.search("number 11", 1, mode="bm25")[1] == [["d11"]]
    assert len(list(index.path.glob("bm25*"))) == 1
    assert index.verify() == []


def test_verify_counts_the_files_it_has_checked(tmp_path):
    from typer.testing import CliRunner

    from ubmoe_st.cli import app

    index = EmbeddingIndex.build(HashEncoder(8), ROWS, tmp_path / "i")
    index.delete("d3")
    shown = json.loads(CliRunner().invoke(app, ["verify", str(index.path), "--json"]).stdout)
    own = [path for path in index.path.rglob("*") if path.is_file() and path.name not in (".lock", "index_info.json")]
    assert shown["files"] == len(own) == 6  # three of the segment, probes, faiss, dead rows
