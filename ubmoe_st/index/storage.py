"""Arrays on disk, logs that grow, and files on record: what an index writes beside whole files."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sqlite3
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..files import NOTHING_LOST, disk_full_explained, replacing, sha256_of
from ..forking import ForkSafeLock

# numpy reads a header as a Python literal, and CPython 3.11's parser counts its depth across threads: two at once may
# end in "AST constructor recursion depth mismatch".
_HEADER_LOCK = ForkSafeLock()
_OF_LITERALS = (SyntaxError, tokenize.TokenError, MemoryError, RecursionError, OverflowError)
"""What Python's parser raises beside ValueError."""


@contextlib.contextmanager
def full_table_told() -> Iterator[None]:
    """Says of a table on disk that cannot be written what to do, as `disk_full_explained` does of files."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(f"the table of known ids cannot be written ({error}); {NOTHING_LOST}") from error


def require_libraries() -> None:
    """Refuse to go on without the libraries of an index.

    Raises:
        ImportError: Naming what is missing and how to install it.
    """
    missing = [name for name in ("faiss", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"an index needs {' and '.join(missing)}: pip install 'ubmoe-st[index]'")


def npy_header(rows: int, dimension: int, dtype: np.dtype) -> bytes:
    """The header of a C-order .npy file of shape (rows, dimension)."""
    buffer = io.BytesIO()
    shape = (rows, dimension)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def write_npy(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Write one array as .npy, atomically, and return its size and SHA-256."""
    with replacing(path) as file:
        np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
        return file.record()


def map_file(path: Path) -> Any:
    """A file mapped into memory, as an Arrow buffer. It holds no file descriptor: an index may have thousands of files.

    Raises:
        OSError: If the file is missing or empty.
    """
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def map_npy(path: Path) -> np.ndarray:
    """Map a C-order .npy file into memory, read-only.

    Raises:
        ValueError: If the file is missing, truncated or no .npy file, naming it.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            with _HEADER_LOCK:
                shape, fortran_order, dtype = header(file)
            offset = file.tell()
        if fortran_order or dtype.hasobject:
            raise ValueError("it is not in C order, or holds objects")
        return np.ndarray(shape, dtype, buffer=map_file(path), offset=offset)
    except (ValueError, TypeError, OSError, EOFError, *_OF_LITERALS) as error:
        raise ValueError(f"{path} cannot be mapped ({error}): it is missing, truncated or not a .npy file") from error


def check_size(path: Path, record: dict[str, Any]) -> None:
    """Refuse a file that is absent or has not the recorded size.

    Raises:
        ValueError: Naming the file, the size expected and the size found.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: restore it from a copy or build the index again")
    size = path.stat().st_size
    if size != record["bytes"]:
        raise ValueError(
            f"{path} has {size:,} bytes where {record['bytes']:,} were written: the file is truncated or was changed; "
            "restore it from a copy or build the index again"
        )


def problems_of(root: Path, records: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
    """What is wrong with files on record: one sentence for each that is absent, cut short or changed.

    Args:
        root: The folder the names are relative to.
        records: Pairs of a relative name and its {"bytes", "sha256"}.
    """
    problems = []
    for name, record in records:
        try:
            check_size(root / name, record)
        except ValueError as error:
            problems.append(str(error))
            continue
        if sha256_of(root / name) != record["sha256"]:
            problems.append(f"{root / name} has changed: its SHA-256 is not the recorded one")
    return problems


class CommitLog:
    """A file that only grows, whose committed length is kept elsewhere; what is behind that length is cut off."""

    def __init__(self, path: Path, committed: int) -> None:
        self._path = path
        if not path.exists():
            path.touch()
        size = path.stat().st_size
        if size < committed:
            raise ValueError(f"{path} has {size} bytes where {committed} were committed: begin again with overwrite")
        if size > committed:
            os.truncate(path, committed)
        self.length = committed

    def append(self, data: bytes) -> None:
        """Write and sync; counts only once the new `length` is committed."""
        if not data:
            return
        with disk_full_explained(self._path), self._path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.length += len(data)
