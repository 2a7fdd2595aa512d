"""The folder of an index: which files are its own, what the manifest says of them, and that nothing else is touched."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
import zipfile
from pathlib import Path

import pytest
from helpers.encoders import HashEncoder
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ubmoe_st import files
from ubmoe_st.files import write_json
from ubmoe_st.index import EmbeddingIndex
from ubmoe_st.index.budget import MemoryBudget
from ubmoe_st.index.manifest import KEPT_SOURCES, Journal, Manifest, owns

CUT = {"window_tokens": 60, "batch_tokens": 20, "segment_rows": 25}
DATA = Path(__file__).parent / "data"
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
    "segments/000000/notes.txt",
    "segments/000001.tmp",
    "build/output.o",
]


@pytest.fixture(scope="module", autouse=True)
def without_syncs():
    """What a stopped process wrote stays with the system: only a power cut needs the syncs, and they take the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


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
        HashEncoder(8), [*ROWS, {"id": "more", "text": str(index.version)}], index.path, overwrite=True, **CUT
    ),
    "stopped": lambda index: stopped(index.path),
}


class Stops(HashEncoder):
    """Fails after some batches, as a machine would."""

    def encode(self, inputs, **kwargs):
        if len(self.batches) >= 14:
            raise KeyboardInterrupt
        return super().encode(inputs, **kwargs)


def stopped(folder: Path) -> None:
    """An addition that ends before its commit, with a segment behind it, and is thrown away."""
    index = EmbeddingIndex.open(folder, model=Stops(8))
    with pytest.raises(KeyboardInterrupt):
        index.add([{"id": f"s{n}", "text": f"some text number {n}"} for n in range(60)])
    assert Journal.read(folder).segments
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


def test_a_name_that_a_stopped_change_gave_back_is_no_longer_its_own(tmp_path, monkeypatch):
    index = EmbeddingIndex.build(HashEncoder(8), ROWS, tmp_path / "i")
    real = os.replace

    def stop(source, target):
        if Path(target).name == "index_info.json":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            index.delete("d1")
    assert (index.path / "dead.npy").exists()
    assert index.delete("absent", missing_ok=True) == 0
    assert not (index.path / "dead.npy").exists()
    held = put(index.path, ["dead.npy"])
    index.delete("d2")
    index.reindex("flat", faiss_file=False)
    check(held)
    assert index.files()[-2:] == ["dead-000002.npy", "probes.npy"]


def test_verify_counts_the_files_it_has_checked(tmp_path):
    from typer.testing import CliRunner

    from ubmoe_st.cli import app

    index = EmbeddingIndex.build(HashEncoder(8), ROWS, tmp_path / "i")
    index.delete("d3")
    shown = json.loads(CliRunner().invoke(app, ["verify", str(index.path), "--json"]).stdout)
    own = [path for path in index.path.rglob("*") if path.is_file() and path.name not in (".lock", "index_info.json")]
    assert shown["files"] == len(own) == 6  # three of the segment, probes, faiss, dead rows


def test_damaged_or_strange_manifests_are_refused(tmp_path):
    index = EmbeddingIndex.build(HashEncoder(8), ROWS, tmp_path / "i")
    path = index.path / "index_info.json"
    good = path.read_text()
    (tmp_path / "precious.txt").write_text("x")
    for was, becomes, message in (
        ('"version": 1,', "", "damaged"),
        ('"probes.npy"', '"../precious.txt"', "no file of an index"),
        ('"segments/000000"', '"segments/../.."', "no file of an index"),
        ('"format_version": 1', '"format_version": 2', "upgrade ubmoe-st"),
        ('"ubmoe-embedding-index"', '"other"', "of format 'other'"),
        ("{", "[", "damaged"),
    ):
        assert was in good
        path.write_text(good.replace(was, becomes, 1))
        with pytest.raises(ValueError, match=message):
            EmbeddingIndex.open(index.path)
    path.write_text(good)
    assert EmbeddingIndex.open(index.path).verify() == []


NAMES = st.one_of(
    st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=12),
    st.builds(
        "".join,
        st.tuples(
            st.sampled_from(["", "segments/", "build/", "segments/000000/"]),
            st.sampled_from(["dead", "index", "probes", "bad_rows", "bm25", "part", "journal", "00000", "index_info"]),
            st.sampled_from(["", "-000002", "-000003", "-000002b", ".1", "1", "2", "7", "_notes", "-x"]),
            st.sampled_from(["", ".npy", ".faiss", ".txt", ".json", ".tmp", ".npy.tmp", "/a", "/b.npy"]),
        ),
    ),
)


def reserved(name: str) -> bool:
    """Names that an index keeps for itself, documented in docs/indexing.md."""
    return name.startswith((".lock", "index_info.json", "build/seen")) or (name.startswith("build/") and owns(name))


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(names=st.lists(NAMES, min_size=1, max_size=8), changes=st.lists(st.sampled_from(sorted(CHANGES)), max_size=3))
def test_nothing_foreign_is_ever_touched(names, changes):
    """Any names, in the folder and in its subfolders, and any changes: foreign files stay, own ones do not pile up."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "i"
        EmbeddingIndex.build(HashEncoder(8), ROWS, folder, **CUT)
        held = put(folder, [name for name in names if not reserved(name) and name not in (".", "..")])
        for change in [*changes, "delete", "compact"]:
            CHANGES[change](EmbeddingIndex.open(folder, model=HashEncoder(8)))
            check(held)
        index = EmbeddingIndex.open(folder, model=HashEncoder(8))
        assert index.verify() == []
        assert len(index.search("a text", 3)[1][0]) == 3
        foreign = {path.relative_to(folder).as_posix() for path in held}
        own = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - foreign
        assert own - {".lock"} == {*index.files(), "index_info.json"}


def test_every_file_an_index_makes_is_of_a_form_it_owns(tmp_path, monkeypatch):
    """So an index that is opened, resumed or thrown away never meets a file of its own that it does not know."""
    seen = set()
    real = os.replace

    def note(source, target):
        for path in (Path(source), Path(target)):
            if tmp_path / "i" in path.parents:
                seen.add(path.relative_to(tmp_path / "i").as_posix())
        real(source, target)

    monkeypatch.setattr(os, "replace", note)
    monkeypatch.setattr(MemoryBudget, "shard_rows", lambda *_: 5)
    index = EmbeddingIndex.build(HashEncoder(8), [*ROWS, {"id": "bad"}], tmp_path / "i", on_bad_row="skip", **CUT)
    for change in sorted(set(CHANGES) - {"overwrite"}):
        CHANGES[change](index)
        index.refresh()
    inside = re.compile(r"segments/\d+\.tmp/(vectors.npy|entries.arrow|keys.npy)(\.tmp)?")
    unknown = {n for n in seen if not owns(n) and not inside.fullmatch(n) and not n.startswith("index_info.json")}
    assert not unknown
    assert {n.split("/")[0].split("-")[0].split(".")[0] for n in seen} == {
        "segments",
        "build",
        "dead",
        "probes",
        "index",
        "bad_rows",
        "bm25",
        "index_info",
    }
    assert any(".1.faiss" in name for name in seen)


def unpacked(name: str, folder: Path) -> Path:
    """An index that an earlier version of this package has written."""
    with zipfile.ZipFile(DATA / f"{name}.zip") as file:
        file.extractall(folder)
    return folder


OLD = [{"id": f"d{n}", "text": f"old text number {n} of nine" if n != 5 else "", "n": n} for n in range(9)]


def test_an_index_of_the_first_layout_opens_and_changes(tmp_path):
    encoder = HashEncoder(4)
    index = EmbeddingIndex.open(unpacked("index_first_layout", tmp_path / "i"), model=encoder, verify=True)
    assert (len(index), index.files()[-2:]) == (8, ["index.faiss", "probes.npy"])
    assert index.search(OLD[3]["text"], 1)[1] == [["d3"]]
    index.delete("d3")
    index.compact()
    index = EmbeddingIndex.open(tmp_path / "i", model=encoder, verify=True)
    assert list(index) == ["d0", "d1", "d2", "d4", "d6", "d7", "d8"]


def masked(text: str) -> str:
    """Without what differs from run to run and from library to library, and without what earlier versions lacked."""
    text = re.sub(r',\s*"rules": \{[^}]*\}', "", text)
    text = re.sub(r'"(created|updated|added|committed|sha256)": "[^"]*"', r'"\1": ""', text)
    text = re.sub(r'"bytes": \d+', '"bytes": 0', text)
    return re.sub(r'"versions": \{[^}]*\}', "", text)


def test_the_manifest_is_byte_for_byte_what_earlier_versions_wrote(tmp_path):
    """Read and written again, and by the same changes made anew."""
    old = unpacked("index_version_4", tmp_path / "old")
    before = (old / "index_info.json").read_bytes()
    write_json(tmp_path / "again.json", Manifest.read(old).as_dict())
    assert (tmp_path / "again.json").read_bytes() == before
    pytest.importorskip("bm25s")
    options = {"segment_rows": 5, "window_tokens": 20, "chunk_tokens": 4, "memory_budget": "64MB"}
    index = EmbeddingIndex.build(HashEncoder(4), OLD, tmp_path / "new", on_bad_row="skip", **options)
    index.upsert([{"id": "d2", "text": "new text"}])
    index.delete("d7")
    index.build_bm25()
    index.delete("d8")
    assert masked((tmp_path / "new" / "index_info.json").read_text()) == masked(before.decode())
    for made in (index, EmbeddingIndex.open(old, verify=True)):
        assert list(made) == [f"d{n}#{c}" for n in (0, 1, 3, 4, 6) for c in (0, 1)] + ["d2#0"]


def test_a_build_that_an_earlier_version_began_goes_on(tmp_path):
    folder = unpacked("index_unfinished", tmp_path / "i")
    before = (folder / "build" / "journal.json").read_bytes()
    journal = Journal.read(folder)
    journal.write(folder)
    assert (folder / "build" / "journal.json").read_bytes() == before
    assert journal.rows == 2
    options = {"segment_rows": 5, "window_tokens": 12, "batch_tokens": 12, "memory_budget": "64MB"}
    encoder = HashEncoder(4)
    index = EmbeddingIndex.build(encoder, OLD, folder, on_bad_row="skip", **options)
    assert sum(encoder.batches) == 8 + 6, "rows were embedded again"
    whole = EmbeddingIndex.build(HashEncoder(4), OLD, tmp_path / "whole", on_bad_row="skip", **options)
    assert index.vectors(list(whole)).tobytes() == whole.vectors(list(whole)).tobytes()


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(number):
        def flock(*_):
            raise OSError(number, os.strerror(number))

        return flock

    for number in (errno.ENOLCK, errno.ENOSYS):
        monkeypatch.setattr(fcntl, "flock", refuse(number))
        with pytest.raises(OSError, match="has no locks"):
            EmbeddingIndex.build(HashEncoder(8), ROWS, tmp_path / "i")
    monkeypatch.undo()
    assert len(EmbeddingIndex.build(HashEncoder(8), ROWS, tmp_path / "i")) == 12


def test_the_memory_of_a_search_is_a_size_like_that_of_a_build(tmp_path):
    for wrong, message in (("lots", "a size is"), ("10KB", "at least 1 MiB")):
        with pytest.raises(ValueError, match=message):
            EmbeddingIndex.build(HashEncoder(8), ROWS, tmp_path / "i", search_memory_budget=wrong)
    index = EmbeddingIndex.build(HashEncoder(8), ROWS, tmp_path / "i", search_memory_budget="1.5GiB")
    assert index.info["index"]["memory_mb"] == 1536
    index.compact()
    assert index.info["index"]["memory_mb"] == 1536
    index.reindex("flat", search_memory_budget=400 << 20)
    assert EmbeddingIndex.open(index.path).info["index"]["memory_mb"] == 400


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda info: info.update(rows="12"), "rows: expected"),
        (lambda info: info.update(dimension=0), "no dimensions"),
        (lambda info: info.update(dtype="int8"), "its dtype is"),
        (lambda info: info["segments"][0].update(rows=-1), "rows is negative"),
        (lambda info: info["segments"][0]["files"].update({"vectors.npy": {"sha256": "x"}}), "expected bytes"),
        (lambda info: info["model"].update(prompts=[]), "prompts: expected"),
        (lambda info: info.update(sources=[{}]), "config"),
        (None, "is not valid JSON"),
    ],
)
def test_a_manifest_of_other_types_is_damaged(tmp_path, change, said):
    EmbeddingIndex.build(HashEncoder(16), ROWS, tmp_path / "i")
    file = tmp_path / "i" / "index_info.json"
    info = json.loads(file.read_text())
    if change is not None:
        change(info)
    file.write_text(json.dumps(info) if change is not None else "[" * 100_000)
    with pytest.raises(ValueError, match=rf"index_info\.json is damaged.*{said}"):
        EmbeddingIndex.open(tmp_path / "i")


@pytest.mark.parametrize("part", ["keys", "dead", "offsets", "header"])
def test_parts_that_lead_out_of_an_index_are_refused(tmp_path, part):
    """Of the recorded size, so that only what is inside is wrong: Arrow would read beyond the end of its file."""
    index = EmbeddingIndex.build(HashEncoder(16), ROWS, tmp_path / "i")
    index.delete("d3")
    name = {"keys": "keys.npy", "dead": "dead", "offsets": "entries.arrow", "header": "vectors.npy"}[part]
    file = next(path for path in (tmp_path / "i").rglob("*") if path.name.startswith(name))
    content = bytearray(file.read_bytes())
    if part == "keys":
        content[-8:] = (10**9).to_bytes(8, "little")
    elif part == "dead":
        content[-8:] = (10**9).to_bytes(8, "little")
    elif part == "offsets":
        ends = b"".join(n.to_bytes(4, "little") for n in (0, 2, 4, 6))  # of the ids d0, d1, d2, ...
        place = content.index(ends) + 4
        content[place : place + 4] = (2**30).to_bytes(4, "little")
    else:
        content[10:80] = b"(" * 70
    file.write_bytes(content)

    def read():
        opened = EmbeddingIndex.open(tmp_path / "i")
        opened.entries([row["id"] for row in ROWS if row["id"] != "d3"])

    with pytest.raises(ValueError, match="entries.arrow" if part == "keys" else file.name):
        read()


def test_records_of_many_additions_become_one_when_the_index_is_compacted(tmp_path):
    encoder = HashEncoder(8)
    index = EmbeddingIndex.build(encoder, ["text 0"], tmp_path / "i", id_field=None)
    for n in range(1, KEPT_SOURCES + 5):
        index.add([f"text {n}", "" if n in (1, 3, KEPT_SOURCES + 4) else f"other {n}"], on_bad_row="skip")
    before = index.info["sources"]
    ids = list(index)
    index.compact()
    after = index.info["sources"]
    assert (len(before), len(after)) == (KEPT_SOURCES + 5, KEPT_SOURCES)
    assert after[1:] == before[6:]
    assert after[0]["others"] == 5
    for name in ("corpus_rows", "entries", "tokens", "bad_rows", "duplicates_left_out"):
        assert sum(source[name] for source in after) == sum(source[name] for source in before), name
    reports = (tmp_path / "i" / after[0]["bad_rows_file"]).read_text().splitlines()
    assert len(reports) == 2
    assert all("empty 'text'" in line for line in reports)
    assert len(list((tmp_path / "i").glob("bad_rows*"))) == 2
    assert list(index) == ids
    index = EmbeddingIndex.open(tmp_path / "i", model=encoder)
    assert index.add(["last"]) == 1
    assert list(index)[-1] == str(2 * (KEPT_SOURCES + 5) - 1), "numbers of rows do not go on"
    index.compact()
    again = index.info["sources"]
    assert (len(again), again[0]["others"]) == (KEPT_SOURCES, 6)
    assert index.verify() == []


def test_an_index_whose_manifest_could_not_be_read_again_takes_nothing_more(tmp_path, monkeypatch):
    index = EmbeddingIndex.build(HashEncoder(8), ROWS, tmp_path / "i")
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 20_000)
    number = 0
    while (tmp_path / "i" / "index_info.json").stat().st_size <= 18_000:
        number += 1
        index.upsert([{"id": "d1", "text": f"version {number}"}])
    with pytest.raises(ValueError, match=r"index_info.json has .* call compact\(\)"):
        index.upsert([{"id": "d1", "text": "one more"}])
    assert EmbeddingIndex.open(tmp_path / "i").texts("d1") == [f"version {number}"]
    assert not (tmp_path / "i" / "build").exists()
    index.compact()
    assert index.upsert([{"id": "d1", "text": "after"}]) == 1
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 2_000)
    with pytest.raises(ValueError, match="could not be read again, expected at most 2,000: it was not written"):
        write_json(tmp_path / "i" / "index_info.json", {"x": "y" * 3000})
    monkeypatch.undo()
    assert EmbeddingIndex.open(tmp_path / "i").texts("d1") == ["after"]
