"""The HTTP app over one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response

from ubmoe_st import __version__

from . import completions, embeddings, rerank, search
from .engine import Engine
from .errors import add_handlers
from .middleware import Gate, LocalNames, Observed, is_loopback
from .service import Service
from .settings import Settings


def check_host(host: str, api_key: str | None) -> None:
    """Refuse to listen to other machines without a key.

    Args:
        host: Address or name to listen on.
        api_key: The key, if there is one.

    Raises:
        ValueError: If there is none and the host is not this machine's loopback.
    """
    if api_key is not None:
        if not api_key.strip():
            raise ValueError("the API key is empty; give a long random text, or none at all to serve this machine only")
        if api_key != api_key.strip() or not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("a header cannot carry the API key: give ASCII characters, without spaces around them")
        return
    if not is_loopback(host):
        raise ValueError(
            f"without an API key the server listens on this machine only, got host {host!r}; give --api-key (or "
            "UBMOE_API_KEY), or listen on 127.0.0.1"
        )


def create_app(
    engine: Engine,
    *,
    index: Any = None,
    api_key: str | None = None,
    settings: Settings | None = None,
    local: bool = False,
) -> FastAPI:
    """Embeddings, chats, completions by the OpenAI protocol, rankings by Cohere's, and search where there is an index.

    Args:
        engine: The model.
        index: An `EmbeddingIndex` or `IndexGroup` that knows its model.
        api_key: What clients must send as `Authorization: Bearer`. None: nothing.
        settings: Limits. None: the defaults.
        local: Answer only requests addressed to this machine by a loopback name, so that no page in a browser can
            reach the server under a name of its own.
    """
    service = Service(engine, settings or Settings(), index)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(title="ubmoe_st", version=__version__, lifespan=lifespan, redoc_url=None)
    app.state.service = service
    add_handlers(app)
    app.add_middleware(Gate, api_key=api_key, max_body_bytes=service.settings.max_body_bytes)
    app.add_middleware(Observed, metrics=service.metrics)
    if local:
        app.add_middleware(LocalNames)
    app.include_router(embeddings.router(service))
    app.include_router(completions.router(service))
    app.include_router(rerank.router(service))
    if index is not None:
        app.include_router(search.router(service))

    @app.get("/v1/models", summary="The one model there is")
    async def models() -> dict[str, Any]:
        entry = {"id": engine.name, "object": "model", "created": 0, "owned_by": "ubmoe_st"}
        facts = {
            "dimension": engine.dimension,
            "longest_text_tokens": engine.longest_text,
            "context_tokens": engine.context,
            "prompts": engine.prompts,
        }
        return {"object": "list", "data": [entry | facts]}

    @app.get("/v1/models/{name:path}", summary="The model by its name")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return (await models())["data"][0]

    @app.head("/health", include_in_schema=False)
    @app.get("/health", summary="Whether the server answers")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", summary="Numbers for Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app
