"""A snapshot: one committed version of an index, open for reading.

`index_info.json` is the only file that ever changes its content, by an atomic replacement; every other file is written
once under a name of its own. So a reader that has opened a version keeps seeing it whole while a writer commits others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .segments import Entry, EntryFile, Segment
from .storage import check_size, map_npy

INFO_FILE = "index_info.json"
FORMAT = "ubmoe-embedding-index"
FORMAT_VERSION = 1
BLOCK_BYTES = 64 << 20
"""Vectors handled at a time, in bytes of float32."""
READ_BYTES = 4 << 20
"""Vectors read at a time when an index is made, in bytes of float32."""


def read_info(folder: Path) -> dict[str, Any]:
    """The manifest of an index.

    Raises:
        FileNotFoundError: If there is no index, or one whose build has not finished.
        ValueError: If the file is damaged or of a newer layout.
    """
    path = folder / INFO_FILE
    if not path.is_file():
        if (folder / "build" / "journal.json").is_file():
            raise FileNotFoundError(f"the build of {folder} has not finished: run the same build again to resume it")
        raise FileNotFoundError(f"{folder} is no index: it has no {INFO_FILE}")
    try:
        info = json.loads(path.read_text("utf-8"))
        kind, version = info["format"], info["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it from a copy or build the index again") from error
    if kind != FORMAT:
        raise ValueError(f"{path} is of format {kind!r}, expected {FORMAT!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has layout version {version}, this package reads up to {FORMAT_VERSION}: upgrade ubmoe-st"
        )
    index = info["index"]
    if "files" not in index:  # as the first builds wrote it: one file, always
        only = {name: index.pop(name) for name in ("file", "sha256")}
        index |= {
            "files": [{**only, "first_row": 0, "rows": index["rows"], "bytes": index["bytes"]}],
            "faiss_file": None,
        }
    return info


class Snapshot:
    """One committed version, memory-mapped.

    Args:
        folder: The index folder.
        info: Its manifest; None reads it.

    Raises:
        ValueError: If a file is missing, truncated or wrong, naming it.
    """

    def __init__(self, folder: Path, info: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.info = info if info is not None else read_info(folder)
        self.version: int = self.info["version"]
        self.dimension: int = self.info["dimension"]
        self.segments = [Segment(folder, record) for record in self.info["segments"]]
        for segment in self.segments:
            if segment.vectors.shape[1] != self.dimension:
                raise ValueError(
                    f"{folder / segment.record['folder'] / 'vectors.npy'} has {segment.vectors.shape[1]} dimensions, "
                    f"the manifest says {self.dimension}"
                )
        self.starts = np.cumsum([0] + [segment.rows for segment in self.segments])  # (S + 1,)
        self.stored_rows = int(self.starts[-1])
        self.dead = np.zeros(0, np.int64)
        if self.info["dead"] is not None:
            check_size(folder / self.info["dead"]["file"], self.info["dead"])
            self.dead = np.array(map_npy(folder / self.info["dead"]["file"]))
        for file in self.info["index"]["files"]:
            check_size(folder / file["file"], file)
        self._alive: np.ndarray | None = None

    def __len__(self) -> int:
        return self.stored_rows - len(self.dead)

    @property
    def alive(self) -> np.ndarray | None:
        """Which rows are searched, bool (N,); None when all are."""
        if self._alive is None and len(self.dead):
            alive = np.ones(self.stored_rows, bool)
            alive[self.dead] = False
            self._alive = alive
        return self._alive

    def is_alive(self, row: int) -> bool:
        """Whether a row is neither deleted nor replaced."""
        position = int(np.searchsorted(self.dead, row))
        return not (position < len(self.dead) and self.dead[position] == row)

    def blocks(self, first_row: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Memory-mapped pieces of the vectors from `first_row` on: (row of the first, (n, D))."""
        step = max(1, BLOCK_BYTES // (4 * self.dimension))
        for start, segment in zip(self.starts.tolist(), self.segments):
            for local in range(max(0, first_row - start), segment.rows, step):
                yield start + local, segment.vectors[local : local + step]

    def read_blocks(self, first_row: int, last_row: int) -> Iterator[np.ndarray]:
        """Vectors of the rows from one number to another, (n, D) at a time; read, because pages of a map add up."""
        step = max(1, READ_BYTES // (4 * self.dimension))
        for start, segment in zip(self.starts.tolist(), self.segments):
            begin, end = max(first_row - start, 0), min(last_row - start, segment.rows)
            if begin >= end:
                continue
            with self._vectors_file(segment) as file:
                file.seek(begin * segment.vectors.strides[0], 1)
                for local in range(begin, end, step):
                    yield self._read(file, segment, min(step, end - local))

    def sample(self, count: int, seed: int = 0) -> np.ndarray:
        """Vectors of random stored rows as float32, (count, D); read, because pages of a map add up."""
        wanted = np.sort(np.random.default_rng(seed).choice(self.stored_rows, count, replace=False))
        found = np.empty((count, self.dimension), np.float32)
        for segment, start, positions in self._by_segment(wanted):
            with self._vectors_file(segment) as file:
                begin = file.tell()
                for position in positions.tolist():
                    file.seek(begin + (int(wanted[position]) - start) * segment.vectors.strides[0])
                    found[position] = self._read(file, segment, 1)
        return found

    def _vectors_file(self, segment: Segment) -> BinaryIO:
        """The vectors of a segment as an open file, at its first row."""
        file = (self.folder / segment.record["folder"] / "vectors.npy").open("rb")
        file.seek(-segment.vectors.nbytes, 2)
        return file

    def _read(self, file: BinaryIO, segment: Segment, rows: int) -> np.ndarray:
        return np.fromfile(file, segment.vectors.dtype, rows * self.dimension).reshape(rows, self.dimension)

    def _by_segment(self, rows: Sequence[int] | np.ndarray) -> Iterator[tuple[Segment, int, np.ndarray]]:
        """(segment, its first row, positions within `rows`)."""
        wanted = np.asarray(rows, np.int64)
        owners = np.searchsorted(self.starts, wanted, side="right") - 1
        for owner in np.unique(owners).tolist():
            yield self.segments[owner], int(self.starts[owner]), np.flatnonzero(owners == owner)

    def vectors_at(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Stored vectors of some rows as float32, (n, D)."""
        wanted = np.asarray(rows, np.int64)
        found = np.empty((len(wanted), self.dimension), np.float32)
        for segment, start, positions in self._by_segment(wanted):
            found[positions] = segment.vectors[wanted[positions] - start]
        return found

    def ids_at(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Ids of some rows."""
        wanted = np.asarray(rows, np.int64)
        found: list[str] = [""] * len(wanted)
        for segment, start, positions in self._by_segment(wanted):
            names = segment.entries.ids((wanted[positions] - start).tolist())
            for position, name in zip(positions.tolist(), names):
                found[position] = name
        return found

    def entry_at(self, row: int) -> Entry:
        """One row."""
        owner = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.segments[owner].entries.entry(row - int(self.starts[owner]))

    def rows_of(self, identity: str) -> list[int]:
        """Live rows of a document or chunk id, in order; empty when there is none."""
        rows: list[int] = []
        for start, segment in zip(self.starts.tolist(), self.segments):
            rows.extend(start + row for row in segment.rows_of(identity))
        return [row for row in rows if self.is_alive(row)]

    def documents(self) -> Iterator[tuple[str, int]]:
        """Every live document id with the row it begins at; each segment is mapped anew and let go again."""
        files = (EntryFile(self.folder / segment.record["folder"] / "entries.arrow") for segment in self.segments)
        for row, name, parent, chunk in names_in(files):
            if chunk == 0 and self.is_alive(row):
                yield (name if parent is None else parent), row

    def ids(self) -> Iterator[str]:
        """The ids of all live rows, in order."""
        for row, name, _, _ in names_in(segment.entries for segment in self.segments):
            if self.is_alive(row):
                yield name

    def batches_of(self, rows: np.ndarray, size: int) -> Iterator[Any]:
        """Arrow batches of some sorted rows, at most `size` rows each."""
        for segment, start, positions in self._by_segment(rows):
            first = 0
            wanted = np.asarray(rows, np.int64)[positions] - start
            for batch in segment.entries.batches():
                local = wanted[(wanted >= first) & (wanted < first + batch.num_rows)] - first
                for begin in range(0, len(local), size):
                    yield batch.take(local[begin : begin + size])
                first += batch.num_rows

    def end_of_document(self, row: int) -> int:
        """The row after the last chunk of the document that begins at `row`."""
        parent, _ = self._parent_and_chunk(row)
        end = row + 1
        while parent is not None and end < self.stored_rows:
            other, chunk = self._parent_and_chunk(end)
            if other != parent or chunk == 0:
                break
            end += 1
        return end

    def _parent_and_chunk(self, row: int) -> list[Any]:
        owner = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.segments[owner].entries.values(row - int(self.starts[owner]), ("parent", "chunk"))

    def files(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every file on record: relative name and {"bytes", "sha256"}."""
        for record in self.info["segments"]:
            for name, file in record["files"].items():
                yield f"{record['folder']}/{name}", file
        for part in (self.info["dead"], *self.info["index"]["files"], self.info["model"]["probes"]):
            if part is not None:
                yield part["file"], part
        if self.info["bm25"] is not None:
            for name, file in self.info["bm25"]["files"].items():
                yield f"{self.info['bm25']['folder']}/{name}", file


def names_in(files: Iterable[EntryFile]) -> Iterator[tuple[int, str, str | None, int]]:
    """(row, id, parent, chunk number) of every row, numbered from 0."""
    row = 0
    for file in files:
        for batch in file.batches():
            for name, parent, chunk in zip(*(batch.column(key).to_pylist() for key in ("id", "parent", "chunk"))):
                yield row, name, parent, chunk
                row += 1


def referenced(info: dict[str, Any]) -> set[str]:
    """First-level names (and segment folders) a manifest needs; everything else may go."""
    names = {record["folder"] for record in info["segments"]}
    parts = (info["dead"], *info["index"]["files"], info["model"]["probes"])
    names |= {part["file"] for part in parts if part is not None}
    names |= {source["bad_rows_file"] for source in info["sources"] if source.get("bad_rows_file")}
    if info["bm25"] is not None:
        names.add(info["bm25"]["folder"])
    return names


def rows_union(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Sorted distinct rows of several arrays, int64."""
    arrays = [np.asarray(part, np.int64) for part in parts]
    return np.unique(np.concatenate(arrays)) if arrays else np.zeros(0, np.int64)
