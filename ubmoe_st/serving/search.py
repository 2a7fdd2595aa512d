"""`/v1/search` and `/v1/ask`, over an index."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ubmoe_st.answers import ANSWER_TOKENS, answer_prompt, find, search_options

from .completions import answer, chat_job
from .embeddings import texts_of
from .errors import ApiError
from .schemas import AskRequest, EmbeddingRequest, SearchRequest
from .service import Service, unless_gone

logger = logging.getLogger(__name__)


def router(service: Service) -> APIRouter:
    """The routes over a service with an index."""
    routes = APIRouter()
    index, limit = service.index, service.settings.timeout_s

    def refresh() -> None:
        """Move to what other processes have committed; where that cannot be read, the version at hand goes on."""
        try:
            index.refresh()
        except (OSError, ValueError) as error:
            logger.warning("the index is searched as it was: %s", error)

    async def found(request: Request, query: str, k: int, *, whole: str | None, **options: Any) -> list[Any]:
        def look() -> list[Any]:
            if whole is not None and options.get("mode") != "bm25":
                asked = EmbeddingRequest.model_validate({"input": query, "input_type": "query"})
                texts_of(service.engine, asked, whole)
            try:
                return find(index, query, k, **options)
            except (TypeError, ValueError) as error:
                raise ApiError(400, str(error)) from error

        return await unless_gone(request, service.searches.run(look), limit)

    def fits(prompt: list[dict[str, str]]) -> bool:
        return len(service.engine.continuation_ids(prompt)) + ANSWER_TOKENS <= service.engine.context

    def shown(hits: list[Any]) -> list[dict[str, Any]]:
        # Where the index lies on this machine is no matter of clients.
        return [{**hit.as_dict(), "index": Path(hit.index).name} for hit in hits]

    @routes.post("/v1/search", summary="The nearest entries of the index")
    async def search(body: SearchRequest, request: Request) -> dict[str, Any]:
        service.check_model(body.model)
        await asyncio.to_thread(refresh)
        if body.mode != "dense" and not hasattr(index, "info"):
            raise ApiError(
                400, f"mode {body.mode!r} searches one index, and this server has several: leave it out", param="mode"
            )
        if body.mode != "dense" and index.info["bm25"] is None:
            raise ApiError(
                400,
                f"mode {body.mode!r} needs a BM25 part, and this index has none: leave the mode out, or have the index "
                "built with `ubmoe index --bm25`",
                param="mode",
            )
        mode = {} if body.mode == "dense" else {"mode": body.mode}
        whole = None if body.truncate else "query"
        hits = await found(request, body.query, body.k, whole=whole, filter=body.filter, **mode)
        return {"object": "list", "model": service.engine.name, "data": shown(hits)}

    @routes.post("/v1/ask", summary="An answer from the entries of the index, as a chat completion with its `entries`")
    async def ask(body: AskRequest, request: Request) -> Response:
        service.check_model(body.model)
        await asyncio.to_thread(refresh)
        whole = None if body.truncate else "question"
        hits = await found(request, body.question, body.k, whole=whole, filter=body.filter, **search_options(index))
        if not hits:
            raise ApiError(400, "no entry was found, so there is nothing to answer from", param="filter")
        prompt = await asyncio.to_thread(answer_prompt, body.question, hits, fits)
        job = await chat_job(service, body, prompt, entries=shown(hits))
        return await answer(service, job, body, request)

    return routes
