"""Errors as OpenAI's clients read them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fssa_fast.generation import EngineClosed, QueueFull
from fssa_fast.users import BankFull, StoreError
from fssa_fast.users.store import StoreConflict

logger = logging.getLogger("fssa_fast.serving")

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "server_error"}
# What the engine calls otherwise than the API.
_ARGUMENTS = {"max_new_tokens": "max_tokens", "grammar": "response_format", "allowed_tokens": "allowed_token_ids"}


class ApiError(HTTPException):
    """What a request is answered when it cannot be served."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.status, self.code, self.message, self.param = status, code, message, param

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer."""
        return json_response(self.body(), self.status, self.headers)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII: texts of half a character, which an error may quote, have no other form."""
    return Response(json.dumps(content), status, dict(headers or {}), media_type="application/json")


def unknown_user(name: str) -> ApiError:
    """The 404 for a user whom this key does not have: it says nothing of other keys' users."""
    return ApiError(404, "user_not_found", f"user: expected one of this key's users, got {name!r}", "user")


def translated(error: Exception) -> ApiError:
    """What an exception of the library is to a client. Raises it again where it is the server's own fault."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, "queue_full", "too many requests are waiting; try again later", None, {"Retry-After": "1"})
    if isinstance(error, BankFull):
        return ApiError(503, "bank_full", "too many users are being served; try again later", None,
                        {"Retry-After": "1"})  # fmt: skip
    if isinstance(error, EngineClosed):
        return shutting_down()
    if isinstance(error, StoreConflict):
        return ApiError(409, "conflict", "the user was changed meanwhile; try again")
    if isinstance(error, StoreError):
        logger.error("the users' database failed: %s", error)
        return ApiError(503, "store_failed", "the users' database cannot be read or written")
    if isinstance(error, (ValueError, TypeError)):
        message = str(error).partition("\n")[0]  # llguidance says more than anybody wants to know
        name, colon, rest = message.partition(":")
        param = _ARGUMENTS.get(name, name) if colon and name.isidentifier() else None
        message = message if param is None else f"{param}:{rest}"
        code = "context_length_exceeded" if "tokens with the answer" in message else "invalid_value"
        return ApiError(400, code, message, param)
    raise error


def failure(error: Exception) -> ApiError:
    """What a request failed of after it had begun: by no fault of its own, unless a grammar cannot be followed."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineClosed):
        return shutting_down()
    if isinstance(error, ValueError) and str(error).startswith("grammar:"):
        return translated(error)
    logger.error("a request failed: %s", type(error).__name__, exc_info=error)
    return ApiError(500, "generation_failed", "the answer could not be made to its end")


def shutting_down() -> ApiError:
    """The 503 of a server that takes no more requests."""
    return ApiError(503, "shutting_down", "the server is shutting down", None, {"Retry-After": "5"})


def install(app: FastAPI) -> None:
    """Makes the app answer errors in this form."""

    async def of_api(_: Request, error: Exception) -> Response:
        return translated(error).response()

    async def of_validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
        param = ".".join(place) or None
        if first["type"] == "extra_forbidden":
            return ApiError(400, "unsupported_parameter", f"{param}: not supported by this server", param).response()
        return ApiError(400, "invalid_value", f"{param or 'body'}: {first['msg']}", param).response()

    async def of_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        return ApiError(error.status_code, code, str(error.detail), None, error.headers).response()

    async def of_server(_: Request, error: Exception) -> Response:  # which uvicorn logs
        return ApiError(500, "server_error", "the server failed; its log says of what").response()

    app.add_exception_handler(Exception, of_server)
    app.add_exception_handler(RequestValidationError, of_validation)
    app.add_exception_handler(HTTPException, of_http)
    for kind in (ApiError, QueueFull, BankFull, EngineClosed, StoreError):
        app.add_exception_handler(kind, of_api)
