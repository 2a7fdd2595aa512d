"""`/v1/embeddings`."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response

from .engine import Engine, Tokens
from .errors import ApiError
from .schemas import EmbeddingRequest
from .service import Service, unless_gone

_NAMES = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""Under which names sentence-transformers looks for the prompts of `encode_query` and `encode_document`."""


def prompt_of(engine: Engine, body: EmbeddingRequest) -> str | None:
    """The prompt that a request wants before its texts.

    Raises:
        ApiError: If the checkpoint has no prompt of that name, or two are asked for.
    """
    name = body.prompt_name
    if body.input_type is not None:
        if name is not None:
            raise ApiError(400, "input_type and prompt_name both name a prompt: give one", param="prompt_name")
        name = next((known for known in _NAMES[body.input_type] if known in engine.prompts), engine.default_prompt)
    elif name is None:
        name = engine.default_prompt
    elif name not in engine.prompts:
        known = ", ".join(map(repr, engine.prompts)) or "none"
        raise ApiError(400, f"the checkpoint has no prompt {name!r}; it has: {known}", param="prompt_name")
    return None if name is None else engine.prompts.get(name)


def texts_of(engine: Engine, body: EmbeddingRequest, param: str = "input") -> list[Tokens]:
    """What to embed, as tokens.

    Args:
        engine: The model.
        body: The request.
        param: The field that the client wrote it in.

    Raises:
        ApiError: If a text is too long, a token is none of this model's, or the engine does not know the task.
    """
    if body.task is not None and body.task not in engine.tasks:
        raise ApiError(
            400,
            f"{engine.name} has no vectors for task {body.task!r} here: that takes a checkpoint with a head for it, "
            "all its dimensions, and the torch engine; leave the field out",
            param="task",
        )
    given = body.input
    prompt = prompt_of(engine, body)
    texts: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if texts and isinstance(texts[0], str):
        found = engine.tokenize(texts, prompt)
    elif body.input_type is not None or body.prompt_name is not None:
        raise ApiError(400, "a prompt can be put before texts, not before token ids", param="input")
    else:
        longest = engine.longest_text
        found = [Tokens(ids[:longest], cut=len(ids) > longest) for ids in texts]
        if not all(engine.is_token(token) for tokens in found for token in tokens.ids):
            raise ApiError(
                400, f"token ids must be of the tokenizer of {engine.name}; send texts instead", param="input"
            )
    for position, tokens in enumerate(found):
        if tokens.cut and not body.truncate:
            raise ApiError(
                400,
                f"the text at position {position} has more than {engine.longest_text} tokens, which is the longest the "
                "encoder takes; cut it into parts, or send `truncate: true` to embed its beginning",
                code="context_length_exceeded",
                param=param,
            )
    return [replace(tokens, task=body.task) for tokens in found] if body.task else found


def written(vectors: np.ndarray, encoding: str, model: str, tokens: int) -> bytes:
    """The answer as JSON. Vector by vector, so that other threads get their turn.

    Args:
        vectors: (N, D), float32.
        encoding: `float` or `base64`.
        model: Name.
        tokens: Of all texts.
    """
    rows = []
    for number, vector in enumerate(vectors):
        value = base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()
        rows.append(json.dumps({"object": "embedding", "index": number, "embedding": value}))
    rest = json.dumps({"model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
    return f'{{"object": "list", "data": [{", ".join(rows)}], {rest[1:]}'.encode()


def router(service: Service) -> APIRouter:
    """The route over a service."""
    routes = APIRouter()
    engine, settings = service.engine, service.settings

    @routes.post("/v1/embeddings", summary="Vectors of texts")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        service.check_model(body.model)
        if isinstance(body.input, list) and not 1 <= len(body.input) <= settings.max_inputs:
            many = len(body.input)
            if not many or not isinstance(body.input[0], int):
                raise ApiError(400, f"input must hold 1 to {settings.max_inputs} texts, got {many}", param="input")
        if body.dimensions is not None and body.dimensions > engine.dimension:
            raise ApiError(
                400, f"dimensions must be 1 to {engine.dimension}, got {body.dimensions}", param="dimensions"
            )

        if body.dimensions is not None and body.task is not None:
            raise ApiError(400, f"vectors for task {body.task!r} come whole: leave dimensions out", param="dimensions")

        async def work() -> bytes:
            texts = await asyncio.to_thread(texts_of, engine, body)
            vectors = await service.batcher.embed(texts)
            if body.dimensions is not None:
                vectors = vectors[:, : body.dimensions]
                vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
            count = sum(len(tokens.ids) for tokens in texts)
            return await asyncio.to_thread(written, vectors, body.encoding_format, engine.name, count)

        return Response(await unless_gone(request, work(), settings.timeout_s), media_type="application/json")

    return routes
