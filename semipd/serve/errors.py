"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from semipd.core.errors import EngineDead, Overloaded, Refused, SemipdError
from semipd.serve.gate import RETRY_SECONDS, Draining

log = logging.getLogger("semipd")


class ApiError(SemipdError):
    """An answer other than 200, chosen by the server itself."""

    def __init__(
        self, status: int, message: str, kind: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param


class ErrorDetail(msgspec.Struct, frozen=True):
    """param: the field that is wrong, where it is one's fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """What every answer but a success holds."""

    error: ErrorDetail


def body_of(error: Exception) -> tuple[int, bytes]:
    """HTTP status and JSON body for an error."""
    status, kind, code, param = _describe(error)
    message = error.detail if isinstance(error, HTTPException) else str(error)
    if status == 500 and not isinstance(error, SemipdError):
        message = "the server failed; its log says why"
    return status, msgspec.json.encode(ErrorBody(ErrorDetail(message, kind, param, code)))


def response_of(error: Exception) -> Response:
    """The same as a response, with Retry-After where it makes sense to come back."""
    status, body = body_of(error)
    headers = {}
    if status in (429, 503) and not isinstance(error, EngineDead):
        headers["Retry-After"] = str(RETRY_SECONDS)
    if isinstance(error, HTTPException):
        headers |= dict(error.headers or {})
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(body, status, headers, media_type="application/json")


def install(app: FastAPI) -> None:
    """Answer every error of the app in this form."""

    async def handle(request: Request, error: Exception) -> Response:
        return response_of(_unrouted(request, error) if isinstance(error, HTTPException) else error)

    async def nobody_listens(request: Request, error: Exception) -> Response:
        return Response(status_code=400)

    for kind in (SemipdError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(ClientDisconnect, nobody_listens)


def _unrouted(request: Request, error: HTTPException) -> HTTPException:
    """The same error, with words that say what was asked for, where no route answers it."""
    path = request.url.path[:200]
    match error.status_code:
        case 404:
            message = f"there is no {path} here; GET /openapi.json lists what is"
        case 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            message = f"{path} does not take {request.method[:20]}; send {allowed}"
        case _:
            return error
    return HTTPException(error.status_code, message, error.headers)


def _describe(error: Exception) -> tuple[int, str, str | None, str | None]:
    """(status, type, code, param)"""
    match error:
        case ApiError():
            return error.status, error.kind, error.code, error.param
        case Refused():
            return 400, "invalid_request_error", None, error.param
        case Overloaded():
            return 429, "rate_limit_error", "overloaded", None
        case Draining():
            return 503, "server_error", "draining", None
        case EngineDead():
            return 503, "server_error", "engine_dead", None
        case HTTPException():
            kind = "invalid_request_error" if error.status_code < 500 else "server_error"
            return error.status_code, kind, _CODES.get(error.status_code), None
        case _:
            return 500, "server_error", None, None


_CODES = {404: "not_found", 405: "method_not_allowed"}
