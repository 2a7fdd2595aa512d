"""How far a build is: what a callback gets, and a bar that is drawn only when asked for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BuildProgress:
    """How far a build is; what a progress callback gets."""

    stage: str
    """`embed`, `merge` or `index`."""
    rows: int
    """Rows done in this index, earlier runs included."""
    tokens: int
    """Tokens embedded by this run."""
    seconds: float
    """Time since this run began."""
    rows_per_second: float
    """Rows this run embeds per second."""
    tokens_per_second: float
    """Tokens this run embeds per second."""
    fraction: float | None
    """Part of the corpus done, 0 to 1, where it can be known."""
    eta_seconds: float | None
    """Time left, where it can be estimated."""


ProgressCallback = Callable[[BuildProgress], None]


class ProgressBar:
    """A callable that draws `BuildProgress` with rich on standard error: rows/s, tokens/s, time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._lock = threading.Lock()
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rows]:,} rows"),
            TextColumn("{task.fields[speed]}"),
            console=Console(stderr=True),
            transient=False,
        )
        self._task: Any = self._progress.add_task("embed", total=None, rows=0, speed="")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, state: BuildProgress) -> None:
        """Draw `state`."""
        left = "" if state.eta_seconds is None else f", {duration(state.eta_seconds)} left"
        speed = f"{state.rows_per_second:,.1f} rows/s, {state.tokens_per_second:,.0f} tokens/s{left}"
        with self._lock:
            self._progress.update(
                self._task,
                description=state.stage,
                total=None if state.fraction is None else 1.0,
                completed=state.fraction or 0.0,
                rows=state.rows,
                speed=speed,
            )


def duration(seconds: float) -> str:
    """Seconds as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def show(stack: contextlib.ExitStack, progress: bool | ProgressCallback) -> ProgressCallback | None:
    """The callback for `progress`: a bar that lives in `stack`, the callable itself, or None."""
    if progress is True:
        return stack.enter_context(ProgressBar())
    return None if progress is False else progress
