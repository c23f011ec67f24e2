"""The loop: wait for results, apply them, admit, plan, submit.

A request's way:

    add ─> WAITING ──admit──> PREFILL ──first token──> DECODE ──stop──> FINISHED
              ^                  │                        │                ^
              └──────preempt─────┴────────────────────────┘    abort/error ┘

The planner thread alone runs this file. What is in flight is pinned: a request that ends while a step of
its runs keeps slot and blocks until `_apply` has seen its last step.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from semipd.core.errors import Refused
from semipd.core.keys import next_key
from semipd.core.live import Flight, Live
from semipd.core.ports import Clock, Executor, ExecutorLost, KVManager, Observer, Policy
from semipd.core.types import (
    NO_TOKEN,
    Batch,
    BlockAppend,
    BlockCopy,
    Event,
    Finished,
    FinishReason,
    Lane,
    Launched,
    Preempted,
    Request,
    Score,
    Scored,
    Slice,
    Split,
    Stage,
    Stepped,
    StepResult,
    Switched,
    Tokens,
    Work,
)

NOTHING_FOLLOWS = "no token can follow: what constrains the output leaves none, or became too complex"


class Engine:
    """Owns requests and KV blocks. `add` and `abort` may be called from any thread, the rest from one.

    kv: the manager of each lane; the same object for both when storage is unified.
    max_length: most tokens of one sequence, prompt and output together.
    """

    def __init__(
        self,
        executor: Executor,
        policy: Policy,
        kv: Mapping[Lane, KVManager],
        clock: Clock,
        *,
        max_sequences: int,
        max_length: int,
        observers: Iterable[Observer] = (),
    ) -> None:
        self.executor = executor
        self.kv = kv
        self.live = Live(max_sequences, executor.device.lanes)
        self.max_length = max_length
        self.dead: str | None = None
        self._policy = policy
        self.clock = clock
        self._observers = tuple(observers)
        self.block_size = kv[Lane.DECODE].block_size
        self._two_pools = kv[Lane.PREFILL] is not kv[Lane.DECODE]
        self._inbox: deque[Request | str] = deque()
        self._by_id: dict[str, Request] = {}
        self._steps = itertools.count(1)
        self._split: Split | None = None  # as asked for
        self._granted = Split({}, 0)

    # -- from any thread ---------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise `Refused` if the request could never be served."""
        prompt, output = len(request.prompt), request.max_tokens
        if prompt < 1:
            raise Refused("the prompt is empty", "prompt")
        if output < 1:
            raise Refused(f"max_tokens must be at least 1, not {output}", "max_tokens")
        if prompt + output > self.max_length:
            raise Refused(
                f"prompt ({prompt} tokens) and max_tokens ({output}) exceed the model's limit of "
                f"{self.max_length} tokens",
                "prompt" if prompt >= self.max_length else "max_tokens",
            )
        for manager in self.kv.values():
            capacity = manager.total * manager.block_size
            if prompt + output > capacity:
                raise Refused(
                    f"{prompt + output} tokens do not fit the KV pool of {capacity}", "max_tokens"
                )

    def add(self, request: Request) -> None:
        """Hand a request to the planner. Raises `Refused` at once when it can never be served."""
        self.check(request)
        self._inbox.append(request)
        self.executor.wake()

    def abort(self, request_id: str) -> None:
        """End the request with reason ABORT. Unknown or finished ids are ignored: an abort may lose a
        race with the last token."""
        self._inbox.append(request_id)
        self.executor.wake()

    # -- on the planner thread ---------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing to do: no request anywhere, no step in flight."""
        return not self._by_id and not self._inbox and not self.live.in_flight

    def step(self, until: float | None = None) -> None:
        """One turn of the loop. Blocks until something happens or the clock reads `until`. When the
        executor is lost, every live request ends with an error and `dead` says why."""
        if self.dead is not None:
            self._receive()
            return
        try:
            self._receive()
            self._launch()
            for result in self.executor.wait(until):
                self._apply(result)
        except ExecutorLost as lost:
            self._die(str(lost))

    def check_idle(self) -> None:
        """Assert that nothing leaked, once `idle`."""
        assert not len(self.live) and not self.live.by_slot, "a request or slot was lost"
        for manager in self.kv.values():
            assert manager.available == manager.total, "a block was lost"

    def _receive(self) -> None:
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Request):
                self._by_id[message.id] = message
                self.live.waiting.append(message)
                if self.dead is not None:
                    self._finish(message, FinishReason.ERROR, self.dead)
            elif (request := self._by_id.get(message)) is not None:
                self._finish(request, FinishReason.ABORT)

    def _launch(self) -> None:
        """Ask the policy until it has nothing more to launch."""
        live, device = self.live, self.executor.device
        while len(live):
            idle = live.lanes_with_room(device)
            if not idle:
                return
            plan = self._policy.plan(idle, live, self.kv, self.clock.now())
            preempted = self._tell_preemptions()
            if plan.split != self._split:
                self._split = plan.split
                self.executor.resize(plan.split)
                self._granted = self.executor.device.granted(plan.split)
                self._emit(Switched(self.clock.now(), self._granted))
            launched = False
            for lane, slices in plan.slices.items():
                if slices:
                    self._submit(lane, slices, self._granted)
                    launched = True
            if not launched:
                if live.in_flight:
                    return
                if not preempted:  # else the next plan sees what gave way
                    raise AssertionError("requests are live, nothing runs, and the policy launches nothing")

    def _submit(self, lane: Lane, slices: Sequence[Slice], split: Split) -> None:
        live, executor, now = self.live, self.executor, self.clock.now()
        while live.closed_slots:
            executor.close_slot(live.closed_slots.pop(0))
        requests = []
        appends = []
        copies: list[BlockCopy] = []
        for slot, start, count, _ in slices:
            request = live.by_slot[slot]
            sent = request.blocks_sent
            if not request.opened:
                executor.open(slot, request.tokens(), request.sampling)
                request.opened = True
                if request.started_at < 0:
                    request.started_at = now
                    request.cached_tokens = start
            if lane is Lane.TRANSFER:
                copies += self._copies(request, start)
            elif sent < len(request.blocks):
                appends.append(BlockAppend(slot, sent, tuple(request.blocks[sent:])))
                request.blocks_sent = len(request.blocks)
            request.planned = start + count
            request.in_flight += 1
            request.lane = lane
            requests.append(request)
        work = Work.of(slices)
        batch = Batch(next(self._steps), tuple(slices), tuple(appends), tuple(copies), work)
        live.flights[lane].append(Flight(batch, tuple(requests), work, split, now))
        executor.submit(lane, batch)
        self._emit(Launched(now, lane, batch, split, work))

    def _apply(self, result: StepResult) -> None:
        flight = self.live.land(result)
        self._emit(Stepped(result, flight.work, flight.split))
        now = self.clock.now()
        error, tokens, take = result.error, iter(result.tokens), self._take_token
        transfer, size = result.lane is Lane.TRANSFER, self.block_size
        failed = error is not None or NO_TOKEN in result.tokens
        got: list[Request] = []
        ids: list[int] = []
        ended: list[tuple[Request, FinishReason]] = []
        for request, (_, start, count, sample) in zip(flight.requests, flight.batch.slices, strict=True):
            request.in_flight -= 1
            token = next(tokens) if sample and error is None else None
            if request.stage is Stage.FINISHED:  # ended while this step ran: drop the result
                self._release(request)
            elif failed and (error is not None or token == NO_TOKEN):
                self._finish(request, FinishReason.ERROR, error or NOTHING_FOLLOWS)
            else:
                request.computed = computed = start + count
                if token is not None:
                    got.append(request)
                    ids.append(token)
                    if reason := take(request, token, now):
                        ended.append((request, reason))
                if transfer:
                    self._arrive(request)
                elif computed >= size * (request.published + 1):
                    self._publish(request)
        if result.scores:
            self._tell_scores(result, flight, now)
        if got:
            self._emit(Tokens(now, tuple(got), tuple(ids)))
        for request, reason in ended:
            self._finish(request, reason)

    def _take_token(self, request: Request, token: int, now: float) -> FinishReason | None:
        output = request.output
        output.append(token)
        if request.stage is Stage.PREFILL:
            self.live.move(request, Stage.TRANSFER if self._two_pools else Stage.DECODE)
        if request.first_token_at < 0:
            request.first_token_at = now
        request.last_token_at = now
        if token in request.stop_tokens and len(output) > request.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(output) >= request.max_tokens else None

    def _tell_scores(self, result: StepResult, flight: Flight, now: float) -> None:
        """Those of live requests, each position once: a preempted prompt is computed again."""
        requests: list[Request] = []
        scores: list[Score] = []
        for score in result.scores:
            request = flight.requests[score.row]
            if not request.finished and score.position >= request.scored:
                request.scored = score.position + 1
                requests.append(request)
                scores.append(score)
        if scores:
            self._emit(Scored(now, tuple(requests), tuple(scores)))

    def _publish(self, request: Request) -> None:
        """Offer newly computed full blocks, extending the key chain over produced tokens."""
        keys, size = request.block_keys, self.block_size
        full = request.computed // size
        if request.salt is not None and full > len(keys):
            tokens = request.tokens()
            while full > len(keys):
                previous = keys[-1] if keys else request.salt
                keys.append(next_key(previous, tokens[len(keys) * size : (len(keys) + 1) * size]))
        if request.pool is not None:
            request.pool.publish(request, request.computed)

    def _copies(self, request: Request, start: int) -> list[BlockCopy]:
        """Source and target of every block from position `start` on."""
        assert request.incoming is not None
        first = start // self.block_size
        pairs = zip(request.blocks[first:], request.incoming.blocks[first:], strict=True)
        return [BlockCopy(source, target) for source, target in pairs]

    def _arrive(self, request: Request) -> None:
        """The copy to the decode pool is complete: release the source, go on from the target."""
        twin = request.incoming
        assert twin is not None and request.pool is not None
        request.pool.release(request)
        request.pool, request.blocks, request.published = twin.pool, twin.blocks, twin.published
        request.blocks_sent, request.incoming = 0, None
        self.live.move(request, Stage.DECODE)
        self._publish(request)

    def _finish(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        self.live.move(request, Stage.FINISHED)
        request.finish_reason = reason
        request.error = error
        self._by_id.pop(request.id, None)
        self._release(request)
        self._emit(Finished(self.clock.now(), request))

    def _release(self, request: Request) -> None:
        if not request.in_flight:
            self.live.free(request)

    def _die(self, why: str) -> None:
        self.dead = why
        for flights in self.live.flights.values():
            for flight in flights:
                for request in flight.requests:
                    request.in_flight = 0
                    if request.finished:
                        self._release(request)
            flights.clear()
        self.live.closed_slots.clear()
        self._receive()
        for request in list(self._by_id.values()):
            self._finish(request, FinishReason.ERROR, why)

    def _tell_preemptions(self) -> bool:
        """Whether there were any."""
        preempted, self.live.preempted = self.live.preempted, []
        for request in preempted:
            self._emit(Preempted(self.clock.now(), request))
        return bool(preempted)

    def _emit(self, event: Event) -> None:
        for observer in self._observers:
            observer(event)
