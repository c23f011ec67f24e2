"""The fixed policies: what each idle lane runs next. `core.batching` holds the steps they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from semipd.core.admission import Admission, Aggressive
from semipd.core.batching import decode_slices, first_waiting, prefill_slices, transfer_slices
from semipd.core.live import Live
from semipd.core.order import Order, PromptOrder
from semipd.core.partition import Window, WindowCollector
from semipd.core.ports import Controller, KVManager, Observer, Policy
from semipd.core.types import Event, Lane, Plan, Slice, Split

PREFILL_TOKENS = 2048


@dataclass(frozen=True)
class Limits:
    """Bounds of one step, shared by all policies.

    prefill_tokens: most prompt tokens in one prefill step. batch: most sequences in one decode step.
    order: of the prompts; None: as they come.
    """

    units: int
    prefill_tokens: int = PREFILL_TOKENS
    batch: int = 256
    admission: Admission = field(default_factory=Aggressive)
    order: PromptOrder | None = None

    def order_at(self, live: Live, now: float) -> Order | None:
        """Of the prompts that are here."""
        return self.order([*live.prefilling, *live.waiting], now) if self.order is not None else None


def observers_of(policy: Policy) -> list[Observer]:
    """The parts of a policy that learn from events: the policy itself and its admission, where they do."""
    limits: Limits | None = getattr(policy, "limits", None)
    parts: list[object] = [policy, limits.admission if limits is not None else None]
    return [part for part in parts if callable(part)]


class SemiPD:
    """Prefill and decode run at the same time, each on its share; a lone phase has the whole device.

    Decode plans ahead up to the device's depth. Prefill does not: its steps are long enough to hide the
    planner, and a prompt that arrives meanwhile should not find the next step taken.
    """

    def __init__(self, limits: Limits, controller: Controller) -> None:
        self.limits = limits
        self._controller = controller
        self._windows = WindowCollector()
        self._split = controller.split(Window(), Split.lone(Lane.DECODE, limits.units))

    def __call__(self, event: Event) -> None:
        """Observe: the controller decides from windows of what happened."""
        self._windows.add(event)

    def plan(self, idle: frozenset[Lane], live: Live, kv: Mapping[Lane, KVManager], now: float) -> Plan:
        limits = self.limits
        if (window := self._windows.close(self._split, now)) is not None:
            self._split = self._controller.split(window, self._split)
        slices: dict[Lane, Sequence[Slice]] = {}
        if Lane.DECODE in idle and live.decoding:
            slices[Lane.DECODE] = decode_slices(live, kv[Lane.DECODE], limits.batch)
        if Lane.PREFILL in idle and not live.busy(Lane.PREFILL):
            slices[Lane.PREFILL] = prefill_slices(
                live,
                kv[Lane.PREFILL],
                Lane.PREFILL,
                limits.prefill_tokens,
                limits.admission,
                order=limits.order_at(live, now),
            )
        prefill = bool(slices.get(Lane.PREFILL)) or live.busy(Lane.PREFILL)
        decode = bool(slices.get(Lane.DECODE)) or live.busy(Lane.DECODE)
        return Plan(self._share(prefill, decode), slices)

    def _share(self, prefill: bool, decode: bool) -> Split:
        if prefill and decode:
            return self._split
        return Split.lone(Lane.PREFILL if prefill else Lane.DECODE, self.limits.units)


class PrefillFirst:
    """One phase at a time on the whole device, prompts before tokens: the classic unified engine."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def plan(self, idle: frozenset[Lane], live: Live, kv: Mapping[Lane, KVManager], now: float) -> Plan:
        limits = self.limits
        if live.busy(Lane.PREFILL):
            return Plan(Split.lone(Lane.PREFILL, limits.units), {})
        if live.prefilling or (live.waiting and live.has_free_slot):
            order = limits.order_at(live, now)
            if live.busy(Lane.DECODE):
                # Let decode drain, unless the prompt could not enter anyway.
                pool = kv[Lane.PREFILL]
                if live.prefilling or limits.admission.may_enter(first_waiting(live, order), live, pool):
                    return Plan(Split.lone(Lane.DECODE, limits.units), {})
            else:
                prompts = prefill_slices(
                    live,
                    kv[Lane.PREFILL],
                    Lane.PREFILL,
                    limits.prefill_tokens,
                    limits.admission,
                    order=order,
                )
                if prompts:
                    return Plan(Split.lone(Lane.PREFILL, limits.units), {Lane.PREFILL: prompts})
        split = Split.lone(Lane.DECODE, limits.units)
        if Lane.DECODE not in idle:
            return Plan(split, {})
        return Plan(split, {Lane.DECODE: decode_slices(live, kv[Lane.DECODE], limits.batch)})


class Chunked:
    """Mixed batches on the whole device: every decode first, then prompt chunks up to the token budget
    (Sarathi-Serve). `long_prompt`: at most this many tokens of one prompt in a step (0: no limit)."""

    def __init__(self, limits: Limits, chunk_tokens: int, long_prompt: int = 0) -> None:
        self.limits = limits
        self._chunk_tokens = chunk_tokens
        self._long_prompt = long_prompt

    def plan(self, idle: frozenset[Lane], live: Live, kv: Mapping[Lane, KVManager], now: float) -> Plan:
        limits = self.limits
        split = Split.lone(Lane.DECODE, limits.units)
        if Lane.DECODE not in idle:
            return Plan(split, {})
        slices = decode_slices(live, kv[Lane.DECODE], limits.batch)
        slices += prefill_slices(
            live,
            kv[Lane.DECODE],
            Lane.DECODE,
            self._chunk_tokens - len(slices),
            limits.admission,
            longest=self._long_prompt,
            order=limits.order_at(live, now),
        )
        return Plan(split, {Lane.DECODE: slices})


class Disaggregated:
    """The baseline that semi-PD replaces: two devices (or two halves of one) with a KV pool each, and every
    prompt's KV copied from one to the other. `split` is what each side owns, always."""

    def __init__(self, limits: Limits, split: Split) -> None:
        self.limits, self._split = limits, split

    def plan(self, idle: frozenset[Lane], live: Live, kv: Mapping[Lane, KVManager], now: float) -> Plan:
        limits = self.limits
        slices: dict[Lane, Sequence[Slice]] = {}
        if Lane.DECODE in idle and live.decoding:
            slices[Lane.DECODE] = decode_slices(live, kv[Lane.DECODE], limits.batch)
        if Lane.TRANSFER in idle and live.transferring:
            slices[Lane.TRANSFER] = transfer_slices(live, kv[Lane.DECODE])
        if Lane.PREFILL in idle and not live.busy(Lane.PREFILL):
            slices[Lane.PREFILL] = prefill_slices(
                live,
                kv[Lane.PREFILL],
                Lane.PREFILL,
                limits.prefill_tokens,
                limits.admission,
                order=limits.order_at(live, now),
            )
        return Plan(self._split, slices)
