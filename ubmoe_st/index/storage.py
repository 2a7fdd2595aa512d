"""Crash-safe files: written beside their place, synced, then renamed; each with its size and SHA-256 on record."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

COPY_BYTES = 1 << 20
"""Bytes moved at a time when a file is copied or hashed."""

# numpy reads a header as a Python literal, and CPython 3.11's parser counts its depth across threads: two at once may
# end in "AST constructor recursion depth mismatch".
_HEADER_LOCK = threading.Lock()


class HashingWriter:
    """A binary file that counts and hashes what passes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        """Write `data` (any buffer) and return its length in bytes."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._sha256.update(view)
        self.size += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size

    def flush(self) -> None:
        """Flush the file below."""
        self._file.flush()

    @property
    def closed(self) -> bool:
        """Whether the file below is closed (asked for by Arrow)."""
        return self._file.closed

    def record(self) -> dict[str, Any]:
        """Size and SHA-256 of everything written so far."""
        return {"bytes": self.size, "sha256": self._sha256.hexdigest()}


def sync_directory(path: Path) -> None:
    """Make renames inside `path` durable (where the system can: not on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_full_explained(path: Path) -> Iterator[None]:
    """Says of a full disk what was being written and what to do; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or "intact" in str(error):
            raise
        raise OSError(
            error.errno,
            f"no space left while writing {path.name}; everything committed before is intact: "
            "free some space and run the same command again",
            str(path),
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[HashingWriter]:
    """A writer whose content takes the place of `path` only when the block ends well.

    The name always shows the old content or the new content, never a part. On an error the temporary file is
    removed; a full disk is reported with what to do.

    Raises:
        OSError: If the disk is full, naming the file and saying that what was committed is intact.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with disk_full_explained(path):
            with temporary.open("wb") as file:
                writer = HashingWriter(file)
                yield writer
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_directory(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Replace `path` with `content` as indented JSON, atomically."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def npy_header(rows: int, dimension: int, dtype: np.dtype) -> bytes:
    """The header of a C-order .npy file of shape (rows, dimension)."""
    import io

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
    except (ValueError, TypeError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be mapped ({error}): it is missing, truncated or not a .npy file") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(COPY_BYTES):
            digest.update(data)
    return digest.hexdigest()


def record_of(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of an existing file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


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


def remove(path: Path) -> None:
    """Delete a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class WriterLock:
    """At most one writer per index folder. The system releases the lock when the process ends, killed or not."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._file: BinaryIO | None = None

    def __enter__(self) -> WriterLock:
        """Take the lock.

        Raises:
            RuntimeError: If another writer holds it.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("a+b")
        try:
            if os.name == "nt":
                import msvcrt

                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            else:
                import fcntl

                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise RuntimeError(
                f"another writer is at work in {self._path.parent}: an index has one writer at a time (readers are "
                "free); wait for it to end, or stop it"
            ) from error
        self._file = file
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        if self._file is not None:
            self._file.close()
            self._file = None
