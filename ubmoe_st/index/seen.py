"""The table of the document ids that a build has met."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..files import disk_full_explained
from .corpus import key_of
from .storage import full_table_told

SEEN_CACHE_KIB = 8192
"""Memory for the table of known ids."""
_ASKED_TOGETHER = 128
"""Ids looked up in one statement."""


@dataclass
class KnownIds:
    """Some ids, with the rows they begin at as far as they are known."""

    keys: dict[str, bytes]
    found: dict[bytes, int]
    writer: Callable[[Iterable[tuple[bytes, int]]], None]
    moved: dict[bytes, int] = field(default_factory=dict)

    def row_of(self, identity: str) -> int | None:
        """Where an id begins; None if it is new."""
        return self.found.get(self.keys[identity])

    def move(self, identity: str, row: int) -> None:
        """An id begins at this row from now on."""
        key = self.keys[identity]
        self.found[key] = self.moved[key] = row

    def write(self) -> None:
        """Put what was told into the table.

        Raises:
            OSError: If the disk is full.
        """
        self.writer(self.moved.items())


class SeenIds:
    """Every document id met so far and the row it begins at, in a table on disk with a cache of fixed size.

    Ids are compared by 128 bits of their hash. A thread other than the one that made it may use it.

    Args:
        folder: Where the table goes; nothing in it needs to survive.
        cache_kib: Memory for it.
    """

    def __init__(self, folder: Path, cache_kib: int = SEEN_CACHE_KIB) -> None:
        with disk_full_explained(folder), full_table_told():
            folder.mkdir(parents=True, exist_ok=True)
            self._table = sqlite3.connect(folder / "seen.sqlite", isolation_level=None, check_same_thread=False)
            for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{cache_kib}"):
                self._table.execute(f"PRAGMA {setting}")
            self._table.execute("CREATE TABLE IF NOT EXISTS seen (key BLOB PRIMARY KEY, row INTEGER) WITHOUT ROWID")
            self._table.execute("BEGIN")

    def known(self, identities: Sequence[str]) -> KnownIds:
        """What is known of some ids, to be asked and told of them one by one and then written."""
        keys = [key_of(identity) for identity in identities]
        found: dict[bytes, int] = {}
        for begin in range(0, len(keys), _ASKED_TOGETHER):
            some = keys[begin : begin + _ASKED_TOGETHER]
            marks = ", ".join("?" * len(some))
            with full_table_told():  # a page that is read may put a changed one out of the cache
                found.update(self._table.execute(f"SELECT key, row FROM seen WHERE key IN ({marks})", some))
        return KnownIds(dict(zip(identities, keys)), found, self._write)

    def move_all(self, begins: Iterable[tuple[str, int]]) -> None:
        """Remember that ids begin at rows from now on, known or not."""
        self._write((key_of(identity), row) for identity, row in begins)

    def _write(self, pairs: Iterable[tuple[bytes, int]]) -> None:
        with full_table_told():
            self._table.executemany("REPLACE INTO seen VALUES (?, ?)", pairs)

    def close(self) -> None:
        """Let go of the file."""
        self._table.close()
