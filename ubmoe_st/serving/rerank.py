"""`/v1/rerank`, as Cohere, Jina and vLLM have it: documents in the order of the base model."""

from __future__ import annotations

import asyncio
import math
import uuid
from typing import Any

from fastapi import APIRouter, Request

from .errors import ApiError
from .schemas import RerankRequest
from .service import Service, unless_gone


def relevance(score: float, method: str) -> float:
    """A score of `UBMoE.rank` between 0 and 1, in the same order.

    Args:
        score: Mean log-probability of a token of the query, or log-odds of yes against no.
        method: `likelihood` or `yes_no`.

    Returns:
        The (geometric mean) probability of a token; the probability of yes against no.
    """
    if method == "likelihood":
        return math.exp(min(score, 0.0))
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))


def router(service: Service) -> APIRouter:
    """The route over a service."""
    routes = APIRouter()
    engine, settings = service.engine, service.settings

    def read(body: RerankRequest) -> Any:
        if blank := [position for position, text in enumerate(body.texts) if not text.strip()]:
            raise ApiError(400, f"the document at position {blank[0]} is empty: leave it out", param="documents")
        try:
            reading = engine.read_to_rank(body.query, body.texts, body.method)
        except NotImplementedError as error:
            raise ApiError(501, str(error)) from error
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        if reading.cut and not body.truncate:
            raise ApiError(
                400,
                f"the document at position {reading.cut[0]} has no room in the {reading.room} tokens there are for it "
                "beside the query; cut it into parts, or send `truncate: true` to rank it by its beginning",
                code="context_length_exceeded",
                param="documents",
            )
        return reading

    # Clients of Cohere ask for the second path, those of Jina and vLLM also for the third.
    @routes.post("/v1/rerank", summary="Documents by relevance for a query, best first")
    @routes.post("/v2/rerank", include_in_schema=False)
    @routes.post("/rerank", include_in_schema=False)
    async def rerank(body: RerankRequest, request: Request) -> dict[str, Any]:
        service.check_model(body.model)
        if len(body.documents) > settings.max_inputs:
            many = len(body.documents)
            raise ApiError(400, f"documents must hold 1 to {settings.max_inputs} texts, got {many}", param="documents")
        # While the answer is cheap: reading takes longer than to say that there is no room.
        service.generations.check_room()

        async def work() -> tuple[Any, list[float]]:
            reading = await asyncio.to_thread(read, body)
            return reading, await service.generations.rank(reading)

        reading, scores = await unless_gone(request, work(), settings.timeout_s)
        results: list[dict[str, Any]] = []
        for position in sorted(range(len(scores)), key=lambda position: -scores[position])[: body.top_n]:
            result: dict[str, Any] = {
                "index": position,
                "relevance_score": relevance(scores[position], body.method),
            }
            document = body.documents[position]
            shown = {"text": document} if isinstance(document, str) else document.model_dump()
            results.append(result | ({"document": shown} if body.return_documents else {}))
        return {
            "id": f"rerank-{uuid.uuid4().hex}",
            "object": "list",
            "model": engine.name,
            "results": results,
            "usage": {"prompt_tokens": reading.tokens, "total_tokens": reading.tokens},
        }

    return routes
