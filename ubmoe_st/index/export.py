"""Parquet out of an index, in the columns that Qdrant, Milvus and LanceDB import."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..files import replacing_by_name
from .store import Snapshot

EXPORT_ROWS = 4096
"""Rows written at a time."""


def export_parquet(snapshot: Snapshot, path: Path) -> int:
    """Write every live entry as one Parquet file; the number of rows.

    Columns: id, document_id, chunk, start, end, title, text, metadata (JSON), vector (a fixed-size list of float32).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    vector_type = pa.list_(pa.float32(), snapshot.dimension)
    strings, whole = pa.string(), pa.int64()
    names = ["id", "document_id", "chunk", "start", "end", "title", "text", "metadata", "vector"]
    types = [strings, strings, pa.int32(), whole, whole, strings, strings, strings, vector_type]
    schema = pa.schema(list(zip(names, types)))
    rows = 0
    with replacing_by_name(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for batch, vectors in _live(snapshot):
            flat = pa.array(np.ascontiguousarray(vectors, np.float32).ravel())
            parents = [
                name if parent is None else parent
                for name, parent in zip(batch.column("id").to_pylist(), batch.column("parent").to_pylist())
            ]
            columns = [batch.column("id"), pa.array(parents, strings)]
            columns += [batch.column(name) for name in names[2:-1]]
            columns.append(pa.FixedSizeListArray.from_arrays(flat, snapshot.dimension))
            writer.write_table(pa.table(columns, schema=schema))
            rows += batch.num_rows
    return rows


def _live(snapshot: Snapshot) -> Iterator[tuple[Any, np.ndarray]]:
    """Arrow batches of live rows with their vectors."""
    for start, segment in zip(snapshot.starts.tolist(), snapshot.segments):
        rows = np.arange(start, start + segment.rows, dtype=np.int64)
        rows = np.setdiff1d(rows, snapshot.dead, assume_unique=True)
        done = 0
        for batch in snapshot.batches_of(rows, EXPORT_ROWS):
            yield batch, snapshot.vectors_at(rows[done : done + batch.num_rows])
            done += batch.num_rows
