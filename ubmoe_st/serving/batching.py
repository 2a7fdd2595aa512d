"""Concurrent requests share the model: texts to embed form batches, texts to generate take turns."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .engine import Engine, Sampling, Tokens
from .settings import Settings
from .text import TextStream

if TYPE_CHECKING:
    from ubmoe_st.ranking import Reading

T = TypeVar("T")


class Busy(Exception):
    """The queue is full: the client has to come again later."""


class Ending(Exception):
    """The server shuts down: the client has to ask again, here or elsewhere."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


async def within(work: Awaitable[T], seconds: float, *, give_back: Callable[[], None] | None = None) -> T:
    """The result of `work`. A cancellation always counts: `asyncio.wait_for` loses some before Python 3.12.

    Args:
        work: Cancelled with who waits for it, and when the time is over.
        seconds: At most so long.
        give_back: Called if who waits is cancelled when `work` was just done, so that nobody gets its result.

    Raises:
        TimeoutError: If it takes longer.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=max(seconds, 0.001))
    except asyncio.CancelledError:
        if give_back is not None and task.done() and not task.cancelled():
            give_back()
        task.cancel()
        raise
    if not done:
        task.cancel()
        raise TimeoutError
    return task.result()


@dataclass
class _Waiting:
    tokens: Tokens
    done: asyncio.Future[np.ndarray]


def choose(lengths: Sequence[int], budget: int) -> list[int]:
    """Which of the waiting texts are embedded next.

    The first always is; of the others, in order, those with which all rows, padded to the longest, stay in the budget.

    Args:
        lengths: Tokens of each waiting text, at least one text.
        budget: Tokens of a batch, padding included.

    Returns:
        Positions, rising.
    """
    chosen, longest = [0], lengths[0]
    for position in range(1, len(lengths)):
        together = max(longest, lengths[position])
        if (len(chosen) + 1) * together <= budget:
            chosen.append(position)
            longest = together
    return chosen


class Batcher:
    """Embeds the texts of all requests together, in one thread.

    Args:
        engine: The model.
        settings: Limits.
        on_batch: Told the texts and tokens of each batch.
    """

    def __init__(self, engine: Engine, settings: Settings, on_batch: Callable[[int, int], None] | None = None) -> None:
        self._engine, self._settings, self._on_batch = engine, settings, on_batch
        self._waiting: list[_Waiting] = []
        self._more = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embed")
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    async def embed(self, texts: Sequence[Tokens]) -> np.ndarray:
        """Vectors as of `Engine.embed`, (N, D). A caller that is cancelled takes its waiting texts out of the queue.

        Args:
            texts: N texts of one task, at least one.

        Raises:
            Busy: If too many texts wait already. A request alone is always taken.
        """
        if self._waiting and len(self._waiting) + len(texts) > self._settings.max_queue:
            raise Busy(f"{len(self._waiting)} texts wait to be embedded, and {self._settings.max_queue} may")
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._work())
        entries = [_Waiting(tokens, loop.create_future()) for tokens in texts]
        self._waiting += entries
        self._more.set()
        try:
            return np.stack(await asyncio.gather(*(entry.done for entry in entries)))
        finally:
            # Nothing is left here of a request that came to its end.
            for entry in entries:
                entry.done.cancel()
            self._waiting = [entry for entry in self._waiting if not entry.done.done()]

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._more.wait()
            await asyncio.sleep(self._settings.batch_wait_ms / 1000)
            self._more.clear()
            while self._waiting:
                task = self._waiting[0].tokens.task
                alike = [entry for entry in self._waiting if entry.tokens.task == task]
                chosen = choose([len(entry.tokens.ids) for entry in alike], self._settings.batch_tokens)
                batch = [alike[position] for position in chosen]
                taken = set(map(id, batch))
                self._waiting = [entry for entry in self._waiting if id(entry) not in taken]
                inputs = [entry.tokens for entry in batch]
                try:
                    vectors = await loop.run_in_executor(self._thread, self._engine.embed, inputs)
                except Exception as error:
                    for entry in batch:
                        if not entry.done.done():
                            entry.done.set_exception(error)
                    continue
                if self._on_batch is not None:
                    self._on_batch(len(batch), sum(len(tokens.ids) for tokens in inputs))
                for entry, vector in zip(batch, vectors):
                    if not entry.done.done():
                        entry.done.set_result(vector)

    async def close(self) -> None:
        """End the worker; what still waits is cancelled."""
        if self._task is not None:
            self._task.cancel()
        for entry in self._waiting:
            entry.done.cancel()
        self._thread.shutdown(wait=True)


@dataclass(frozen=True)
class Delta:
    """A piece of generated text.

    Attributes:
        text: New text, possibly none.
        tokens: New tokens so far.
        finish_reason: `stop` or `length` with the last piece, else None.
    """

    text: str
    tokens: int
    finish_reason: str | None = None


class Generations:
    """Generates texts, so many at a time, each in a thread of its own.

    Args:
        engine: The model.
        settings: Limits.
        on_end: Told how many tokens each text has when it ends, for whatever reason.
    """

    def __init__(self, engine: Engine, settings: Settings, on_end: Callable[[int], None] | None = None) -> None:
        self._engine, self._settings, self._on_end = engine, settings, on_end
        self._threads = ThreadPoolExecutor(settings.generations, thread_name_prefix="generate")
        self._slots = asyncio.Semaphore(settings.generations)
        self._cancelled: set[threading.Event] = set()
        self.waiting = 0
        self.running = 0
        self._ending = False

    def end(self) -> None:
        """Stop what is generated and what waits, for the server ends: their requests get `Ending`."""
        self._ending = True
        for stopped in self._cancelled:
            stopped.set()

    def check_room(self) -> None:
        """Refuse when as many requests wait as may.

        Raises:
            Busy: Then.
        """
        if self._slots.locked() and self.waiting >= self._settings.max_waiting:
            raise Busy(f"{self.waiting} requests wait to generate, and {self._settings.max_waiting} may")

    async def run(
        self, ids: list[int], sampling: Sampling, stops: Sequence[str] = (), *, taken: bool = False
    ) -> AsyncGenerator[Delta, None]:
        """Pieces of the new text. Closing the iterator, or cancelling who reads it, stops the generation.

        Args:
            ids: The prompt.
            sampling: How to choose.
            stops: Texts before which the new text ends.
            taken: Whether the request it is of was taken in already: then it waits, however many do.

        Raises:
            Busy: If too many requests wait already.
            Ending: If the server shuts down meanwhile.
            TimeoutError: If it takes longer than the settings allow, waiting included.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.timeout_s
        pieces: asyncio.Queue[Delta | BaseException] = asyncio.Queue()
        stopped = threading.Event()
        if not taken:
            self.check_room()
        await self._begin(
            lambda: self._generate(
                ids, sampling, stops, stopped, lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece)
            ),
            stopped,
        )
        try:
            while True:
                piece = await within(pieces.get(), deadline - loop.time())
                if isinstance(piece, BaseException):
                    raise piece
                if self._ending and stopped.is_set():
                    raise Ending
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            stopped.set()

    async def rank(self, reading: Reading) -> list[float]:
        """The score of each document; takes the turn of a text, because the same view computes it.

        Cancelling it stops the work.

        Args:
            reading: What to rank.

        Raises:
            Busy: If too many requests wait already.
            Ending: If the server shuts down meanwhile.
            TimeoutError: If it takes longer than the settings allow, waiting included.
        """
        deadline = asyncio.get_running_loop().time() + self._settings.timeout_s
        stopped = threading.Event()
        self.check_room()
        try:
            work = await self._begin(lambda: self._engine.rank(reading, lambda: not stopped.is_set()), stopped)
            return await within(asyncio.shield(work), deadline - asyncio.get_running_loop().time())
        except (asyncio.CancelledError, CancelledError):
            if self._ending:
                raise Ending from None
            raise
        finally:
            stopped.set()

    async def _begin(self, work: Callable[[], T], stopped: threading.Event) -> asyncio.Future[T]:
        """Wait for a turn, then start `work` in a thread."""
        if self._slots.locked():
            self.waiting += 1
            try:
                await within(self._slots.acquire(), self._settings.timeout_s, give_back=self._slots.release)
            finally:
                self.waiting -= 1
        else:
            await self._slots.acquire()  # At once: who has a turn never counts as waiting for it.
        if self._ending:
            self._slots.release()
            raise Ending
        self._cancelled.add(stopped)
        self.running += 1
        begun = asyncio.get_running_loop().run_in_executor(self._threads, work)

        def over(done: asyncio.Future[T]) -> None:
            self.running -= 1
            self._cancelled.discard(stopped)
            self._slots.release()
            if not done.cancelled():
                done.exception()  # Looked at, also where nobody waits for it any more.

        # The slot is free when the thread is, not when the client is gone.
        begun.add_done_callback(over)
        return begun

    def _generate(
        self,
        ids: list[int],
        sampling: Sampling,
        stops: Sequence[str],
        stopped: threading.Event,
        send: Callable[[Delta | BaseException], Any],
    ) -> None:
        stream = TextStream(self._engine, stops)

        def on_token(token: int) -> bool:
            text = stream.push(token)
            if text and not stream.finished:
                send(Delta(text, stream.tokens))
            elif stream.finished:
                send(Delta(text, stream.tokens, "stop"))
            return not stream.finished and not stopped.is_set()

        try:
            if not stopped.is_set():
                self._engine.generate_tokens(ids, sampling, on_token)
            if not stream.finished:
                send(Delta(stream.rest(), stream.tokens, "length"))
        except Exception as error:
            send(error)
        finally:
            if self._on_end is not None:
                self._on_end(stream.tokens)

    async def close(self) -> None:
        """Stop whatever is being generated and wait for it."""
        for stopped in self._cancelled:
            stopped.set()
        began = time.monotonic()
        while self.running and time.monotonic() - began < 10:
            await asyncio.sleep(0.01)
        self._threads.shutdown(wait=False, cancel_futures=True)


class Searches:
    """Searches an index in threads of its own, so that slow ones take none from the other routes.

    Args:
        settings: Limits.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(settings.searches, thread_name_prefix="search")
        self._lock = threading.Lock()
        self._open = 0

    async def run(self, work: Callable[[], T]) -> T:
        """The result of a search. One that is cancelled before its turn is not begun.

        Args:
            work: The search.

        Raises:
            Busy: If too many wait already.
        """
        most = self._settings.max_waiting
        with self._lock:
            if self._open >= self._settings.searches + most:
                raise Busy(f"{most} searches wait, which is as many as may")
            self._open += 1
        begun = self._threads.submit(work)
        begun.add_done_callback(self._over)  # when the thread is free, not when the client is gone
        return await asyncio.wrap_future(begun)

    def _over(self, _: object) -> None:
        with self._lock:
            self._open -= 1

    def close(self) -> None:
        """Begin no further search."""
        self._threads.shutdown(wait=False, cancel_futures=True)
