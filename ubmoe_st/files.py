"""Whole files and folders: written beside their place, synced, renamed; size and SHA-256; JSON. Needs no torch."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

COPY_BYTES = 1 << 20
"""Bytes moved at a time when a file is copied or hashed."""
MAX_JSON_BYTES = 100_000_000
"""Larger ones are refused before they are read; those of the largest models have a few megabytes."""
_LONGEST_NAME, _LONGEST_PATH = 255, 1024
"""Bytes of a part of a name, and of all, that every file system takes."""
_HELD = ".held"
"""In the temporary name of a folder that its living writer keeps locked."""


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


def is_plain(name: str) -> bool:
    """Whether a name leads down from a folder, as written, and is short enough for a file system."""
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        return False
    sizes = [len(part.encode("utf-8", "surrogatepass")) for part in Path(name).parts]
    return max(sizes, default=0) <= _LONGEST_NAME and sum(sizes) <= _LONGEST_PATH


# --- durability ------------------------------------------------------------------------------------------------------


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    _sync(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)


def sync_directory(path: Path) -> None:
    """Make renames inside `path` durable (where the system can: not on Windows)."""
    if os.name != "nt":
        _sync(path, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


NOTHING_LOST = "everything committed before is intact: free some space and run the same command again"
"""The end of every message about a full disk."""


@contextlib.contextmanager
def disk_full_explained(path: Path) -> Iterator[None]:
    """Says of a full disk what was being written and what to do; other errors pass.

    Of one write inside another the outer one is named: nobody asked for a file inside of a folder that is made anew.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"no space left while writing {path.name}; {NOTHING_LOST}",
            str(path),
        ) from (error.__cause__ or error)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- replacing -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path, *, unique: bool = False) -> Iterator[HashingWriter]:
    """A writer whose content takes the place of `path` only when the block ends well.

    The name always shows the old content or the new content, never a part. On an error the temporary file is
    removed; a full disk is reported with what to do.

    Args:
        path: The file; its folder must exist.
        unique: Whether others may write the same file at the same time. The temporary name is then taken by this call
            alone; else it is `path` with `.tmp`, which the next call takes over if this process is killed.

    Raises:
        OSError: If the disk is full, naming the file and saying that what was committed is intact.
    """
    with _cleaning_up(path, unique) as temporary:
        with temporary.open("wb") as file:
            yield HashingWriter(file)
            file.flush()
            os.fsync(file.fileno())
        _put(temporary, path)


@contextlib.contextmanager
def replacing_by_name(path: Path, *, unique: bool = False, first_wins: bool = False) -> Iterator[Path]:
    """Like `replacing`, for libraries that take a name: the block writes a file or a folder under the name it is given.

    Args:
        path: The file or folder. A folder that is there is removed before the new one takes its name, so it must be
            one that nothing relies on; where something does, take `replacing_folder`. A file replaces no folder. A
            link stays, and what it leads to is replaced.
        unique: As for `replacing`.
        first_wins: Whether what others have put at `path` by the end of the block stays, and the new is dropped.

    Raises:
        OSError: If the disk is full, naming the file and saying that what was committed is intact.
    """
    path = path.resolve() if path.is_symlink() else path
    with _cleaning_up(path, unique) as temporary:
        remove(temporary)
        mode = _mode_of_new_files(temporary)
        yield temporary
        _finish(temporary, mode)
        if first_wins and path.exists():
            remove(temporary)
            return
        if path.is_dir() and temporary.is_dir():
            remove(path)
        _put(temporary, path)


@contextlib.contextmanager
def replacing_folder(
    path: str | os.PathLike[str], *, overwrite: bool = True, keep: Callable[[Path], bool] = lambda entry: True
) -> Iterator[Path]:
    """Write a folder all or nothing.

    Yields a temporary sibling; when the block ends without error it is flushed to disk and takes the place of
    `path`. On any error, Ctrl-C included, the temporary folder is removed and `path` is as it was. Where the system can
    exchange two names (Linux, macOS), a kill at any moment leaves the old folder or the new one, and what a killed
    writer left is removed by the next one.

    Args:
        path: The folder to write.
        overwrite: Whether a non-empty folder may be replaced.
        keep: Whether an entry of the old folder that the new one does not have is carried over.

    Raises:
        FileExistsError: If `path` is a file, holds the current directory, or is a folder that is not empty and
            `overwrite` is False.
        OSError: If the disk is full, naming the folder and saying that what was committed is intact.
    """
    target = Path(path).resolve()
    if target.is_file():
        raise FileExistsError(f"{target} is a file; expected a folder")
    _refuse_to_leave(target)
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty; choose another folder, or overwrite it")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_over(target)
    with _cleaning_up(target, unique=True, suffix=f"{_HELD}.tmp") as temporary:
        mode = _mode_of_new_files(temporary)
        with _held(temporary):
            yield temporary
            _finish(temporary, mode)
            if not target.exists():
                _put(temporary, target)
                return
            # Before the swap, so that a kill at any moment leaves them in the folder that has the name.
            for entry in target.iterdir():
                if not os.path.lexists(temporary / entry.name) and keep(entry):
                    _carry(entry, temporary / entry.name)
            sync_directory(temporary)
            old = _swap(temporary, target)
            sync_directory(target.parent)
            shutil.rmtree(old, ignore_errors=True)


def _refuse_to_leave(target: Path) -> None:
    """Refuse to replace the folder in which this process works: it would be left in one that is gone."""
    try:
        here = Path.cwd().resolve()
    except FileNotFoundError:
        return
    if here.is_relative_to(target):
        raise FileExistsError(
            f"{target} is the current directory, or holds it, and cannot be replaced; name another folder"
        )


def _swap(new: Path, target: Path) -> Path:
    """Give `target` the new folder and return where the old one is now; in one step where the system can."""
    if _exchange(new, target):
        return new
    old = new.with_suffix(".old")
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise
    return old


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; False where the system or the file system does not know how."""
    if os.name == "nt":
        return False
    import ctypes

    library = ctypes.CDLL(None)
    names = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            return library.renamex_np(*names, 2) == 0  # RENAME_SWAP
        return library.renameat2(-100, names[0], -100, names[1], 2) == 0  # AT_FDCWD, RENAME_EXCHANGE
    except AttributeError:  # an older C library
        return False


def _carry(entry: Path, to: Path) -> None:
    """Let a file, or all files of a folder, be under a second name too."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.copytree(entry, to, symlinks=True, copy_function=_link)
    else:
        _link(entry, to)


def _link(source: str | Path, to: str | Path) -> None:
    try:
        os.link(source, to, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a file system without links
        shutil.copy2(source, to, follow_symlinks=False)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Make a folder and lock it, so that others see that its writer is alive: a lock ends with its process."""
    descriptor = None
    while descriptor is None:
        folder.mkdir()
        if fcntl is None:
            break
        descriptor = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not folder.exists():  # somebody took it for left over before it was locked
            os.close(descriptor)
            descriptor = None
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _remove_left_over(target: Path) -> None:
    """Remove the temporary siblings of a folder whose writers were killed."""
    if fcntl is None:
        return
    ours = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}{re.escape(_HELD)}\.(tmp|old)")
    for entry in target.parent.iterdir():
        # Without a target, `.old` is all there is.
        if not ours.fullmatch(entry.name) or not entry.is_dir() or (entry.suffix == ".old" and not target.exists()):
            continue
        try:
            descriptor = os.open(entry, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held by a living writer
            continue
        else:
            shutil.rmtree(entry, ignore_errors=True)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _cleaning_up(path: Path, unique: bool, suffix: str = ".tmp") -> Iterator[Path]:
    """A name beside `path`, under which nothing is left if the block fails."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{suffix}" if unique else f"{path.name}{suffix}")
    try:
        with disk_full_explained(path):
            yield temporary
    except BaseException:
        with contextlib.suppress(OSError):
            remove(temporary)
        raise


def _mode_of_new_files(path: Path) -> int:
    """What the umask leaves, found out with a file of that name: asking for the umask sets it, for all threads."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    path.unlink()
    return mode


def _finish(path: Path, mode: int) -> None:
    """Make a file, or a folder with all below it, durable, with the mode that the umask leaves."""
    for entry in [*path.rglob("*"), path]:
        if entry.is_dir():
            sync_directory(entry)
        else:
            entry.chmod(mode)
            sync_file(entry)


def _put(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    sync_directory(path.parent)


# --- JSON ------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds anything else, naming it.
    """
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, expected a JSON object of at most {MAX_JSON_BYTES:,}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of too many digits
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def check_types(kind: type, values: Mapping[str, Any]) -> None:
    """Hold values, as of JSON, against the fields of a dataclass; names that it does not have are passed over.

    Raises:
        TypeError: If one is of another type; names the field.
    """
    hints = _hints(kind)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise TypeError(f"{name}: expected {hints[name]}, got {str(value)[:80]!r}")


@functools.cache  # asked for again and again, of one class for each record of a file
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is typing.Literal:
        return type(value) in map(type, inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items()
        )
    if hint in (bool, int):
        return type(value) is hint
    return isinstance(value, hint)


def write_json(path: Path, content: Any, *, indent: int = 2, unique: bool = False) -> None:
    """Replace `path` with `content` as indented JSON, atomically; `unique` as for `replacing`.

    Raises:
        ValueError: If that is more than `read_json` reads; nothing is replaced then.
    """
    text = (json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode()
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} would have {len(text):,} bytes and could not be read again, expected at most "
            f"{MAX_JSON_BYTES:,}: it was not written, and what was there stays"
        )
    with replacing(path, unique=unique) as file:
        file.write(text)
