"""Runs one generation request of the HTTP API: body, plan, tokens, answer; whole or as events.

A client that goes away, and a deadline that passes, abort what still runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from semipd.core.errors import ConfigError, Refused, SemipdError
from semipd.serve.errors import ApiError
from semipd.serve.gate import Limits, Ticket
from semipd.serve.generation import Plan, generate
from semipd.serve.replies import ChatReply, Choice, CompletionReply, Extras, Reply, Usage
from semipd.serve.responses_reply import ResponsesReply
from semipd.serve.responses_schema import ResponsesBody
from semipd.serve.schema import ChatBody, CompletionBody, StreamOptions, logprobs_of, parse
from semipd.serve.scores import ScoreForms
from semipd.serve.service import Service
from semipd.serve.text import Delta
from semipd.units import parse_seconds

EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]
TIMEOUT_HEADER = "X-Request-Timeout"
DRAIN_FACTOR = 4  # a body that is too large is read this many times the limit, then cut off

Body = CompletionBody | ChatBody | ResponsesBody


class Answer(Response):
    """An ASGI response that does the work when it is called, so it also hears the client leave."""

    def __init__(self, service: Service, request: Request, kind: type[Body]) -> None:
        self.background = None
        self.status_code = 200
        self._service = service
        self._request = request
        self._kind = kind
        self._arrived = time.monotonic()
        self._streaming: Reply | None = None  # whose status line is out

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        patience = _patience(self._request, service.gate.limits.request_timeout)
        service.gate.check_open()
        service.engine()
        with service.gate.admit() as ticket:
            body = parse(await read_body(self._request, service.gate.limits, ticket), self._kind)
            service.check_model(body.model)
            work = asyncio.ensure_future(self._work(body, ticket, send, patience))
            gone = asyncio.ensure_future(_disconnected(receive))
            try:
                await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
                work.cancel()  # does nothing to work that is done
                with contextlib.suppress(asyncio.CancelledError):
                    await work

    async def _work(self, body: Body, ticket: Ticket, send: Send, patience: float) -> None:
        try:
            async with asyncio.timeout(patience):
                plan = await self._plan(body)
                ticket.hold([submit.prompt_tokens for submit in plan.submits])
                answer = self._stream if body.stream else self._whole
                await answer(plan, self._reply(body, plan), ticket, send)
        except TimeoutError:
            await self._fail(_late(patience), send)
        except SemipdError as error:
            await self._fail(error, send)

    async def _plan(self, body: Body) -> Plan:
        match body:
            case ResponsesBody():
                return await self._service.plan_responses(body, self._arrived)
            case ChatBody():
                return await self._service.plan_chat(body, self._arrived)
            case _:
                return await self._service.plan_completion(body, self._arrived)

    def _reply(self, body: Body, plan: Plan) -> Reply:
        name = body.model or self._service.name
        if isinstance(body, ResponsesBody):
            return ResponsesReply(name, body, plan, self._service.tokenizer)
        options = body.stream_options or StreamOptions()
        usage = "none"
        if options.include_usage:
            usage = "all" if options.continuous_usage_stats else "last"
        kind = ChatReply if isinstance(body, ChatBody) else CompletionReply
        output, prompt = (
            None if best is None else ScoreForms(self._service.tokenizer, best)
            for best in (logprobs_of(body), body.prompt_logprobs)
        )
        told = not isinstance(body, ChatBody) or body.include_reasoning is not False
        extras = Extras(output, prompt, bool(body.return_token_ids), told)
        return kind(name, plan.submits, usage, extras, body.request_id)

    async def _stream(self, plan: Plan, reply: Reply, ticket: Ticket, send: Send) -> None:
        tally = _Tally(plan, ticket)
        async with self._generate(plan) as groups:
            async for deltas in groups:
                body = b""
                if self._streaming is None:
                    # Only now: whatever went wrong before the first token got a status of its own.
                    self._streaming = reply
                    await send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})
                    body = reply.first(tally.usage)
                for delta in deltas:
                    tally.count(delta)
                    body += reply.event(delta, tally.usage)
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": reply.last(tally.usage)})

    async def _whole(self, plan: Plan, reply: Reply, ticket: Ticket, send: Send) -> None:
        tally = _Tally(plan, ticket)
        choices = [Choice() for _ in plan.submits]
        async with self._generate(plan) as groups:
            async for deltas in groups:
                for delta in deltas:
                    tally.count(delta)
                    choices[delta.index].add(delta)
        response = Response(reply.complete(choices, tally.usage), media_type="application/json")
        await response(self._request.scope, self._request.receive, send)

    def _generate(self, plan: Plan) -> contextlib.aclosing[AsyncGenerator[list[Delta], None]]:
        return contextlib.aclosing(generate(self._service.session, plan, self._service.tokenizer))

    async def _fail(self, error: Exception, send: Send) -> None:
        """Too late for a status once events have begun: then the error is one of them."""
        if self._streaming is None:
            raise error
        await send({"type": "http.response.body", "body": self._streaming.failed(error)})


class _Tally:
    """Counts what was produced, and tells the gate of first tokens."""

    def __init__(self, plan: Plan, ticket: Ticket) -> None:
        self.usage = Usage(plan.prompt_tokens)
        self._choices = plan.params[0].n
        self._ticket = ticket

    def count(self, delta: Delta) -> None:
        self.usage.completion_tokens += len(delta.tokens)
        self._ticket.started(delta.index)
        if delta.cached_tokens is not None and delta.index % self._choices == 0:
            self.usage.cached_tokens = (self.usage.cached_tokens or 0) + delta.cached_tokens


async def read_body(request: Request, limits: Limits, ticket: Ticket) -> bytes:
    """The whole body. Raises ApiError (413, 408) for one that is too large or too slow, Overloaded, and
    starlette's ClientDisconnect."""
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size <= limits.body:
                    ticket.receive(len(part))
                    parts.append(part)
                elif size > DRAIN_FACTOR * limits.body:
                    break
    except TimeoutError:
        message = f"the body did not arrive within {limits.body_seconds:g} s"
        raise ApiError(408, message, "timeout_error", "timeout") from None
    if size > limits.body:
        # It was read a little further: a client that is still sending might never see the answer.
        message = f"the body is larger than {limits.body} bytes"
        raise ApiError(413, message, "invalid_request_error", "body_too_large")
    return b"".join(parts)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _patience(request: Request, most: float) -> float:
    """Seconds that the client gives the request, by its X-Request-Timeout header."""
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return most
    try:
        seconds = parse_seconds(given)
    except ConfigError as error:
        raise Refused(str(error), TIMEOUT_HEADER) from None
    if not 0.0 < seconds <= most:
        raise Refused(f"a timeout is above 0 and at most {most:g} s", TIMEOUT_HEADER)
    return seconds


def _late(patience: float) -> ApiError:
    return ApiError(504, f"not finished within {patience:g} s", "timeout_error", "timeout")
