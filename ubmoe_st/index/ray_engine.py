"""The embedding step of a build on a Ray cluster: actors hold the model, windows go out and come back in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from .embedder import Embedder
from .pipeline import PipelineOptions, Window

WINDOWS_PER_WORKER = 2
"""Windows an actor has in hand, so that it never waits for the next one."""


class _Worker:
    """Lives in an actor: one copy of the model."""

    def __init__(self, model: Any, truncate_dim: int | None) -> None:
        self._embedder = Embedder(model, truncate_dim=truncate_dim)

    def embed(self, batches: list[list[str]]) -> list[np.ndarray]:
        """Unit vectors of each batch."""
        return [self._embedder.documents(batch) for batch in batches]


class RayEngine:
    """Embeds windows on Ray actors.

    Reading, numbering and committing stay with the caller, in order: so the rows and the vectors are those of a local
    build on the same kind of machine, and such a build resumes like any other.

    Args:
        model: A folder or Hub id that every worker can load, or a model object, which is sent to them.
        truncate_dim: As in `Embedder`.
        workers: Actors.
        resources: For `ray.remote`: `{"num_gpus": 1}`. Default: one CPU each.

    Raises:
        ImportError: If ray is not installed.
    """

    def __init__(
        self, model: Any, truncate_dim: int | None, workers: int, resources: dict[str, Any] | None = None
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError("engine='ray' needs ray: pip install ray") from error
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self._ray: Any = ray
        if not ray.is_initialized():
            ray.init(include_dashboard=False)
        shared = model if isinstance(model, str) else ray.put(model)
        actor: Any = ray.remote(**(resources or {"num_cpus": 1}))(_Worker)
        self._actors = [actor.remote(shared, truncate_dim) for _ in range(workers)]

    def embed(self, windows: Iterator[Window], options: PipelineOptions) -> Iterator[tuple[Window, np.ndarray | None]]:
        """Each window with its vectors, (n, D), in the order of the windows; None for a window without entries."""
        waiting: deque[tuple[Window, list[list[int]], Any]] = deque()
        limit = WINDOWS_PER_WORKER * len(self._actors)
        for number, window in enumerate(windows):
            batches = list(window.batches(options))
            texts = [[window.entries[i].model_input(options.with_title) for i in batch] for batch in batches]
            actor = self._actors[number % len(self._actors)]
            waiting.append((window, batches, actor.embed.remote(texts)))
            if len(waiting) >= limit:
                yield self._finished(*waiting.popleft())
        while waiting:
            yield self._finished(*waiting.popleft())

    def _finished(self, window: Window, batches: list[list[int]], result: Any) -> tuple[Window, np.ndarray | None]:
        parts = self._ray.get(result)
        if not parts:
            return window, None
        vectors = np.empty((len(window.entries), parts[0].shape[1]), np.float32)
        for batch, part in zip(batches, parts):
            vectors[batch] = part
        return window, vectors

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            self._ray.kill(actor)
