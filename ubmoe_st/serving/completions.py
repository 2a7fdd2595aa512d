"""`/v1/chat/completions` and `/v1/completions`, whole or streamed."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from .batching import Delta
from .engine import Sampling
from .errors import ApiError, body_of
from .schemas import ChatRequest, CompletionRequest, GenerationRequest
from .service import Service, unless_gone


@dataclass
class Job:
    """One answer: its prompts, and what is said around each.

    Attributes:
        prompts: Token ids and sampling of each prompt.
        chat: Whether the answer is in the form of a chat.
        model: Name.
        extra: Fields added to the whole answer, or to the first piece of a stream.
    """

    prompts: list[tuple[list[int], Sampling]]
    chat: bool
    model: str
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def head(self, *, stream: bool) -> dict[str, Any]:
        """Fields that every answer and every piece begins with."""
        kind = ("chat.completion.chunk" if stream else "chat.completion") if self.chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model}

    def choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        """A whole text."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **said, "logprobs": None, "finish_reason": finish_reason}

    def piece(self, index: int, text: str, finish_reason: str | None, *, first: bool) -> dict[str, Any]:
        """A part of a text."""
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text or first:
            delta["content"] = text
        said = {"delta": delta} if self.chat else {"text": text}
        return {"index": index, **said, "logprobs": None, "finish_reason": finish_reason}

    def usage(self, new: int) -> dict[str, int]:
        """Token counts, with `new` generated ones."""
        given = sum(len(ids) for ids, _ in self.prompts)
        return {"prompt_tokens": given, "completion_tokens": new, "total_tokens": given + new}


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


async def whole(service: Service, job: Job, stops: list[str]) -> dict[str, Any]:
    """The answer to a job."""
    choices, new = [], 0
    for index, (ids, sampling) in enumerate(job.prompts):
        text, last = "", Delta("", 0, "length")
        # The request was taken in with its first text.
        async with aclosing(service.generations.run(ids, sampling, stops, taken=index > 0)) as pieces:
            async for last in pieces:
                text += last.text
        new += last.tokens
        choices.append(job.choice(index, text, last.finish_reason or "length"))
    return {**job.head(stream=False), "choices": choices, "usage": job.usage(new), **job.extra}


async def streamed(service: Service, job: Job, body: GenerationRequest) -> AsyncIterator[str]:
    """The answer to a job as server-sent events."""
    head, new = job.head(stream=True), 0
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    empty = {"usage": None} if with_usage else {}
    try:
        for index, (ids, sampling) in enumerate(job.prompts):
            count = 0
            if job.chat:
                yield event({**head, "choices": [job.piece(index, "", None, first=True)], **empty, **job.extra})
            async with aclosing(service.generations.run(ids, sampling, body.stops, taken=True)) as pieces:
                async for delta in pieces:
                    count = delta.tokens
                    said = job.piece(index, delta.text, delta.finish_reason, first=False)
                    yield event({**head, "choices": [said], **empty})
            new += count
        if with_usage:
            yield event({**head, "choices": [], "usage": job.usage(new)})
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield event(body_of(error)[1])


async def answer(service: Service, job: Job, body: GenerationRequest, request: Request) -> Response:
    """The response to a request to generate.

    Raises:
        ApiError: If `stream_options` come without `stream`.
        Busy: If too many requests wait.
    """
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options need stream: true", param="stream_options")
    if body.stream:
        # Before the stream begins, while the answer still has a status.
        service.generations.check_room()
        return StreamingResponse(
            streamed(service, job, body),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
    limit = service.settings.timeout_s * len(job.prompts)
    return JSONResponse(await unless_gone(request, whole(service, job, body.stops), limit))


def _prompt_ids(service: Service, prompt: Any, param: str) -> list[int]:
    engine = service.engine
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        if not all(engine.is_token(token) for token in prompt):
            raise ApiError(
                400, f"token ids must be of the tokenizer of {engine.name}; send a text instead", param=param
            )
        return prompt
    try:
        return engine.continuation_ids(prompt)
    except ValueError as error:
        raise ApiError(400, str(error), param=param) from error


async def chat_job(service: Service, body: GenerationRequest, messages: list[dict[str, str]], **extra: Any) -> Job:
    """The job of answering a chat.

    Args:
        service: The model.
        body: The request.
        messages: The chat.
        **extra: Fields added to the answer.
    """
    ids = await asyncio.to_thread(_prompt_ids, service, messages, "messages")
    return Job([(ids, service.sampling(body, ids))], True, service.engine.name, extra)


def router(service: Service) -> APIRouter:
    """The routes over a service."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", summary="Answer a chat")
    async def chat(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        job = await chat_job(service, body, [message.plain() for message in body.messages])
        return await answer(service, job, body, request)

    @routes.post("/v1/completions", summary="Continue a text")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        given = body.prompt
        prompts: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
        if not 1 <= len(prompts) <= service.settings.max_waiting:
            raise ApiError(400, f"prompt must hold 1 to {service.settings.max_waiting} texts, got {len(prompts)}")
        rows = [await asyncio.to_thread(_prompt_ids, service, prompt, "prompt") for prompt in prompts]
        job = Job([(ids, service.sampling(body, ids)) for ids in rows], False, service.engine.name)
        return await answer(service, job, body, request)

    return routes
