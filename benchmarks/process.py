"""A measurement in a process of its own, so that its memory, its threads and its libraries are its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def in_process(function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
    """The result of a function of a module, called in a fresh process that ends with it.

    Args:
        function: Importable by name; it, its arguments and its result are pickled.
        *arguments: Its arguments.
        **options: Its keyword arguments.

    Raises:
        RuntimeError: If it raises, with its error, or if its process dies.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments, **options).result()
        except BrokenProcessPool as error:
            raise RuntimeError(f"the process of {function.__name__} died: killed, or out of memory") from error
        except Exception as error:
            raise RuntimeError(f"{function.__name__} failed: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def peak_of(kind: str, every_s: float = 0.01) -> Iterator[list[int]]:
    """The largest value of a figure of `/proc/self/status` while the body runs, read again and again by a thread.

    For what the kernel keeps no peak of: `VmHWM` counts pages of mapped weights, too, which come and go as it likes.

    Args:
        kind: As for `status_bytes`.
        every_s: Time between two readings, seconds.

    Yields:
        A list that holds the peak, bytes, once the body has ended.
    """
    found, ended = [status_bytes(kind)], threading.Event()

    def watch() -> None:
        while not ended.wait(every_s):
            found[0] = max(found[0], status_bytes(kind))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
        found[0] = max(found[0], status_bytes(kind))


def status_bytes(kind: str) -> int:
    """A figure of `/proc/self/status` such as `VmHWM` (peak resident) or `RssAnon`, bytes.

    Raises:
        OSError: If there is none, as on anything but Linux.
    """
    found = re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise OSError(f"/proc/self/status names no {kind}: this needs Linux")
    return int(found[1]) * 1024
