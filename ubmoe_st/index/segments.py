"""Segments: the immutable folders that hold the rows of an index, and what reads them.

A segment is three files: `vectors.npy` (rows, D), `entries.arrow` (an Arrow IPC file: ids, texts, spans, metadata) and
`keys.npy` (64-bit id hashes in order, with their rows). All are memory-mapped: opening costs the same for a thousand
rows as for a hundred million.
"""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .corpus import key_of
from .storage import check_size, map_file, map_npy, replacing

ENTRY_FIELDS = ("id", "parent", "chunk", "start", "end", "title", "text", "metadata")
KEPT_BATCHES = 256
"""Record batches of a segment whose places are remembered; their content stays in the map."""


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

    columns = {name: [getattr(entry, name) for entry in entries] for name in ENTRY_FIELDS}
    return pa.RecordBatch.from_pydict(columns, schema=entry_schema())


class EntryFile:
    """Reads rows of a memory-mapped `entries.arrow`."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        try:
            self._reader = pa.ipc.open_file(map_file(path))
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}): it is missing or truncated") from error
        self._batch = lru_cache(KEPT_BATCHES)(self._reader.get_batch)
        self._ends: list[int] | None = None

    def _batch_ends(self) -> list[int]:
        if self._ends is None:
            numbers = range(self._reader.num_record_batches)
            self._ends = list(itertools.accumulate(self._reader.get_batch(number).num_rows for number in numbers))
        return self._ends

    def _place(self, row: int) -> tuple[Any, int]:
        """The record batch that holds a row, and the row's position in it."""
        ends = self._batch_ends()
        number = bisect.bisect_right(ends, row)
        return self._batch(number), row - (ends[number - 1] if number else 0)

    def batches(self) -> Iterator[Any]:
        """All record batches in order."""
        for number in range(self._reader.num_record_batches):
            yield self._reader.get_batch(number)

    def values(self, row: int, names: Sequence[str]) -> list[Any]:
        """Some fields of one row."""
        batch, local = self._place(row)
        return [batch.column(name)[local].as_py() for name in names]

    def entry(self, row: int) -> Entry:
        """One row."""
        return Entry(**dict(zip(ENTRY_FIELDS, self.values(row, ENTRY_FIELDS))))

    def ids(self, rows: Sequence[int]) -> list[str]:
        """The ids of some rows, in their order."""
        places = [self._place(row) for row in rows]
        return [batch.column("id")[local].as_py() for batch, local in places]


def keys_of_batches(batches: Iterator[Any]) -> np.ndarray:
    """The `keys.npy` of a segment, (2, N): id hashes in order, and their rows.

    The document id of a chunk is a key too, beside the chunk's own.
    """
    hashes, rows = array("Q"), array("Q")
    row = 0
    for batch in batches:
        ids, parents = batch.column("id").to_pylist(), batch.column("parent").to_pylist()
        for identity, parent in zip(ids, parents):
            for name in (identity,) if parent is None else (identity, parent):
                hashes.append(short_key(name))
                rows.append(row)
            row += 1
    keys = np.stack([np.array(hashes, np.uint64), np.array(rows, np.uint64)])
    return keys[:, np.argsort(keys[0], kind="stable")]  # (2, N)


def short_key(identity: str) -> int:
    """The first 64 bits of an id's key."""
    return int.from_bytes(key_of(identity)[:8], "little")


class Segment:
    """One open segment: memory maps of its vectors and keys, and a reader of its entries.

    Args:
        root: The index folder.
        record: The segment's part of the manifest.

    Raises:
        ValueError: If a file is missing, truncated or not as recorded.
    """

    def __init__(self, root: Path, record: dict[str, Any]) -> None:
        self.record = record
        self.rows: int = record["rows"]
        folder = root / record["folder"]
        for name, file in record["files"].items():
            check_size(folder / name, file)
        self.vectors = map_npy(folder / "vectors.npy")  # (rows, D)
        if self.vectors.ndim != 2 or len(self.vectors) != self.rows:
            raise ValueError(
                f"{folder / 'vectors.npy'} has shape {self.vectors.shape}, the manifest says {self.rows} rows"
            )
        self.keys = map_npy(folder / "keys.npy")
        self.entries = EntryFile(folder / "entries.arrow")

    def rows_of(self, identity: str) -> list[int]:
        """Rows whose id, or whose document's id, is `identity`."""
        wanted = np.uint64(short_key(identity))
        hashes = self.keys[0]
        first = int(np.searchsorted(hashes, wanted, side="left"))
        last = int(np.searchsorted(hashes, wanted, side="right"))
        rows = []
        for row in self.keys[1, first:last].tolist():
            entry = self.entries.entry(row)
            if identity in (entry.id, entry.parent):
                rows.append(row)
        return sorted(set(rows))
