"""The store: segments, the immutable folders that hold the rows of an index, and a snapshot of one committed version.

A segment is three files: `vectors.npy` (rows, D), `entries.arrow` (an Arrow IPC file: ids, texts, spans, metadata) and
`keys.npy` (64-bit id hashes in order, with their rows). All are memory-mapped: opening costs the same for a thousand
rows as for a hundred million. Every file is written once, under a name of its own, so a reader that has opened a
version keeps seeing it whole while a writer commits others.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from ..files import replacing, replacing_by_name
from .corpus import key_of
from .manifest import FileRecord, FolderRecord, Manifest
from .storage import check_size, map_file, map_npy, npy_header, write_npy
from .workplace import Workplace

Namespace = Literal["document", "chunk"]
"""Ids are those of documents, or of the chunks that were cut from them."""
ENTRY_FIELDS = ("id", "parent", "chunk", "start", "end", "title", "text", "metadata")
KEPT_BATCHES = 256
"""Record batches of a segment whose places are remembered; their content stays in the map."""
BLOCK_BYTES = 64 << 20
"""Vectors handled at a time, in bytes of float32."""
READ_BYTES = 4 << 20
"""Vectors read at a time when an index is made, in bytes of float32."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of an index: a document or a chunk of one."""

    id: str
    text: str
    title: str | None = None
    parent: str | None = None
    """Id of the document a chunk was cut from; None for a whole document."""
    chunk: int = 0
    """Number of the chunk in its document."""
    start: int = 0
    """First character of `text` in the document."""
    end: int = 0
    """Character after the last one."""
    metadata: str | None = None
    """Other fields of the row, as JSON."""

    @property
    def document_id(self) -> str:
        """The id the document has in the corpus."""
        return self.id if self.parent is None else self.parent

    def model_input(self, with_title: bool) -> str:
        """What the model reads: the title on a line of its own, then the text."""
        return f"{self.title}\n{self.text}" if with_title and self.title else self.text


def entry_schema() -> Any:
    """The Arrow schema of `entries.arrow`."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("parent", pa.string()),
            pa.field("chunk", pa.int32(), nullable=False),
            pa.field("start", pa.int64(), nullable=False),
            pa.field("end", pa.int64(), nullable=False),
            pa.field("title", pa.string()),
            pa.field("text", pa.string(), nullable=False),
            pa.field("metadata", pa.string()),
        ]
    )


def write_entries(path: Path, batches: Iterator[Any]) -> dict[str, Any]:
    """Write Arrow record batches of `entry_schema()` as an IPC file and return its size and SHA-256."""
    import pyarrow as pa

    with replacing(path) as file:
        with pa.ipc.new_file(pa.PythonFile(file, mode="w"), entry_schema()) as writer:
            for batch in batches:
                writer.write_batch(batch)
        return file.record()


def entry_batch(entries: Sequence[Entry]) -> Any:
    """Entries as one Arrow record batch."""
    import pyarrow as pa

    columns = {name: list(map(attrgetter(name), entries)) for name in ENTRY_FIELDS}
    return pa.RecordBatch.from_pydict(columns, schema=entry_schema())


class EntryFile:
    """Reads rows of a memory-mapped `entries.arrow`."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        try:
            self._reader = pa.ipc.open_file(map_file(path))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}): it is missing or truncated") from error
        if not self._reader.schema.equals(entry_schema()):
            raise ValueError(f"{path} has other columns than an index has: it was changed")
        self._path = path
        self._batch = lru_cache(KEPT_BATCHES)(self._read)
        self._ends: list[int] | None = None

    def _read(self, number: int) -> Any:
        import pyarrow as pa

        try:
            batch = self._reader.get_batch(number)
            batch.validate()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self._path} cannot be read ({error}): it was changed") from error
        return batch

    def _checked(self, rows: Any) -> Any:
        """Rows of a batch whose offsets and texts have been looked at: Arrow itself follows them out of the file."""
        import pyarrow as pa

        try:
            rows.validate(full=True)
        except pa.ArrowException as error:
            raise ValueError(f"{self._path} cannot be read ({error}): it was changed") from error
        return rows

    def _batch_ends(self) -> list[int]:
        if self._ends is None:
            numbers = range(self._reader.num_record_batches)
            self._ends = list(itertools.accumulate(self._read(number).num_rows for number in numbers))
        return self._ends

    def _place(self, row: int) -> tuple[Any, int]:
        """The record batch that holds a row, and the row's position in it."""
        ends = self._batch_ends()
        number = bisect.bisect_right(ends, row)
        if number >= len(ends):
            raise ValueError(f"{self._path} has no row {row:,}, which its index names: it was changed")
        return self._batch(number), row - (ends[number - 1] if number else 0)

    def batches(self) -> Iterator[Any]:
        """All record batches in order."""
        for number in range(self._reader.num_record_batches):
            yield self._checked(self._read(number))

    def values(self, row: int, names: Sequence[str]) -> list[Any]:
        """Some fields of one row."""
        batch, local = self._place(row)
        one = self._checked(batch.slice(local, 1))
        return [one.column(name)[0].as_py() for name in names]

    def entry(self, row: int) -> Entry:
        """One row."""
        return Entry(**dict(zip(ENTRY_FIELDS, self.values(row, ENTRY_FIELDS))))

    def ids(self, rows: Sequence[int]) -> list[str]:
        """The ids of some rows, in their order."""
        return [self.values(row, ("id",))[0] for row in rows]


def keys_of_batches(batches: Iterator[Any]) -> np.ndarray:
    """The `keys.npy` of a segment, (2, N): id hashes in order, and their rows.

    The document id of a chunk is a key too, beside the chunk's own.
    """
    hashes, rows = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
    first = 0
    for batch in batches:
        names, numbers = batch.column("id").to_pylist(), np.arange(first, first + batch.num_rows, dtype=np.uint64)
        first += batch.num_rows
        parents = batch.column("parent")
        if parents.null_count < len(parents):
            of_chunks = np.asarray(parents.is_valid())
            names += parents.drop_null().to_pylist()
            numbers = np.concatenate([numbers, numbers[of_chunks]])
        hashes.append(np.frombuffer(b"".join(map(key_of, names)), "<u8")[::2].astype(np.uint64))
        rows.append(numbers)
    keys = np.stack([np.concatenate(hashes), np.concatenate(rows)])
    # Rows of one hash in their order, wherever a batch had its chunks' documents.
    return keys[:, np.lexsort((keys[1], keys[0]))]  # (2, N)


def short_key(identity: str) -> int:
    """The first 64 bits of an id's key."""
    return int.from_bytes(key_of(identity)[:8], "little")


def write_segment(
    root: Path,
    name: str,
    dtype: str,
    dimension: int,
    rows: int,
    vectors: Iterable[np.ndarray],
    batches: Callable[[], Iterator[Any]],
) -> FolderRecord:
    """Write one segment folder, atomically, and return its part of the manifest.

    Args:
        root: The index folder.
        name: From `Workplace.next_segment`.
        dtype: float32 or float16.
        dimension: D.
        rows: How many rows follow.
        vectors: Blocks that add up to (rows, D).
        batches: Gives the Arrow batches of the same rows; called twice.
    """
    files = {}
    written = 0
    (root / name).parent.mkdir(exist_ok=True)
    with replacing_by_name(root / name) as folder:
        folder.mkdir()
        with replacing(folder / "vectors.npy") as file:
            file.write(npy_header(rows, dimension, np.dtype(dtype)))
            for block in vectors:
                file.write(np.ascontiguousarray(block, dtype=dtype))
                written += len(block)
            if written != rows:
                raise ValueError(f"segment {name} got {written} vectors for {rows} rows")
            files["vectors.npy"] = file.record()
        files["entries.arrow"] = write_entries(folder / "entries.arrow", batches())
        files["keys.npy"] = write_npy(folder / "keys.npy", keys_of_batches(batches()))
    return FolderRecord(name, rows, files)


class Segment:
    """One open segment: memory maps of its vectors and keys, and a reader of its entries.

    Args:
        root: The index folder.
        record: The segment's part of the manifest.

    Raises:
        ValueError: If a file is missing, truncated or not as recorded.
    """

    def __init__(self, root: Path, record: FolderRecord) -> None:
        self.rows = record.rows
        self.folder = folder = root / record.folder
        for name, file in record.files.items():
            check_size(folder / name, file)
        self.vectors = map_npy(folder / "vectors.npy")  # (rows, D)
        if self.vectors.ndim != 2 or len(self.vectors) != self.rows:
            raise ValueError(
                f"{folder / 'vectors.npy'} has shape {self.vectors.shape}, the manifest says {self.rows} rows"
            )
        if self.vectors.dtype not in (np.float32, np.float16):
            raise ValueError(f"{folder / 'vectors.npy'} holds {self.vectors.dtype}, expected float32 or float16")
        self.keys = map_npy(folder / "keys.npy")  # (2, keys)
        if self.keys.ndim != 2 or len(self.keys) != 2 or self.keys.dtype != np.uint64:
            raise ValueError(f"{folder / 'keys.npy'} holds {self.keys.dtype} {self.keys.shape}, expected uint64 (2, N)")
        self.entries = EntryFile(folder / "entries.arrow")

    def rows_of(self, identity: str) -> tuple[list[int], list[int]]:
        """Rows of the document with this id, and of the chunk with this id."""
        wanted = np.uint64(short_key(identity))
        hashes = self.keys[0]
        first = int(np.searchsorted(hashes, wanted, side="left"))
        last = int(np.searchsorted(hashes, wanted, side="right"))
        documents, chunks = [], []
        for row in sorted(set(self.keys[1, first:last].tolist())):
            name, parent = self.entries.values(row, ("id", "parent"))
            if identity == (name if parent is None else parent):
                documents.append(row)
            elif identity == name:
                chunks.append(row)
        return documents, chunks


class Snapshot:
    """One committed version, memory-mapped.

    Args:
        folder: The index folder.
        manifest: Its manifest; None reads it.

    Raises:
        ValueError: If a file is missing, truncated or wrong, naming it.
    """

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        self.folder = folder
        self.manifest = manifest if manifest is not None else Manifest.read(folder)
        self.dimension = self.manifest.dimension
        self.segments = [Segment(folder, record) for record in self.manifest.segments]
        for segment in self.segments:
            if segment.vectors.shape[1] != self.dimension:
                raise ValueError(
                    f"{segment.folder / 'vectors.npy'} has {segment.vectors.shape[1]} dimensions, the manifest says "
                    f"{self.dimension}"
                )
        self.starts = np.cumsum([0] + [segment.rows for segment in self.segments])  # (S + 1,)
        self.stored_rows = int(self.starts[-1])
        self.dead = np.zeros(0, np.int64)
        if self.manifest.dead is not None:
            check_size(folder / self.manifest.dead.file, self.manifest.dead.record())
            self.dead = np.array(map_npy(folder / self.manifest.dead.file))
            inside = self.dead.ndim == 1 and self.dead.dtype.kind in "iu"
            if not inside or not ((self.dead >= 0) & (self.dead < self.stored_rows)).all():
                raise ValueError(f"{folder / self.manifest.dead.file} names rows that are not there: it was changed")
        for file in self.manifest.index.files:
            check_size(folder / file.file, file.record())
        # Held from now on, since they are first needed when a writer may have removed them.
        probes = self.manifest.model.probes
        check_size(folder / probes.file, probes.record())
        self.probes = np.array(map_npy(folder / probes.file))  # (2, P, D)
        if self.probes.ndim != 3 or self.probes.shape[::2] != (2, self.dimension) or self.probes.dtype.kind != "f":
            raise ValueError(f"{folder / probes.file} holds no probe vectors of {self.dimension} dimensions")
        self.bm25_files: dict[str, Any] = {}
        self._bm25_inodes: dict[Path, int] = {}
        if (bm25 := self.manifest.bm25) is not None:
            for name, record in bm25.files.items():
                check_size(folder / bm25.folder / name, record)
                self.bm25_files[name] = map_file(place := folder / bm25.folder / name)
                self._bm25_inodes[place] = place.stat().st_ino
        self._alive: np.ndarray | None = None

    @cached_property
    def info(self) -> dict[str, Any]:
        """The content of `index_info.json` for this version."""
        return self.manifest.as_dict()

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

    def has_its_bm25_files(self) -> bool:
        """Whether the files of the BM25 part are still those of `bm25_files`, by name: a mapped inode stays taken."""
        try:
            return all(file.stat().st_ino == inode for file, inode in self._bm25_inodes.items())
        except FileNotFoundError:
            return False

    def is_alive(self, row: int) -> bool:
        """Whether a row is neither deleted nor replaced."""
        position = int(np.searchsorted(self.dead, row))
        return not (position < len(self.dead) and self.dead[position] == row)

    def blocks(self, first_row: int = 0, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, np.ndarray]]:
        """Memory-mapped pieces of the vectors from `first_row` on: (row of the first, (n, D))."""
        step = max(1, block_bytes // (4 * self.dimension))
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
        file = (segment.folder / "vectors.npy").open("rb")
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

    def rows_of(self, identity: str, namespace: Namespace | None = None) -> list[int]:
        """Live rows of a document or chunk id, in order; empty when there is none.

        Raises:
            ValueError: If `namespace` is None and the id is that of a document and of a chunk of another one.
        """
        if namespace not in (None, "document", "chunk"):
            raise ValueError(f"namespace is document, chunk or None, got {namespace!r}")
        found: dict[str, list[int]] = {"document": [], "chunk": []}
        for start, segment in zip(self.starts.tolist(), self.segments):
            for rows, local in zip(found.values(), segment.rows_of(identity)):
                rows.extend(start + row for row in local if self.is_alive(start + row))
        if namespace is not None:
            return found[namespace]
        if all(found.values()):
            raise ValueError(
                f"{identity!r} is a document and also a chunk of another one: say which is meant with "
                "namespace='document' or namespace='chunk'"
            )
        return found["document"] or found["chunk"]

    def rows_named(self, ids: Iterable[str], namespace: Namespace | None = None) -> list[int]:
        """Live rows of some ids, as `rows_of`, in the order of the ids.

        Raises:
            KeyError: If there is none of an id.
            ValueError: As `rows_of`.
        """
        rows: list[int] = []
        for identity in ids:
            found = self.rows_of(identity, namespace)
            if not found:
                raise KeyError(f"no entry has the id {identity!r}")
            rows.extend(found)
        return rows

    def documents(self) -> Iterator[tuple[str, int]]:
        """The id of every document of which something is live, with the row it begins at, live or not.

        Each segment is mapped anew and let go again.
        """
        files = (EntryFile(segment.folder / "entries.arrow") for segment in self.segments)
        document, begin, told = None, 0, False
        for row, name, parent, chunk in names_in(files):
            own = name if parent is None else parent
            if chunk == 0 or own != document:  # the first chunk may have been deleted, and compacted away
                document, begin, told = own, row, False
            if not told and self.is_alive(row):
                yield own, begin
                told = True

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


def names_in(files: Iterable[EntryFile]) -> Iterator[tuple[int, str, str | None, int]]:
    """(row, id, parent, chunk number) of every row, numbered from 0."""
    row = 0
    for file in files:
        for batch in file.batches():
            for name, parent, chunk in zip(*(batch.column(key).to_pylist() for key in ("id", "parent", "chunk"))):
                yield row, name, parent, chunk
                row += 1


def rows_union(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Sorted distinct rows of several arrays, int64."""
    arrays = [np.asarray(part, np.int64) for part in parts]
    return np.unique(np.concatenate(arrays)) if arrays else np.zeros(0, np.int64)


def write_dead(workplace: Workplace, rows: np.ndarray, version: int) -> FileRecord | None:
    """The file of rows that are no longer found, (n,) sorted; None for no rows."""
    if not len(rows):
        return None
    name = workplace.next_name("dead", version)
    return FileRecord(name, rows=len(rows), **write_npy(workplace.folder / name, rows.astype(np.int64)))


def open_snapshot(folder: Path) -> Snapshot:
    """The newest version; tries again when a writer removed the files of the one just read about."""
    for _ in range(5):
        manifest = Manifest.read(folder)
        try:
            return Snapshot(folder, manifest)
        except (ValueError, OSError):
            if Manifest.read(folder).is_version(manifest):
                raise
    return Snapshot(folder)


def publish(workplace: Workplace, manifest: Manifest) -> Snapshot:
    """Make `manifest` the current version, after seeing that all its files are there."""
    snapshot = Snapshot(workplace.folder, manifest)
    workplace.publish(manifest)
    return snapshot
