"""What `fork` would leave broken in the child: locks that other threads held, and pools whose threads are gone."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from typing import Any

_locks: weakref.WeakSet[Any] = weakref.WeakSet()


class ForkSafeLock:
    """A lock that is free in a forked child, whoever held it. For lazy values, which are set in one assignment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def renew(self) -> None:
        """Forget who holds it."""
        self._lock = threading.Lock()


def held_over_fork(lock: Any) -> Any:
    """The same lock, which a fork waits for: what it guards is whole in the child, also what lies below Python.

    Args:
        lock: Of a module, reentrant.
    """
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock


def _mend_child() -> None:
    for lock in list(_locks):
        lock.renew()
    # GNU OpenMP keeps the pool of the forking thread, whose other threads a child does not have: its first parallel
    # loop would wait for them for ever. One thread needs no pool. The workers of a DataLoader do the same.
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    if "faiss" in sys.modules:
        sys.modules["faiss"].omp_set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mend_child)
