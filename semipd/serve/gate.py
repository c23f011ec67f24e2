"""How much may wait and how much is under way. Refuses before any work is done for a request."""

from __future__ import annotations

from dataclasses import dataclass

from semipd.config import ServerConfig
from semipd.core.errors import Overloaded, SemipdError

RETRY_SECONDS = 2


class Draining(SemipdError):
    """The server is about to end."""


@dataclass(frozen=True)
class Limits:
    """Bounds of the server. Sizes in bytes, times in seconds.

    queued_*: requests without a first token yet, and their prompt tokens. body: of one request;
    body_seconds: to receive it; bodies: of all requests that are not yet tokenised. headers: all header
    lines of one request; header_seconds: to receive them, on a new connection or after the first byte.
    connections: open at once; more are turned away. stall_seconds: how long a client may take nothing of
    its answer. drain: how long SIGTERM waits for what is under way.
    """

    queued_requests: int = 1024
    queued_tokens: int = 2**20
    body: int = 16 * 2**20
    body_seconds: float = 60.0
    bodies: int = 256 * 2**20
    headers: int = 64 * 2**10
    header_seconds: float = 30.0
    connections: int = 2**15
    stall_seconds: float = 60.0
    drain: float = 30.0
    request_timeout: float = 24 * 3600.0

    @staticmethod
    def of(server: ServerConfig) -> Limits:
        """Those that are settings as set, the others at their defaults."""
        return Limits(
            queued_requests=server.max_queued_requests,
            queued_tokens=server.max_queued_tokens,
            drain=server.shutdown_timeout,
        )


class Gate:
    """Counts what waits for its first token, and what is under way. On the event loop only."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.draining = False
        self.active = 0  # tickets out
        self.queued_requests = 0
        self.queued_tokens = 0
        self.body_bytes = 0

    def check_open(self) -> None:
        """Raise Draining if nothing new is welcome."""
        if self.draining:
            raise Draining("the server is shutting down")

    def admit(self) -> Ticket:
        """Let one HTTP request in. Raises Overloaded, or Draining. Use the ticket in a `with` block."""
        self.check_open()
        limits = self.limits
        if self.queued_requests >= limits.queued_requests:
            raise Overloaded(f"{self.queued_requests} requests wait already")
        if self.queued_tokens >= limits.queued_tokens:
            raise Overloaded(f"{self.queued_tokens} prompt tokens wait already")
        return Ticket(self)


class Ticket:
    """One HTTP request's place. It counts as one queued request until `hold` says what it is."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._waiting: dict[int, int] = {-1: 0}  # prompt tokens of each sequence without a first token
        self._body_bytes = 0
        gate.active += 1
        gate.queued_requests += 1

    def receive(self, count: int) -> None:
        """That many bytes of its body have come. Raises Overloaded."""
        self._body_bytes += count
        self._gate.body_bytes += count
        if self._gate.body_bytes > self._gate.limits.bodies:
            raise Overloaded("too many bytes of requests wait already")

    def hold(self, prompt_tokens: list[int]) -> None:
        """The request is these sequences; its body is history."""
        self._forget_body()
        self.started(-1)
        self._waiting = dict(enumerate(prompt_tokens))
        self._gate.queued_requests += len(prompt_tokens)
        self._gate.queued_tokens += sum(prompt_tokens)

    def started(self, sequence: int) -> None:
        """It has its first token. Repeated calls do nothing."""
        tokens = self._waiting.pop(sequence, None)
        if tokens is not None:
            self._gate.queued_requests -= 1
            self._gate.queued_tokens -= tokens

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        for sequence in list(self._waiting):
            self.started(sequence)
        self._forget_body()
        self._gate.active -= 1

    def _forget_body(self) -> None:
        self._gate.body_bytes -= self._body_bytes
        self._body_bytes = 0
