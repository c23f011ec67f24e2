"""The routes of the HTTP API."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.responses import PlainTextResponse, Response

from semipd.serve import errors
from semipd.serve.answer import Answer, read_body
from semipd.serve.edge import Edge
from semipd.serve.errors import ApiError, ErrorBody
from semipd.serve.gate import Ticket
from semipd.serve.guard import Guard
from semipd.serve.prometheus import render
from semipd.serve.responses_schema import RESPONSES_KINDS, ResponsesBody
from semipd.serve.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, body_schemas, parse
from semipd.serve.service import Service

METRICS_AGE = 0.2  # seconds; pages closer together show the same numbers


def create_app(
    service: Service, version: str, api_key: str | None = None, metrics_alias: str | None = None
) -> FastAPI:
    """The API of one served model. metrics_alias: a second prefix of the metrics."""
    app = FastAPI(
        title="semipd",
        version=version,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={"default": {"description": "An error", "content": _content("ErrorBody")}},
    )
    app.add_middleware(Guard, key=api_key)
    app.add_middleware(Edge)  # around the guard
    errors.install(app)
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_state(app, service, version)
    _add_metrics(app, service, metrics_alias)
    app.openapi = lambda: _describe(app)  # type: ignore[method-assign]
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    started = int(time.time())

    @app.post("/v1/completions", openapi_extra=_takes("CompletionBody"))
    async def completions(request: Request) -> Response:
        """Continue a prompt."""
        return Answer(service, request, CompletionBody)

    @app.post("/v1/chat/completions", openapi_extra=_takes("ChatBody"))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation, by the model's own chat template."""
        return Answer(service, request, ChatBody)

    @app.post("/v1/responses", openapi_extra=_takes("ResponsesBody"))
    async def responses(request: Request) -> Response:
        """Answer a conversation, as items. Nothing of it is stored."""
        return Answer(service, request, ResponsesBody)

    def card(name: str) -> dict[str, Any]:
        limit = service.session.loaded().limit if service.session.ready else None
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "semipd",
            "root": service.name,
            "max_model_len": limit,
            "vocab_size": service.model.vocabulary,
            "suggestions": service.model.suggestions,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        """The one model that is served, by each of its names."""
        return _json({"object": "list", "data": [card(name) for name in service.names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return _json(card(name))


def _add_tokens(app: FastAPI, service: Service) -> None:
    async def body(request: Request, kind: type[Any], ticket: Ticket) -> Any:
        parsed = parse(await read_body(request, service.gate.limits, ticket), kind)
        service.check_model(parsed.model)
        return parsed

    @app.post("/tokenize", openapi_extra=_takes("TokenizeBody"))
    async def tokenize(request: Request) -> Response:
        """Token ids of a prompt, or of messages under the chat template."""
        service.engine()
        with service.gate.admit() as ticket:
            parsed: TokenizeBody = await body(request, TokenizeBody, ticket)
            return _json(await service.tokenize(parsed))

    @app.post("/detokenize", openapi_extra=_takes("DetokenizeBody"))
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        with service.gate.admit() as ticket:
            parsed: DetokenizeBody = await body(request, DetokenizeBody, ticket)
            return _json({"prompt": await service.detokenize(parsed)})


def _add_state(app: FastAPI, service: Service, version: str) -> None:
    session = service.session

    @app.get("/health")
    async def health() -> Response:
        """Whether the process is alive and both phases make progress."""
        if (why := await session.health()) is not None:
            raise ApiError(503, why, "server_error", "unhealthy")
        return _json({"status": "ok" if session.ready else "loading"})

    @app.get("/ready")
    async def ready() -> Response:
        """Whether requests are welcome."""
        service.gate.check_open()
        service.engine()
        return _json({"status": "ready"})

    @app.get("/load")
    async def load() -> Response:
        """How much is under way, for load balancers: HTTP requests, and what waits for a first token."""
        gate = service.gate
        return _json(
            {
                "server_load": gate.active,
                "queued_requests": gate.queued_requests,
                "queued_tokens": gate.queued_tokens,
                "max_queued_requests": gate.limits.queued_requests,
                "max_queued_tokens": gate.limits.queued_tokens,
                "draining": gate.draining,
            }
        )

    @app.get("/version")
    async def show_version() -> Response:
        return _json({"version": version})


def _add_metrics(app: FastAPI, service: Service, alias: str | None) -> None:
    session = service.session

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus' text format."""
        service.engine()
        try:
            stats = await session.stats(age=METRICS_AGE)
        except TimeoutError:
            raise ApiError(503, "the planner does not answer", "server_error", "busy") from None
        return Response(render(stats, service.name, alias), media_type="text/plain; version=0.0.4")


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _takes(schema: str) -> dict[str, Any]:
    """Part of a route's description: its body."""
    return {"requestBody": {"required": True, "content": _content(schema)}}


def _content(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def _describe(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        description = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = description.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(body_schemas(ErrorBody, *RESPONSES_KINDS))
        app.openapi_schema = description
    return app.openapi_schema
