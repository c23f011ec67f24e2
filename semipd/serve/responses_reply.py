"""The answers of /v1/responses: whole, or one typed server-sent event after another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from semipd.serve.alignment import Told
from semipd.serve.call_parts import joined
from semipd.serve.errors import ErrorBody, body_of
from semipd.serve.generation import Plan
from semipd.serve.reasoning import thought_tokens
from semipd.serve.replies import Choice, Usage
from semipd.serve.responses_items import (
    COMPLETED,
    IN_PROGRESS,
    INCOMPLETE,
    ComingItems,
    Events,
    call_item,
    message_item,
    new_id,
    reasoning_item,
)
from semipd.serve.responses_schema import ResponsesBody
from semipd.serve.scores import ScoreForms
from semipd.serve.text import Delta
from semipd.serve.tokenizer import Tokenizer

_encode = msgspec.json.Encoder().encode


class ResponsesReply:
    """One answer, of one choice."""

    def __init__(self, model: str, body: ResponsesBody, plan: Plan, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._thinks = plan.reasoning is not None
        best = plan.params[0].logprobs
        self._forms = None if best is None else ScoreForms(tokenizer, best)
        self._id = f"resp_{body.request_id}" if body.request_id else new_id("resp")
        self._created = int(time.time())
        self._told = _told(model, body, plan)
        self._events = Events()
        self._items = ComingItems(self._events)
        self._tokens: list[int] = []  # where thoughts are to be counted
        self._held: list[Any] = []  # log probabilities of tokens that have no text yet
        self._finish: str | None = None

    def complete(self, choices: list[Choice], usage: Usage) -> bytes:
        """The whole answer."""
        (choice,) = choices
        status = _status(choice.finish)
        counts = self._counts(usage, choice.tokens if any(choice.thoughts) else ())
        return _encode(self._response(status, self._output(choice, status), counts))

    def first(self, usage: Usage) -> bytes:
        """Events before the first token."""
        response = self._response(IN_PROGRESS, [])
        self._events.add("response.created", {"response": response})
        self._events.add("response.in_progress", {"response": response})
        return self._events.take()

    def event(self, delta: Delta, usage: Usage) -> bytes:
        """Those of a delta; none where it has nothing to tell."""
        if self._thinks:
            self._tokens += delta.tokens
        self._held += self._logprobs(delta.told)
        if delta.reasoning:
            self._items.think(delta.reasoning)
        calls = delta.calls
        while calls and self._items.is_coming(calls[0]):
            self._items.call(calls[0])
            calls = calls[1:]
        if delta.text:
            self._items.say(delta.text, self._held)
            self._held = []
        for part in calls:
            self._items.call(part)
        self._finish = delta.finish
        return self._events.take()

    def last(self, usage: Usage) -> bytes:
        """Events after the last token."""
        status = _status(self._finish)
        output = self._items.end(status)
        thought = any(item["type"] == "reasoning" for item in output)
        counts = self._counts(usage, self._tokens if thought else ())
        self._events.add(f"response.{status}", {"response": self._response(status, output, counts)})
        return self._events.take()

    def failed(self, error: Exception) -> bytes:
        """The last event, where it went wrong after the first."""
        _, body = body_of(error)
        message = msgspec.json.decode(body, type=ErrorBody).error.message
        response = self._response("failed", self._items.so_far())
        response["error"] = {"code": "server_error", "message": message}
        self._events.add("response.failed", {"response": response})
        return self._events.take()

    def _response(
        self, status: str, output: list[dict[str, Any]], counts: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == COMPLETED else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == INCOMPLETE else None,
            "output": output,
            "usage": counts,
            **self._told,
        }

    def _output(self, choice: Choice, status: str) -> list[dict[str, Any]]:
        """What was thought, said and called, in this order."""
        thought, calls = "".join(choice.thoughts), joined(choice.calls)
        output = [reasoning_item(new_id("rs"), thought, COMPLETED)] if thought else []
        if choice.text or not (thought or calls):
            logprobs = self._logprobs(choice.told)
            output.append(message_item(new_id("msg"), choice.text, COMPLETED, logprobs))
        output += [call_item(new_id("fc"), call, COMPLETED) for call in calls]
        output[-1]["status"] = status
        return output

    def _logprobs(self, told: Sequence[Told]) -> list[Any]:
        return [] if self._forms is None or not told else self._forms.chat(told)["content"]

    def _counts(self, usage: Usage, thinking: Sequence[int]) -> dict[str, Any]:
        """thinking: the tokens of an answer that begins with reasoning."""
        plain = usage.plain()
        return {
            "input_tokens": plain["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": usage.cached_tokens or 0},
            "output_tokens": plain["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": thought_tokens(self._tokenizer, thinking)},
            "total_tokens": plain["total_tokens"],
        }


def _status(finish: str | None) -> str:
    return INCOMPLETE if finish == "length" else COMPLETED


def _told(model: str, body: ResponsesBody, plan: Plan) -> dict[str, Any]:
    """What an answer repeats of its request. Encoded once: the events of a stream repeat it three times."""
    params = plan.params[0]
    reasoning = body.reasoning.effort if body.reasoning is not None else None
    told = {
        "model": model,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "reasoning": {"effort": reasoning, "summary": None},
        "text": {"format": (body.text and body.text.format) or {"type": "text"}},
        "tools": [tool for tool in body.tools or () if tool["type"] == "function"],
        "tool_choice": body.tool_choice or "auto",
        "metadata": body.metadata or {},
        "user": body.user,
        "prompt_cache_key": body.prompt_cache_key,
        "safety_identifier": body.safety_identifier,
        "service_tier": body.service_tier or "default",
        "truncation": "disabled",
        "background": False,
        "store": False,
        "previous_response_id": None,
    }
    return {name: msgspec.Raw(_encode(value)) for name, value in told.items()}
