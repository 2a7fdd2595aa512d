"""An index folder as its one writer sees it: the lock, names to write under, unfinished work, the next version."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import remove, write_json
from .manifest import INFO_FILE, LOCK_FILE, PARTS, Journal, Manifest, now, owns

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of a file system that cannot lock."""


class Workplace:
    """An index folder as its writer sees it: names to write under, unfinished work in `build/`, the next version.

    A name is given out only when nothing has it, and is on record in `build/index_names.json` before anything is
    written under it. So what a killed writer has left is known to be ours, and nothing else in the folder is ever
    removed, whatever it is called.

    At most one writer is in an index folder: entering takes its lock, which the system releases when the process ends,
    killed or not.

    Args:
        folder: The index folder; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "build"
        self._record = self.path / "index_names.json"
        self._lock = FileLock(folder / LOCK_FILE, thread_local=False)
        self._names: set[str] = set()
        self._recorded: set[str] = set()

    def __enter__(self) -> Workplace:
        """Take the lock, and remove what a killed writer has left for nothing.

        Raises:
            RuntimeError: If another writer holds it.
            OSError: If the file system has no locks.
            ValueError: If `build` is no folder, or its record of names is damaged.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(
                f"{self.folder} is, or lies in, a file; an index is a folder: give another path"
            ) from error
        try:
            with warnings.catch_warnings():
                # Where flock is not there filelock warns and takes a marker file, which before its 4.1 let in two.
                warnings.simplefilter("error", UserWarning)
                self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RuntimeError(
                f"another writer is at work in {self.folder}: an index has one writer at a time (readers are free); "
                "wait for it to end, or stop it"
            ) from error
        except (OSError, NotImplementedError, UserWarning) as error:
            if isinstance(error, OSError) and error.errno not in WITHOUT_LOCKS:
                raise
            raise OSError(
                f"the file system of {self.folder} has no locks ({error}), so two writers would not notice each other: "
                "write the index on another one, and copy it"
            ) from error
        try:
            self._take_up()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        self._lock.release()

    def _take_up(self) -> None:
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise ValueError(f"{self.path} is no folder, and an index keeps unfinished work there: move it away")
        try:
            self._names = set(json.loads(self._record.read_text("utf-8"))) if self._record.is_file() else set()
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self._record} is damaged ({error}): delete it") from error
        self._names |= self._needed()
        if not self._record.is_file() or self.unfinished():
            self.tidy()
        else:  # a name that is free again is not to be taken for ours
            self.clear()

    def _needed(self) -> set[str]:
        """What the current version and the unfinished work need."""
        needed = Manifest.read(self.folder).names() if Manifest.exists(self.folder) else set()
        if self.unfinished():
            with contextlib.suppress(ValueError):  # who resumes it is told that it is damaged
                needed.update(*(segment.names() for segment in Journal.read(self.folder).segments))
        return needed

    def unfinished(self) -> bool:
        """Whether a build or an addition left its journal."""
        return Journal.path(self.folder).is_file()

    def begun(self) -> bool:
        """Whether there is an unfinished build or addition with something to lose."""
        if not self.unfinished() or self.committed():
            return False
        position = Journal.read(self.folder).position
        return position.row > 0 or position.chunk > 0

    def committed(self) -> bool:
        """Whether the run in `build/` became the current version (and was killed before it could clear up)."""
        if not Manifest.exists(self.folder) or not self.unfinished():
            return False
        try:
            return Journal.read(self.folder).token == Manifest.read(self.folder).committed
        except ValueError:
            return False

    def strangers(self) -> list[str]:
        """What is in a folder without an index that no writer has put there; nothing where work is unfinished."""
        if self.unfinished():
            return []
        names = []
        for path in sorted(self.folder.iterdir()):
            if path.name in ("build", "segments") and path.is_dir():
                names += [f"{path.name}/{inside.name}" for inside in sorted(path.iterdir())]
            else:
                names.append(path.name)
        return [name for name in names if name != LOCK_FILE and not ("/" in name and owns(name))]

    def next_name(self, part: str, version: int) -> str:
        """A free name for a part of a version, e.g. `dead.npy` or `dead-000003.npy`.

        Args:
            part: A key of `PARTS`.
            version: The version it is for.
        """
        end = PARTS[part]
        plain = [f"{part}{end}"] if end else []
        return self._taken(itertools.chain(plain, (f"{part}-{version:06d}{tail}{end}" for tail in _tails())))

    def next_shard(self, first: str, number: int) -> str:
        """A free name for the file that goes on where the faiss file `first` ends: `index.1.faiss`, `index.2.faiss`."""
        return self._taken(f"{Path(first).stem}.{number}{tail}{Path(first).suffix}" for tail in _tails())

    def next_segment(self) -> str:
        """A free `segments/NNNNNN` behind those in use."""
        numbers = [int(name.split("/")[1]) for name in self._needed() if name.startswith("segments/")]
        return self._taken(f"segments/{number:06d}" for number in itertools.count(max(numbers, default=-1) + 1))

    def _taken(self, candidates: Iterator[str]) -> str:
        """The first free name, from now on on record."""
        pairs = ((name, f"{name}.tmp") for name in candidates)
        pair = next(pair for pair in pairs if not any(os.path.lexists(self.folder / name) for name in pair))
        self._names.update(pair)
        self._write_record()
        return pair[0]

    def _write_record(self) -> None:
        self.path.mkdir(exist_ok=True)
        write_json(self._record, sorted(self._names))
        self._recorded = set(self._names)

    def publish(self, manifest: Manifest) -> None:
        """Make `manifest` the current version, then remove what no version needs any more.

        Readers that opened an older version keep their maps of removed files.
        """
        manifest.stored_rows = sum(segment.rows for segment in manifest.segments)
        manifest.rows = manifest.stored_rows - ((manifest.dead and manifest.dead.rows) or 0)
        manifest.updated = now()
        if not self._names - manifest.names() <= self._recorded:
            self._write_record()
        write_json(self.folder / INFO_FILE, manifest.as_dict())
        self.clear()

    def tidy(self) -> None:
        """Remove what an earlier run left and neither the current version nor unfinished work needs."""
        needed = self._needed()
        folders = {name.rpartition("/")[0] for name in self._names}
        for name in filter(owns, sorted(self._names - needed, reverse=True)):
            if name in folders:  # emptied before, as far as it was ours
                with contextlib.suppress(OSError):
                    (self.folder / name).rmdir()
            else:
                remove(self.folder / name)
        self._names &= needed

    def clear(self) -> bool:
        """Throw away unfinished work; True if there was a journal. What is committed stays."""
        found = self.unfinished()
        Journal.path(self.folder).unlink(missing_ok=True)
        self.tidy()
        self._record.unlink(missing_ok=True)
        if self.path.is_dir():
            for path in self.path.iterdir():
                if owns(f"build/{path.name}"):
                    remove(path)
            with contextlib.suppress(OSError):  # others have put something there
                self.path.rmdir()
        return found


def _tails() -> Iterator[str]:
    """What tells names apart that would be the same: nothing, `b`, `bb`, ..."""
    return ("b" * number for number in itertools.count())
