"""A measurement in a process of its own, so that its memory, its threads and its libraries are its own."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
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


def status_bytes(kind: str) -> int:
    """A figure of `/proc/self/status` such as `VmHWM` (peak resident) or `RssAnon`, bytes.

    Raises:
        OSError: If there is none, as on anything but Linux.
    """
    found = re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise OSError(f"/proc/self/status names no {kind}: this needs Linux")
    return int(found[1]) * 1024
