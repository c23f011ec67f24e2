"""An engine on the fake executor, with every check that a test would want switched on."""

from __future__ import annotations

from dataclasses import dataclass, field

from semipd.core.admission import Admission, Aggressive
from semipd.core.auto import Auto
from semipd.core.deadline import ByDeadline
from semipd.core.engine import Engine
from semipd.core.keys import ROOT, block_keys
from semipd.core.kv import BlockPool
from semipd.core.order import PromptOrder, PromptWork
from semipd.core.partition import Shared, Static, Targets
from semipd.core.policies import Chunked, Disaggregated, Limits, PrefillFirst, SemiPD
from semipd.core.ports import Policy
from semipd.core.types import Constraint, Event, Finished, Lane, Request, Sampling, Split, Tokens
from semipd.execute.sim import FixedCost
from tests.execute.fake import FakeExecutor, continuation, fake_device

POLICIES = (
    "static",
    "shared",
    "prefill-first",
    "chunked-3",
    "chunked-16",
    "chunked-long",
    "chunked-shortest",
    "chunked-deadline",
    "disaggregated",
    "auto",
)


def make_policy(name: str, units: int = 2, admission: Admission | None = None) -> Policy:
    work = PromptWork(FixedCost(units), units)
    targets = {"default": Targets(0.05, 0.005)}
    order: PromptOrder | None = work.shortest if name == "chunked-shortest" else None
    if name in ("auto", "chunked-deadline"):
        order = ByDeadline(work, targets, 16)
    limits = Limits(units, 16, batch=8, admission=admission or Aggressive(), order=order)
    match name:
        case "static":
            return SemiPD(limits, Static(1, units - 1, units))
        case "shared":
            return SemiPD(limits, Shared(units))
        case "prefill-first":
            return PrefillFirst(limits)
        case "auto":
            return Auto(limits, fake_device(units=units), FixedCost(units), targets, work, (3, 8, 16))
        case "disaggregated":
            return Disaggregated(limits, Split.pair(1, units - 1, units))
        case "chunked-long":
            return Chunked(limits, 16, long_prompt=4)
        case "chunked-shortest" | "chunked-deadline":
            return Chunked(limits, 16)
        case _:
            return Chunked(limits, int(name.partition("-")[2]))


def make_request(
    name: str,
    prompt: list[int],
    max_tokens: int,
    *,
    arrival: float = 0.0,
    seed: int = 0,
    stop: tuple[int, ...] = (),
    min_tokens: int = 0,
    block_size: int = 4,
    constraint: Constraint | None = None,
) -> Request:
    return Request(
        name,
        prompt,
        max_tokens,
        Sampling(seed=seed, constraint=constraint),
        frozenset(stop),
        min_tokens,
        arrival,
        block_keys(prompt, block_size),
        salt=ROOT,
    )


@dataclass
class Bench:
    """An engine on a fake with `blocks` blocks of 4 tokens."""

    policy: str = "static"
    blocks: int = 64
    depth: int = 2
    max_sequences: int = 8
    admission: Admission | None = None
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.executor = FakeExecutor(self.blocks, depth=self.depth)
        if self.policy == "disaggregated":  # each side gets a pool of its own, as large
            self.executor = FakeExecutor(2 * self.blocks, depth=self.depth)
            self.pools = [BlockPool(self.blocks, 4), BlockPool(self.blocks, 4, first=self.blocks)]
        else:
            self.pools = [BlockPool(self.blocks, 4)]
        policy = make_policy(self.policy, admission=self.admission)
        self.engine = Engine(
            self.executor,
            policy,
            {Lane.PREFILL: self.pools[0], Lane.DECODE: self.pools[-1]},
            self.executor.clock,
            max_sequences=self.max_sequences,
            max_length=1000,
            observers=[self.events.append, *([policy] if callable(policy) else [])],
        )

    def run(self, steps: int = 5000) -> None:
        """Until idle; the pool is checked after every step."""
        for _ in range(steps):
            if self.engine.idle:
                break
            self.engine.step(self.executor.clock.now() + 1.0)
            self.check()
        assert self.engine.idle, "the engine did not finish"
        self.engine.check_idle()

    def check(self) -> None:
        for pool in self.pools:
            pool.check()

    def outputs(self) -> dict[str, list[int]]:
        """Tokens by request, as the events told them."""
        told: dict[str, list[int]] = {}
        for event in self.events:
            if isinstance(event, Tokens):
                for request, token in zip(event.requests, event.tokens, strict=True):
                    told.setdefault(request.id, []).append(token)
        return told

    def finished(self) -> dict[str, Request]:
        return {event.request.id: event.request for event in self.events if isinstance(event, Finished)}


def expected(request: Request) -> list[int]:
    """What the request must produce, whatever happens around it."""
    tokens = continuation(request.prompt, request.max_tokens, request.sampling.seed)
    for index, token in enumerate(tokens):
        if token in request.stop_tokens and index >= request.min_tokens:
            return tokens[: index + 1]
    return tokens
