"""Around every request: the key, the size, the numbers for Prometheus."""

from __future__ import annotations

import hmac
import ipaddress
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException

from .errors import ApiError, response_of

if TYPE_CHECKING:
    from .metrics import Metrics

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = {"/health", "/docs", "/openapi.json"}
"""What needs no key: it says nothing of any text."""


def is_loopback(host: str) -> bool:
    """Whether a name or an address, without port, is this machine's loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class LocalNames:
    """Answers only what is addressed to this machine by a loopback name.

    A page in a browser may reach a local port under a name of its own that its owner lets point here.

    Args:
        app: What is behind.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] in ("http", "websocket"):
            given = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            try:
                host = urlsplit(f"//{given}").hostname or ""
            except ValueError:
                host = ""
            if not is_loopback(host):
                refusal = ApiError(400, f"this server answers to 127.0.0.1 and localhost, got the host {given[:100]!r}")
                await response_of(refusal)(scope, receive, send)  # type: ignore[arg-type]
                return
        await self._app(scope, receive, send)


class Gate:
    """Lets a request in, or answers why not.

    Args:
        app: What is behind.
        api_key: What `Authorization: Bearer` must hold. None: nobody is asked.
        max_body_bytes: Longest request.
    """

    def __init__(self, app: App, api_key: str | None, max_body_bytes: int) -> None:
        self._app, self._longest = app, max_body_bytes
        self._too_long = f"the request is longer than {max_body_bytes:,} bytes; send fewer texts at once"
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refusal = None
        if self._key is not None and scope["path"] not in OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
                refusal = ApiError(401, "expected the header `Authorization: Bearer KEY` with this server's key")
        size = headers.get(b"content-length", b"0")
        if refusal is None and size.isdigit() and int(size) > self._longest:
            refusal = ApiError(413, self._too_long)
        if refusal is not None:
            await response_of(refusal)(scope, receive, send)  # type: ignore[arg-type]
            return
        seen = 0

        async def counted() -> dict[str, Any]:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._longest:
                # Of this class, because FastAPI makes a 400 of any other while it reads a body.
                raise HTTPException(413, self._too_long)
            return message

        await self._app(scope, counted, send)


class Observed:
    """Counts requests and how long they take.

    Args:
        app: What is behind.
        metrics: Where to.
    """

    def __init__(self, app: App, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        # Without an answer the client was gone first.
        status = 499

        async def noted(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            status = 500
            raise
        finally:
            route = scope.get("route")
            # Paths that no route has are one label: clients could make any number.
            self._metrics.request(getattr(route, "path", "other"), status, time.perf_counter() - began)
