"""The plain data that every room speaks: requests, batches, results, splits, events.

Nothing here does work. Only `Request` is mutable, and only the planner (`core.engine`) writes it.

Positions count tokens of one sequence from 0. "Computing position p" means: read the token at p,
write the keys and values of p into the KV cache, and (when sampled) write the token of p + 1.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from semipd.core.sampling import NO_TOKEN as NO_TOKEN
from semipd.core.sampling import Constraint as Constraint
from semipd.core.sampling import Sampling as Sampling
from semipd.core.sampling import Score as Score

if TYPE_CHECKING:
    from semipd.core.ports import KVManager


class Lane(enum.Enum):
    """Where batches of one kind run: one after another within a lane, at the same time across lanes."""

    PREFILL = "prefill"
    DECODE = "decode"
    TRANSFER = "transfer"

    # Members are singletons, so identity is a sound and much faster hash than Enum's own.
    __hash__ = object.__hash__


class Stage(enum.Enum):
    """What a request waits for. See the drawing in `core.engine`."""

    WAITING = "waiting"
    PREFILL = "prefill"
    TRANSFER = "transfer"
    DECODE = "decode"
    FINISHED = "finished"

    __hash__ = object.__hash__


class FinishReason(enum.Enum):
    """Why a request ended. `STOP` and `LENGTH` are successes, `ABORT` and `ERROR` are not."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"

    __hash__ = object.__hash__


@dataclass(slots=True, eq=False)
class Request:
    """One sequence from arrival to its last token. Owned and written by the planner alone.

    prompt: token ids. A simulated prompt may be any sequence with a length, such as a `range`.
    stop_tokens: ids that end the sequence (end-of-sequence ids included, unless ignored).
    block_keys: one key per full block of known tokens, chained, so equal keys mean equal prefixes;
        made by the front end or read from a trace; `core.keys` extends them over produced tokens.
    salt: the root of the key chain; None keeps produced tokens out of the prefix cache.
    """

    id: str
    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()
    min_tokens: int = 0
    arrival: float = 0.0
    block_keys: list[bytes] = field(default_factory=list)
    service_class: str = "default"
    salt: bytes | None = None

    stage: Stage = Stage.WAITING
    slot: int = -1
    opened: bool = False  # whether the executor knows the slot
    pool: KVManager | None = None  # whose `blocks` are
    blocks: list[int] = field(default_factory=list)
    blocks_sent: int = 0  # how many of `blocks` the executor has been told of
    incoming: Request | None = None  # a twin that holds the blocks this one is being copied to
    planned: int = 0  # positions whose computation was submitted
    computed: int = 0  # positions whose computation was applied
    published: int = 0  # blocks offered to the prefix index
    scored: int = 0  # positions below this one have had their `Score`, where asked for
    in_flight: int = 0  # steps submitted and not applied; above 0 the request is pinned
    lane: Lane | None = None  # where its steps in flight run
    output: list[int] = field(default_factory=list)
    error: str | None = None
    cached_tokens: int = 0  # prompt positions found in the prefix cache at the first admission
    preemptions: int = 0
    started_at: float = -1.0  # first prefill launch
    first_token_at: float = -1.0
    last_token_at: float = -1.0
    finish_reason: FinishReason | None = None
    end: int = field(init=False)  # positions that will be computed: of all tokens but the last

    def __post_init__(self) -> None:
        self.end = len(self.prompt) + self.max_tokens - 1

    @property
    def known(self) -> int:
        """Tokens the host knows: prompt plus applied output."""
        return len(self.prompt) + len(self.output)

    def tokens(self) -> Sequence[int]:
        """All known token ids, in order."""
        return [*self.prompt, *self.output] if self.output else self.prompt

    @property
    def finished(self) -> bool:
        return self.stage is Stage.FINISHED


class Slice(NamedTuple):
    """Compute positions `start .. start + count - 1` of one slot; `sample`: then choose the next token."""

    slot: int
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody counts with
    sample: bool = True


class BlockAppend(NamedTuple):
    """The slot's block table from entry `first` on becomes `blocks`. Entries already there never change
    while a step that reads them is in flight."""

    slot: int
    first: int
    blocks: tuple[int, ...]


class BlockCopy(NamedTuple):
    """Copy one KV block, all layers, from one pool to another (the disaggregated baseline)."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One step of one lane. Prefill, decode, chunked and mixed batches differ only in the counts.

    step: unique and rising. A slot occurs at most once. Running a batch twice gives the same tokens.
    work: the features of the slices, worked out once by whoever makes the batch.
    """

    step: int
    slices: tuple[Slice, ...]
    appends: tuple[BlockAppend, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    work: Work | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What became of one batch.

    tokens: one id for every slice with `sample`, in the batch's order; empty when `error` is set. NO_TOKEN
    where the slot's `Constraint` leaves none: that request cannot go on.
    scores: of the tokens, and of prompt tokens, whose slots ask for them; positions of one slice rise.
    started, finished: seconds on the executor's clock (the same one that `Clock` reads).
    attempts: how often the batch was started; above 1 when a worker died under it.
    """

    lane: Lane
    step: int
    tokens: tuple[int, ...]
    started: float
    finished: float
    error: str | None = None
    attempts: int = 1
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True, slots=True)
class Split:
    """Units per lane. A sum above `total` means that the lanes overlap on purpose ("shared")."""

    units: Mapping[Lane, int]
    total: int

    def __post_init__(self) -> None:
        for lane, count in self.units.items():
            if not 0 <= count <= self.total:
                raise ValueError(f"{count} units for {lane.value} on a device of {self.total}")

    def of(self, lane: Lane) -> int:
        return self.units.get(lane, 0)

    @staticmethod
    @functools.cache  # made for every plan, of few kinds
    def pair(prefill: int, decode: int, total: int) -> Split:
        return Split({Lane.PREFILL: prefill, Lane.DECODE: decode}, total)

    @staticmethod
    @functools.cache
    def lone(lane: Lane, total: int) -> Split:
        """The whole device for one lane: what a phase gets when the other has nothing to do."""
        return Split({Lane.PREFILL: 0, Lane.DECODE: 0, lane: total}, total)

    def __str__(self) -> str:
        return f"{self.of(Lane.PREFILL)}:{self.of(Lane.DECODE)}/{self.total}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to launch now. A lane without slices is left as it is: it drains, or stays idle.

    The planner turns slices into a `Batch` (step number, block tables); policies only choose.
    A mixed batch is one list of DECODE slices under `Split.lone(DECODE)`.
    """

    split: Split
    slices: Mapping[Lane, Sequence[Slice]]


@dataclass(frozen=True, slots=True)
class Device:
    """What a policy may know about an executor's device.

    units: cores or SMs. legal_splits: (prefill, decode) pairs with both above 0, disjoint.
    depth: steps that may be in flight on one lane. switch_seconds: cost of changing the split.
    only_legal: a split that is none of `legal_splits` becomes another one, see `granted`.
    constrained_depth: the same of the decode lane while a live request has a `Constraint`: 1 where the host
    works out what may come, and must have seen the token before.
    """

    name: str
    units: int
    unit_kind: str
    legal_splits: tuple[tuple[int, int], ...]
    depth: int
    switch_seconds: float = 0.0
    lanes: frozenset[Lane] = frozenset((Lane.PREFILL, Lane.DECODE))
    constrained_depth: int = 1
    only_legal: bool = False

    def granted(self, split: Split) -> Split:
        """The units that lanes get when this split is asked for: where only legal ones exist, the one with
        the nearest share of decode; everything for a lone phase, and for both where they overlap."""
        prefill, decode = split.of(Lane.PREFILL), split.of(Lane.DECODE)
        if not self.only_legal or (prefill, decode) in self.legal_splits:
            return split
        if not prefill or not decode:
            return Split.lone(Lane.PREFILL if prefill else Lane.DECODE, self.units)
        if not self.legal_splits or prefill + decode > split.total:
            return Split.pair(self.units, self.units, self.units)
        wanted = decode * self.units / split.total  # a split made for another device means shares of it
        return Split.pair(*min(self.legal_splits, key=lambda pair: abs(pair[1] - wanted)), self.units)


class Work(NamedTuple):
    """Additive features of a batch, from which a cost model predicts its time.

    tokens: positions computed. context: sum over slices of the KV length read by it. square: sum over
    slices of count * (start + count / 2), the attended pairs. sequences: slices. sampled: logit rows.
    decodes: slices of one position; decode_context: their part of `context`. Attention runs other kernels
    for these, so a mixed batch cannot be priced without them. Caches of prices have it as their key.
    """

    tokens: int = 0
    context: int = 0
    square: float = 0.0
    sequences: int = 0
    sampled: int = 0
    decodes: int = 0
    decode_context: int = 0

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(
            self.tokens + other.tokens,
            self.context + other.context,
            self.square + other.square,
            self.sequences + other.sequences,
            self.sampled + other.sampled,
            self.decodes + other.decodes,
            self.decode_context + other.decode_context,
        )

    @staticmethod
    def decode(sequences: int, context: int) -> Work:
        """The features of a decode step: one position of each sequence, `context` cached in all."""
        read = context + sequences
        return Work(
            sequences, read, float(context) + 0.5 * sequences, sequences, sequences, sequences, read
        )

    @staticmethod
    def of(slices: Sequence[Slice]) -> Work:
        """The features of a batch made of these slices."""
        tokens = context = sampled = decodes = cached = 0
        square = 0.0
        for _, start, count, sample in slices:
            if count == 1:  # most slices of most batches: this runs for every token of a simulation
                decodes += 1
                cached += start
            else:
                tokens += count
                context += start + count
                square += count * (start + 0.5 * count)
            sampled += sample
        read = cached + decodes
        return Work(
            tokens + decodes,
            context + read,
            square + cached + 0.5 * decodes,
            len(slices),
            sampled,
            decodes,
            read,
        )


# Events: what the planner tells the outside, at most one object per step and direction.


@dataclass(frozen=True, slots=True)
class Tokens:
    """A step was applied: `requests[i]` got `tokens[i]`, all at time `now`."""

    now: float
    requests: tuple[Request, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """`scores[i]` belongs to `requests[i]`; positions of one request rise, and none comes twice. Those of
    produced tokens come right before their `Tokens`."""

    now: float
    requests: tuple[Request, ...]
    scores: tuple[Score, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """A request left the engine; `request.finish_reason` and `request.error` say how."""

    now: float
    request: Request


@dataclass(frozen=True, slots=True)
class Launched:
    """A batch was submitted to a lane under a split."""

    now: float
    lane: Lane
    batch: Batch
    split: Split
    work: Work


@dataclass(frozen=True, slots=True)
class Stepped:
    """A batch came back."""

    result: StepResult
    work: Work
    split: Split  # at its launch


@dataclass(frozen=True, slots=True)
class Switched:
    """The split changed."""

    now: float
    split: Split


@dataclass(frozen=True, slots=True)
class Preempted:
    """A request gave its blocks back and waits to be recomputed."""

    now: float
    request: Request


Event = Tokens | Scored | Finished | Launched | Stepped | Switched | Preempted
