"""Seconds of a step from the model's shape, the device file and the batch's additive features.

A step is priced kernel by kernel: linears, attention of prompts, attention of single positions, the head,
small kernels, collectives. On fewer units compute and memory slow down by the device's two measured
curves. Beside another phase, memory-bound time is stretched by what that phase asks of the bandwidth, and
neither bandwidth nor peak is ever handed out twice. docs/cost-model.md has the formulas and the fit.

Implements `core.ports.CostModel`. Standard library only: it runs a few times per simulated step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from semipd.core.errors import ConfigError
from semipd.core.types import Work
from semipd.execute import cost_operators as operators
from semipd.execute.cost_curves import Load, Numbers, Piece, Place, TokenCurve
from semipd.execute.cost_kernels import StepKernels, dtypes_of
from semipd.execute.device_file import DeviceFile
from semipd.model.spec import ModelSpec

_REMEMBERED = 512  # steps, and as many older ones: they are asked about again, on other units or in company


class _Pieces(NamedTuple):
    """Of a step: seconds of the host, bytes and FLOPs, where its parts lie on their curves (None: none)."""

    host: float
    moved: float = 0.0
    flops: float = 0.0
    tokens: Place | None = None
    sampled: Place | None = None
    prompts: Piece | None = None
    singles: Piece | None = None


class StepCost:
    """The cost of steps of one model on one device, or on `tensor_ranks * pipeline_stages` like it.

    dtype: of the weights (default: the checkpoint's). kv_dtype: of the KV cache. routing: how evenly the
    tables' tokens were spread over experts, where a device has more than one answer. With pipeline stages
    a batch is taken as that many equal microbatches in steady state. Raises ConfigError when the device
    has no kernel for what the model needs.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: DeviceFile,
        tensor_ranks: int = 1,
        pipeline_stages: int = 1,
        dtype: str | None = None,
        kv_dtype: str | None = None,
        routing: str = "balanced",
    ) -> None:
        self.spec, self.device = spec, device
        kernels = StepKernels(spec, device, tensor_ranks, pipeline_stages, dtype, kv_dtype, routing)
        self._microbatches = float(pipeline_stages)
        self._linears = TokenCurve(device, kernels.token_items())
        self._head = TokenCurve(device, kernels.head_items())
        self._prompts, self._singles = kernels.attention()
        self._recent: dict[Work, tuple[_Pieces, dict[int, Numbers]]] = {}  # loads by units
        self._older = self._recent  # those before them

    def seconds(self, work: Work, units: int, beside: Work | None = None, beside_units: int = 0) -> float:
        """Seconds of a step with `work` on `units`, all the while beside another one (or alone). Lanes
        whose units overlap get equal parts of what they share."""
        if beside is None:
            return self._recall(work, units)[0]
        total = self.device.units
        crowd = units + beside_units
        overlap = crowd > total
        if overlap:
            units = round(units * total / crowd)
            beside_units = round(beside_units * total / crowd)
        return self._together(self._recall(work, units), self._recall(beside, beside_units), overlap)

    def load(self, work: Work, units: int) -> Load:
        """What the step costs alone on `units` (at least one), and how sensitive it is."""
        return Load(*self._recall(work, units))

    def _recall(self, work: Work, units: int) -> Numbers:
        known = self._recent.get(work)
        if known is None:
            if len(self._recent) >= _REMEMBERED:
                self._older, self._recent = self._recent, {}
            known = self._recent[work] = self._older.get(work) or (self._pieces(work), {})
        pieces, loads = known
        load = loads.get(units)
        if load is None:
            load = loads[units] = self._load(pieces, max(units, 1))
        return load

    def parts(self, work: Work, units: int | None = None) -> dict[str, float]:
        """Seconds of a lone step by kind of kernel, for people. Sums to `seconds` up to interpolation."""
        units = self.device.units if units is None else max(units, 1)
        scale = 1.0 / self._microbatches
        result = self._linears.parts(max(work.tokens * scale, 1.0), units) if work.tokens else {}
        if work.sampled:
            result |= self._head.parts(max(work.sampled * scale, 1.0), units)
        prompts, singles = self._attention_pieces(work, scale)
        result["prompt attention"] = self._prompts.at(prompts, units)[0] if prompts else 0.0
        result["generation attention"] = self._singles.at(singles, units)[0] if singles else 0.0
        return result | {"host": self._host_seconds(work)}

    def _pieces(self, work: Work) -> _Pieces:
        """What of the work matters on any units."""
        host = self._host_seconds(work)
        if not work.tokens:
            return _Pieces(host)
        scale = 1.0 / self._microbatches
        tokens = self._linears.place(work.tokens * scale)
        sampled = self._head.place(work.sampled * scale) if work.sampled else None
        prompts, singles = self._attention_pieces(work, scale)
        _, _, moved, flops = tokens
        if sampled is not None:
            moved += sampled[2]
            flops += sampled[3]
        for piece, curve in ((prompts, self._prompts), (singles, self._singles)):
            if piece is not None:
                more_moved, more_flops = curve.traffic(piece)
                moved += more_moved
                flops += more_flops
        return _Pieces(host, moved, flops, tokens, sampled, prompts, singles)

    def _load(self, pieces: _Pieces, units: int) -> Numbers:
        host, moved, flops, tokens, sampled, prompts, singles = pieces
        if tokens is None:
            return host, 0.0, 0.0, 0.0, 0.0
        seconds, memory_slope, compute_slope = self._linears.at(tokens, units)
        seconds += host
        if sampled is not None:
            a, b, c = self._head.at(sampled, units)
            seconds += a
            memory_slope += b
            compute_slope += c
        if prompts is not None:
            a, b, c = self._prompts.at(prompts, units)
            seconds += a
            memory_slope += b
            compute_slope += c
        if singles is not None:
            a, b, c = self._singles.at(singles, units)
            seconds += a
            memory_slope += b
            compute_slope += c
        return seconds, memory_slope, compute_slope, moved, flops

    def _attention_pieces(self, work: Work, scale: float) -> tuple[Piece | None, Piece | None]:
        """(of prompt slices, of single positions). Work made without `decodes` is all singles when every
        sequence has one token, else all prompts."""
        decodes, read = work.decodes, work.decode_context
        if not decodes and work.tokens == work.sequences:
            decodes, read = work.tokens, work.context
        prompts = singles = None
        tokens = work.tokens - decodes
        if tokens > 0:
            pairs = work.square - (read - 0.5 * decodes)
            prompts = self._prompts.piece(
                tokens * scale, max(pairs, 0.5 * tokens) * scale, (work.context - read) * scale
            )
        if decodes:
            singles = self._singles.piece(decodes * scale, read * scale, read * scale)
        return prompts, singles

    def _host_seconds(self, work: Work) -> float:
        return self.device.step_seconds + self.device.sequence_seconds * work.sequences

    def _together(self, mine: Numbers, other: Numbers, overlap: bool) -> float:
        """Stretch memory-bound and compute-bound time by what two phases ask of one device."""
        device = self.device
        bandwidth, peak = device.ceiling_bandwidth, device.ceiling_flops
        seconds, memory_slope, compute_slope, moved, flops = mine
        other_seconds, other_memory, other_compute, other_moved, other_flops = other
        if seconds <= 0.0 or other_seconds <= 0.0:
            return seconds
        asked = other_moved / other_seconds
        near = 1.0 if overlap else min(1.0, asked / (device.contention_share * bandwidth))
        slow_memory, slow_compute = device.contention * near, 0.0
        rate = moved / seconds
        if rate + asked > bandwidth:
            slopes = memory_slope / seconds, other_memory / other_seconds
            slow_memory = max(slow_memory, _excess(rate, asked, *slopes, bandwidth))
        rate, asked = flops / seconds, other_flops / other_seconds
        if rate + asked > peak:
            slow_compute = _excess(
                rate, asked, compute_slope / seconds, other_compute / other_seconds, peak
            )
        return seconds + slow_memory * memory_slope + slow_compute * compute_slope


def _excess(mine: float, other: float, my_slope: float, other_slope: float, limit: float) -> float:
    """How much slower a shared resource must seem so that two rates, together above its limit, fit.

    Rate i falls to rate / (1 + g * slope); the result is the g at which they fall to the limit together."""
    my_slope, other_slope = max(my_slope, 0.05), max(other_slope, 0.05)
    square = limit * my_slope * other_slope
    linear = limit * (my_slope + other_slope) - mine * other_slope - other * my_slope
    return (math.sqrt(linear * linear + 4.0 * square * (mine + other - limit)) - linear) / (2.0 * square)


def kv_capacity(
    spec: ModelSpec,
    device: DeviceFile,
    devices: int = 1,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    share: float = 0.9,
) -> int:
    """Tokens of KV cache that fit beside the weights in `share` of the memory of so many devices.

    Raises ConfigError when the weights alone do not fit."""
    weights, cache = dtypes_of(spec, dtype, kv_dtype)
    left = device.memory_bytes * devices * share - spec.weight_bytes(operators.BYTES[weights])
    tokens = int(left // spec.kv_bytes_per_token(operators.BYTES[cache]))
    if tokens < 1:
        raise ConfigError(f"the weights do not fit {devices} x {device.name}; use more devices")
    return tokens
