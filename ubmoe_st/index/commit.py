"""Commits: how a finished piece of work becomes the next version of an index."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .budget import MemoryBudget
from .builder import BuildWriter, library_versions, next_segment, now, write_segment
from .corpus import Corpus, Document
from .hybrid import bm25_folder, write_bm25
from .kinds import FLAT_ROWS, choose, write_files
from .snapshot import FORMAT, FORMAT_VERSION, INFO_FILE, Snapshot, read_info, referenced, rows_union
from .storage import WriterLock, remove, replacing, write_json, write_npy

OWN_PREFIXES = ("dead", "index", "probes", "bad_rows", "bm25-")
"""How the first-level names of an index begin, beside `build`, `segments` and `.lock`."""
COPY_ROWS = 8192
"""Rows copied at a time when an index is compacted."""


def free_name(folder: Path, stem: str, suffix: str, number: int) -> str:
    """`stem + suffix`, or the same with the version number when that name is taken."""
    plain = f"{stem}{suffix}"
    return plain if not (folder / plain).exists() else f"{stem}-{number:06d}{suffix}"


def publish(folder: Path, info: dict[str, Any]) -> Snapshot:
    """Make `info` the current version, then remove what no version needs any more.

    Readers that opened an older version keep their maps of removed files.
    """
    snapshot = Snapshot(folder, info)
    info["rows"], info["stored_rows"], info["updated"] = len(snapshot), snapshot.stored_rows, now()
    write_json(folder / INFO_FILE, info)
    needed = referenced(info)
    for path in [*folder.iterdir(), *(folder / "segments").iterdir()]:
        name = path.relative_to(folder).as_posix()
        ours = path.parent.name == "segments" or path.name.startswith(OWN_PREFIXES)
        if ours and name not in needed and name != INFO_FILE:
            remove(path)
    remove(folder / "build")
    return snapshot


def write_dead(folder: Path, rows: np.ndarray, version: int) -> dict[str, Any] | None:
    """The file of rows that are no longer found, (n,) sorted; None for no rows."""
    if not len(rows):
        return None
    name = free_name(folder, "dead", ".npy", version)
    return {"file": name, "rows": len(rows), **write_npy(folder / name, rows.astype(np.int64))}


def write_bad_rows(folder: Path, source: Path, version: int) -> str | None:
    """Keep the report of bad rows; None when there were none."""
    if not source.is_file() or not source.stat().st_size:
        return None
    name = free_name(folder, "bad_rows", ".txt", version)
    with source.open("rb") as reports, replacing(folder / name) as file:
        shutil.copyfileobj(reports, file)
    return name


def source_record(writer: BuildWriter, version: int) -> dict[str, Any]:
    """What an index remembers of a corpus that went into it."""
    journal = writer.journal
    return {
        "version": version,
        "name": writer.corpus.name,
        "corpus_rows": journal["position"]["row"],
        "sha256_of_rows": journal["position"]["digest"],
        "entries": journal["rows"],
        "tokens": journal["tokens"],
        "bad_rows": journal["bad_rows"],
        "bad_rows_file": write_bad_rows(writer.folder, writer.work / "bad_rows.txt", version),
        "duplicates_left_out": journal["duplicates"],
        "config": journal["config"],
        "added": now(),
    }


def commit_build(
    writer: BuildWriter, kind: str, memory_mb: int | None, faiss_file: bool | None, budget: MemoryBudget
) -> Snapshot:
    """The first version of an index, or the next one if another index was there."""
    folder, journal = writer.folder, writer.journal
    version = read_info(folder)["version"] + 1 if (folder / INFO_FILE).is_file() else 1
    probes = free_name(folder, "probes", ".npy", version)
    embedder = writer.embedder
    info: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "version": version,
        "committed": journal["token"],
        "edited": False,
        "created": now(),
        "updated": now(),
        "rows": journal["rows"],
        "stored_rows": journal["rows"],
        "dimension": writer.dimension,
        "dtype": writer.dtype,
        "metric": "cosine",
        "model": {
            **embedder.as_dict(folder),
            "weights": journal["config"]["weights"],
            "truncate_dim": embedder.truncate_dim,
            "max_tokens": embedder.max_tokens,
            "prompts": embedder.prompts(),
            "probes": {"file": probes, **write_npy(folder / probes, writer.probes)},
        },
        "fields": writer.corpus.fields.as_dict(),
        "options": journal["config"]["options"],
        "segment_rows": journal["config"]["segment_rows"],
        "segments": journal["segments"],
        "dead": None,
        "index": {"files": []},
        "bm25": None,
        "sources": [],
        "versions": library_versions(),
    }
    snapshot = Snapshot(folder, info)
    info["dead"] = write_dead(folder, writer.dead_rows(snapshot), version)
    writer.report("index", 1.0)
    info["index"] = write_faiss(snapshot, version, kind, memory_mb, faiss_file, budget)
    info["sources"] = [source_record(writer, version)]
    return publish(folder, info)


def commit_add(writer: BuildWriter, base: Snapshot) -> Snapshot:
    """The next version: `base` and the new segments, less what they replace."""
    folder = writer.folder
    info = next_version(base)
    info["committed"] = writer.journal["token"]
    info["segments"] = [*base.info["segments"], *writer.journal["segments"]]
    info["dead"] = None
    dead = rows_union([base.dead, writer.dead_rows(Snapshot(folder, info))])
    info["dead"] = write_dead(folder, dead, info["version"])
    info["sources"] = [*base.info["sources"], source_record(writer, info["version"])]
    return publish(folder, info)


def next_version(base: Snapshot) -> dict[str, Any]:
    """A copy of the manifest to change and publish."""
    info = copy.deepcopy(base.info)
    info["version"] += 1
    return info


def write_faiss(
    snapshot: Snapshot, version: int, kind: str, memory_mb: int | None, faiss_file: bool | None, budget: MemoryBudget
) -> dict[str, Any]:
    """The faiss files of all stored rows and their part of the manifest.

    A flat index is searched in the stored vectors; it has a faiss file, for other programs, when that is asked for, or
    left open and there are few rows.
    """
    rows, dimension = snapshot.stored_rows, snapshot.dimension
    choice = choose(kind, rows, dimension, memory_mb, budget)
    files: list[dict[str, Any]] = []
    if choice.kind != "flat" or (rows <= FLAT_ROWS if faiss_file is None else faiss_file):
        path = snapshot.folder / free_name(snapshot.folder, "index", ".faiss", version)
        files = write_files(choice, dimension, rows, snapshot.sample, snapshot.read_blocks, path, budget)
    return {
        "file": files[0]["file"] if files else None,
        "files": files,
        "kind": choice.kind,
        "requested": kind,
        "memory_mb": memory_mb,
        "faiss_file": faiss_file,
        "factory": choice.factory,
        "why": choice.why,
        "rows": rows,
        "bytes": sum(file["bytes"] for file in files) or None,
        "parameters": choice.parameters,
        "tuned": None,
    }


def same_build(folder: Path, writer: BuildWriter, kind: str, faiss_file: bool | None) -> bool:
    """Whether the index that is there is what this build would make, from the same rows of the same corpus."""
    info = read_info(folder)
    return (
        len(info["sources"]) == 1
        and not info["edited"]
        and (info["index"]["requested"], info["index"]["faiss_file"]) == (kind, faiss_file)
        and same_config(info["sources"][0], writer)
        and same_rows(info["sources"][0], writer.corpus)
    )


def repeated_addition(writer: BuildWriter, base: Snapshot) -> int | None:
    """How many entries this addition made, if it was the last thing done to the index; None if it was not.

    A corpus that can be read only once is never taken for a repeated one.
    """
    source = base.info["sources"][-1]
    if (
        source.get("version") != base.version
        or (writer.unfinished() and not writer.committed())
        or not writer.corpus.repeatable
        or not same_config(source, writer)
        or not same_rows(source, writer.corpus)
    ):
        return None
    return int(source["entries"])


def same_config(source: dict[str, Any], writer: BuildWriter) -> bool:
    """Whether a corpus went in as `writer` would take it in."""
    before, now = source["config"], json.loads(json.dumps(writer.config()))
    return all(before.get(name) == value for name, value in now.items() if name != "base_version")


def same_rows(source: dict[str, Any], corpus: Corpus) -> bool:
    """Whether a corpus has the very rows that are on record."""
    digest = hashlib.sha256()
    rows = 0
    for item in corpus:
        rows += 1
        if rows > source["corpus_rows"]:
            return False
        digest.update(item.digest_bytes() if isinstance(item, Document) else b"bad row")
        digest.update(b"\n")
    return rows == source["corpus_rows"] and digest.hexdigest() == source["sha256_of_rows"]


def discard_unfinished(folder: Path) -> bool:
    """Throw away an unfinished build or addition; True if there was one. What is committed stays."""
    with WriterLock(folder):
        found = (folder / "build").exists()
        remove(folder / "build")
        return found


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Snapshot]:
    """The newest version under the writer lock, for a change that is made in one go.

    Raises:
        RuntimeError: If another writer is at work.
        ValueError: If an addition or build has not finished.
    """
    with WriterLock(folder):
        info = read_info(folder)
        journal = folder / "build" / "journal.json"
        if journal.is_file() and json.loads(journal.read_text("utf-8")).get("token") != info["committed"]:
            raise ValueError(
                f"a build or an addition in {folder} has not finished: repeat it to finish it, or throw it away with "
                "discard_unfinished()"
            )
        yield Snapshot(folder, info)


def commit_delete(base: Snapshot, rows: list[int]) -> Snapshot:
    """The next version, without some rows."""
    info = next_version(base)
    info["edited"] = True
    info["dead"] = write_dead(base.folder, rows_union([base.dead, np.array(rows, np.int64)]), info["version"])
    return publish(base.folder, info)


def commit_compact(base: Snapshot, budget: MemoryBudget) -> Snapshot:
    """The next version, with the live rows alone, in full segments, and its faiss (and BM25) part made anew.

    Raises:
        ValueError: If no row is alive.
    """
    live = np.setdiff1d(np.arange(base.stored_rows, dtype=np.int64), base.dead, assume_unique=True)
    if not len(live):
        raise ValueError("every row is deleted: there is nothing to compact")
    info = next_version(base)
    info["segments"], info["dead"], info["edited"] = [], None, True
    step = info["segment_rows"]
    taken = [record["folder"] for record in base.info["segments"]]
    for start in range(0, len(live), step):
        rows = live[start : start + step]

        def batches(rows: np.ndarray = rows) -> Iterator[Any]:
            return base.batches_of(rows, COPY_ROWS)

        vectors = (base.vectors_at(rows[i : i + COPY_ROWS]) for i in range(0, len(rows), COPY_ROWS))
        name = next_segment(base.folder, taken)
        taken.append(name)
        info["segments"].append(
            write_segment(base.folder, name, info["dtype"], base.dimension, len(rows), vectors, batches)
        )
    before, info["index"] = base.info["index"], {"files": []}
    compacted = Snapshot(base.folder, info)
    info["index"] = write_faiss(
        compacted, info["version"], before["requested"], before["memory_mb"], before["faiss_file"], budget
    )
    if info["index"]["kind"] == before["kind"]:
        info["index"]["parameters"] = before["parameters"]
    if info["bm25"] is not None:
        info["bm25"] = write_bm25(compacted, bm25_folder(base.folder, info["version"]))
    return publish(base.folder, info)


def commit_reindex(
    base: Snapshot, kind: str, memory_mb: int | None, faiss_file: bool | None, budget: MemoryBudget
) -> Snapshot:
    """The next version, with another kind of index over the same rows."""
    info = next_version(base)
    info["index"] = write_faiss(base, info["version"], kind, memory_mb, faiss_file, budget)
    return publish(base.folder, info)


def commit_bm25(base: Snapshot) -> Snapshot:
    """The next version, with a BM25 part over all rows."""
    info = next_version(base)
    info["bm25"] = write_bm25(base, bm25_folder(base.folder, info["version"]))
    return publish(base.folder, info)


def commit_parameters(base: Snapshot, parameters: dict[str, int], tuned: dict[str, Any]) -> Snapshot:
    """The next version, with other search parameters."""
    info = next_version(base)
    info["index"]["parameters"], info["index"]["tuned"] = parameters, tuned
    return publish(base.folder, info)
