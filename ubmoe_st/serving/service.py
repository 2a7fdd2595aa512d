"""What the routes share: one engine, its queues, its index."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request

from .batching import Batcher, Generations, Searches
from .engine import Engine, Sampling
from .errors import ApiError
from .metrics import Metrics
from .schemas import GenerationRequest
from .settings import Settings

T = TypeVar("T")


class Service:
    """One model behind all routes.

    Args:
        engine: The model.
        settings: Limits.
        index: An `EmbeddingIndex` or `IndexGroup` that knows its model. None: no search.
    """

    def __init__(self, engine: Engine, settings: Settings, index: Any = None) -> None:
        self.engine, self.settings, self.index = engine, settings, index
        self.metrics = Metrics()
        self.batcher = Batcher(engine, settings, self.metrics.batch)
        self.generations = Generations(engine, settings, self.metrics.generated)
        self.searches = Searches(settings)
        self.metrics.queue.set_function(lambda: len(self.batcher))
        self.metrics.running.set_function(lambda: self.generations.running)
        self.metrics.waiting.set_function(lambda: self.generations.waiting)

    async def close(self) -> None:
        """Stop all work."""
        await self.generations.close()
        await self.batcher.close()
        self.searches.close()

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            ApiError: With 404.
        """
        if name is not None and name != self.engine.name:
            raise ApiError(
                404,
                f"there is no model {name!r} here, only {self.engine.name!r}; leave the field out, or see /v1/models",
                code="model_not_found",
                param="model",
            )

    def sampling(self, body: GenerationRequest, ids: Sequence[int]) -> Sampling:
        """How to generate what a request asks for.

        Args:
            body: The request.
            ids: Its prompt.

        Raises:
            ApiError: If prompt and answer do not fit into the context.
        """
        wanted = body.max_completion_tokens or body.max_tokens
        room = self.engine.context - len(ids)
        if room < (wanted or 1):
            asked = f" and max_tokens is {wanted}" if wanted else ""
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens{asked}, but this server holds {self.engine.context} tokens in all",
                code="context_length_exceeded",
            )
        return Sampling(
            wanted or min(self.settings.default_max_tokens, room), body.temperature, body.top_p, body.top_k, body.seed
        )


async def unless_gone(request: Request, work: Awaitable[T], timeout_s: float) -> T:
    """The result of `work`, which is cancelled when the client goes away or the time is over.

    Args:
        request: The request, with its body read.
        work: What to do.
        timeout_s: At most so long.

    Raises:
        TimeoutError: If it takes longer.
        ApiError: If the client is gone; nobody reads it.
    """
    task: asyncio.Future[T] = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        both: set[asyncio.Future[Any]] = {task, gone}
        await asyncio.wait(both, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ApiError(499, "the client is gone")
        raise TimeoutError
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
