"""A server on the loopback, and an engine that takes its time."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError
from contextlib import contextmanager


@contextmanager
def serving(server):
    """A uvicorn server in a thread of its own; its address."""
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


class Slow:
    """An engine that generates one token after another, or ranks, until it is told to stop."""

    def __init__(self, engine, pause=0.01):
        self._engine, self._pause = engine, pause
        self.tokens, self.running, self.ended = 0, threading.Event(), threading.Event()

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def generate_tokens(self, ids, sampling, on_token):
        self.running.set()
        for _ in range(sampling.max_tokens):
            time.sleep(self._pause)
            self.tokens += 1
            if not on_token(5):
                break
        self.ended.set()

    def rank(self, reading, go_on):
        self.running.set()
        while go_on():
            time.sleep(self._pause)
        raise CancelledError
