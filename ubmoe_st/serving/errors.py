"""Errors as OpenAI's clients read them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from .batching import Busy, Ending

logger = logging.getLogger("ubmoe_st.serving")

_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
_PROBLEMS = 4
"""What is told of a request in which much is wrong."""
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error with its HTTP status.

    Args:
        status: The status.
        message: What was expected, what was got, what to do.
        code: OpenAI's short name of it.
        param: The field it speaks of.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def body_of(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Status and JSON body for whatever a handler raised.

    Args:
        error: The exception; one that is not foreseen becomes a 500 that gives nothing away, and is logged.
    """
    status, code, param, message = 500, None, None, "internal error; the server's log says more"
    if isinstance(error, ApiError):
        status, code, param, message = error.status, error.code, error.param, str(error)
    elif isinstance(error, Busy):
        status, code, message = 429, "server_busy", f"{error}; try again in a while"
    elif isinstance(error, Ending):
        status, code, message = 503, "server_ending", f"{error}; ask again when it is back"
    elif isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        status, code, message = 504, "timeout", "the request took longer than this server allows; ask for less at once"
    elif isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, RequestValidationError):
        status, code = 400, "invalid_request"
        param, message = _problem(error)
    else:
        logger.error("unforeseen error", exc_info=error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _problem(error: RequestValidationError) -> tuple[str | None, str]:
    """The first field that is wrong, and what is; of a field that may be one of several things, what each lacks."""
    found = error.errors()
    first = found[0]
    if first["type"] == "json_invalid":
        return None, f"the body is not JSON: {first['ctx']['error']}, at character {first['loc'][-1]}"
    if first["loc"] == ("body",) and first["type"] in ("missing", "model_attributes_type", "dict_type"):
        return None, "expected a JSON object, sent with the header `Content-Type: application/json`"
    param = next((str(part) for part in first["loc"] if part != "body"), None)
    if param is None:
        param = getattr(first.get("ctx", {}).get("error"), "param", None)
        return param, str(first["msg"]).removeprefix("Value error, ")
    messages = []
    for one in found:
        place = [str(part) for part in one["loc"][1:] if isinstance(part, int) or _is_field(part)]
        if place[:1] == [param]:
            messages.append(f"{'.'.join(place)}: {str(one['msg']).removeprefix('Value error, ')}")
    return param, "; ".join(dict.fromkeys(messages[:_PROBLEMS]))


def _is_field(part: str) -> bool:
    """Whether a part of a place is the name of a field, not that of an alternative: `str`, `list[...]`, a class."""
    return part.isidentifier() and part.islower() and part != "str"


def response_of(error: BaseException) -> JSONResponse:
    """The answer for whatever a handler raised."""
    status, body = body_of(error)
    headers = dict(getattr(error, "headers", None) or {}) | _HEADERS.get(status, {})
    return JSONResponse(body, status, headers)


def add_handlers(app: FastAPI) -> None:
    """Answer every error of an app in one form."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            path = request.url.path
            error = HTTPException(
                error.status_code, f"there is no {request.method} {path} here; /docs lists what there is", error.headers
            )
        return response_of(error)

    for kind in (
        ApiError,
        Busy,
        Ending,
        TimeoutError,
        asyncio.TimeoutError,
        HTTPException,
        RequestValidationError,
        Exception,
    ):
        app.add_exception_handler(kind, answer)
