"""Whole steps as measured on a device: seconds from a batch's additive features, nothing looked at inside.

`semipd profile` measures steps of one model and fits, for each number of units that it tried,

    seconds = step + sum over tokens of a price that falls in intervals  (linears: memory, then compute)
            + the same over sampled rows                                 (head)
            + a * cached positions read by single tokens + b * attended pairs of prompts
            + c * positions read by prompts + d * sequences

with all prices at least 0, so more work never takes less time. A step of nothing but single tokens that
are all sampled has prices of its own (step, tokens, cached positions): many executors run it in another
way than one that holds a piece of a prompt, as a captured graph or, on processors without tiles, in
compiled calls. Beside the other lane a step takes `slowdown` times as long. Another model than the
measured one is priced by the ratio of their shapes: rough, but `auto` corrects its model by what it
observes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from semipd.core.errors import ConfigError
from semipd.core.types import Work
from semipd.model.spec import ModelSpec

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)  # where the price of a token may change
ROWS = (1, 2, 8, 32)  # where the price of a sampled row may change
DECODES = (1, 2, 4, 8, 16, 32, 64)  # where the price of a sequence of a decode step may change
GENERAL = ("step", *(f"token_{n}" for n in TOKENS), "head", *(f"row_{n}" for n in ROWS),
           "single_context", "pair", "prompt_context", "sequence")  # fmt: skip
DECODE = ("decode_step", *(f"decode_{n}" for n in DECODES), "decode_context")
PRICES = (*GENERAL, *DECODE)
SHAPE = ("linear_flops", "head_flops", "linear_bytes", "head_bytes", "kv_bytes", "attention", "layers")
_MOST_ENTRIES = 4096


def shape_of(spec: ModelSpec, itemsize: int) -> dict[str, float]:
    """What a step's prices grow with: FLOPs per token and row, bytes of weights and of a cached position.

    itemsize: bytes of a weight and of a cached value."""
    return {
        "linear_flops": float(spec.linear_flops_per_token),
        "head_flops": float(spec.head_flops_per_row),
        "linear_bytes": 0.5 * itemsize * spec.linear_flops_per_token,
        "head_bytes": 0.5 * itemsize * spec.head_flops_per_row,
        "kv_bytes": float(spec.kv_bytes_per_token(itemsize)),
        "attention": float(spec.attention_flops(1, 1)),
        "layers": float(spec.layers),
    }


def is_decode(work: Work) -> bool:
    """Whether a step of this work is priced as a decode step: single tokens, all sampled."""
    return work.tokens == work.decodes == work.sampled


def features(work: Work) -> list[float]:
    """What the prices (in the order of `PRICES`) are multiplied with."""
    read = float(work.decode_context)
    if is_decode(work):
        return [*(0.0 for _ in GENERAL), 1.0, *_ramps(work.tokens, DECODES), read]
    found = [1.0, *_ramps(work.tokens, TOKENS), 1.0 if work.sampled else 0.0, *_ramps(work.sampled, ROWS)]
    pairs = max(work.square - (read - 0.5 * work.decodes), 0.0)
    found += [read, pairs, work.context - read, float(work.sequences)]
    return [*found, *(0.0 for _ in DECODE)]


def decode_prices(general: Mapping[str, float]) -> dict[str, float]:
    """The prices of decode steps that follow from the general ones."""
    found = {"decode_step": general["step"] + general["head"] + general["sequence"]}
    for knot in DECODES:
        row = max(other for other in ROWS if other <= knot)
        found[f"decode_{knot}"] = general[f"token_{knot}"] + general[f"row_{row}"] + general["sequence"]
    return found | {"decode_context": general["single_context"]}


def _ramps(count: int, knots: Sequence[int]) -> list[float]:
    """How many of `count` lie above each knot and below the next one."""
    ends = (*knots[1:], math.inf)
    return [float(max(min(count, end) - begin, 0)) for begin, end in zip(knots, ends, strict=True)]


@dataclass(frozen=True)
class Beside:
    """How many times as long a lane's steps take while the other lane runs.

    units, other_units: of this lane and of the other. prompt: whether this lane runs prompts."""

    units: int
    other_units: int
    prompt: bool
    slowdown: float


@dataclass(frozen=True)
class StepProfile:
    """Prices by number of units (rising; the last is the whole device), and slowdowns.

    shape: of the model that was measured, by the names in `SHAPE`."""

    model: str
    shape: Mapping[str, float]
    prices: Mapping[int, tuple[float, ...]]
    beside: tuple[Beside, ...] = ()

    def scaled(self, shape: Mapping[str, float]) -> StepProfile:
        """The same device running a model of another shape."""
        ratio = {name: shape[name] / self.shape[name] for name in SHAPE}
        scales = [
            ratio["linear_bytes"],
            *([ratio["linear_flops"]] * len(TOKENS)),
            ratio["head_bytes"],
            *([ratio["head_flops"]] * len(ROWS)),
            ratio["kv_bytes"],
            ratio["attention"],
            ratio["kv_bytes"],
            ratio["layers"],
            ratio["linear_bytes"],
            *([ratio["linear_flops"]] * len(DECODES)),
            ratio["kv_bytes"],
        ]
        return self._with_prices(scales, shape)

    def slower(self, factor: float) -> StepProfile:
        """Every time, times this."""
        return self._with_prices([factor] * len(PRICES), self.shape)

    def _with_prices(self, scales: Sequence[float], shape: Mapping[str, float]) -> StepProfile:
        prices = {
            units: tuple(price * scale for price, scale in zip(line, scales, strict=True))
            for units, line in self.prices.items()
        }
        return replace(self, prices=prices, shape=dict(shape))


class ProfiledCost:
    """Implements `core.ports.CostModel` with a profile of whole steps. Standard library only.

    step_seconds, sequence_seconds: the host's time per step and per sequence in it. units: of the device
    that is priced, when it has not as many as the measured one."""

    def __init__(
        self,
        profile: StepProfile,
        step_seconds: float = 0.0,
        sequence_seconds: float = 0.0,
        units: int | None = None,
    ) -> None:
        self._prices = sorted(profile.prices.items())
        self._beside = profile.beside
        self._host = step_seconds, sequence_seconds
        self._measured = self._prices[-1][0]
        self._units = units or self._measured
        self._slowdowns: dict[tuple[int, int, bool], float] = {}

    def seconds(self, work: Work, units: int, beside: Work | None = None, beside_units: int = 0) -> float:
        """Seconds of a step on `units`, all the while beside another one, or alone."""
        step, sequence = self._host
        seconds = self._alone(work, max(units, 1))
        if beside is not None:
            seconds *= self._slowdown(max(units, 1), max(beside_units, 1), work.tokens > work.decodes)
        return seconds + step + sequence * work.sequences

    def _alone(self, work: Work, units: int) -> float:
        """Between the measured numbers of units, straight in the logs; outside, as 1 / units."""
        row = features(work)
        below, above = self._prices[0], self._prices[-1]
        for entry in self._prices:
            if entry[0] <= units:
                below = entry
            if entry[0] >= units:
                above = entry
                break
        slow = _dot(below[1], row)
        if below[0] == above[0] or not below[0] < units < above[0]:
            return slow * below[0] / units
        fast = max(_dot(above[1], row), 1e-12)
        share = math.log(units / below[0]) / math.log(above[0] / below[0])
        return float(slow * (fast / max(slow, 1e-12)) ** share)

    def _slowdown(self, units: int, other: int, prompt: bool) -> float:
        """That of the measured pair of shares that is nearest in the logs."""
        key = (units, other, prompt)
        if key not in self._slowdowns:
            scale = self._units / self._measured

            def distance(entry: Beside) -> float:
                mine, theirs = entry.units * scale / units, entry.other_units * scale / other
                return abs(math.log(mine)) + abs(math.log(theirs))

            nearest = min((e for e in self._beside if e.prompt is prompt), key=distance, default=None)
            self._slowdowns[key] = nearest.slowdown if nearest else 1.0
        return self._slowdowns[key]


def _dot(prices: Sequence[float], row: Sequence[float]) -> float:
    return sum(map(float.__mul__, prices, row))


# In a device file


def write_profile(profile: StepProfile) -> dict[str, Any]:
    """As plain data; `read_profile` takes it back."""
    return {
        "model": profile.model,
        "shape": dict(profile.shape),
        "prices": {
            str(units): dict(zip(PRICES, line, strict=True)) for units, line in profile.prices.items()
        },
        "beside": [
            [entry.units, entry.other_units, "prompt" if entry.prompt else "decode", entry.slowdown]
            for entry in profile.beside
        ],
    }


def read_profile(value: Any, units: int, where: str) -> StepProfile:
    """Check a device file's `steps`. Raises ConfigError, one line that names the entry."""
    if not isinstance(value, dict) or set(value) - {"beside"} != {"model", "shape", "prices"}:
        raise ConfigError(f"{where}: not an object with model, shape, prices and beside")
    if not isinstance(value["model"], str):
        raise ConfigError(f"{where}: model is not text")
    shape = _numbers(value["shape"], SHAPE, f"{where}: shape", 1e-9, 1e18)
    lines = value["prices"]
    if not isinstance(lines, dict) or not lines or len(lines) > _MOST_ENTRIES:
        raise ConfigError(f"{where}: prices is not an object by number of units")
    prices = {}
    for key, line in lines.items():
        if not (key.isdecimal() and 1 <= int(key) <= units):
            raise ConfigError(f"{where}: prices: {key!r} is not a number of units from 1 to {units}")
        # Profiles of before decode steps had prices of their own lack those.
        names = PRICES if not isinstance(line, dict) or set(line) & set(DECODE) else GENERAL
        numbers = _numbers(line, names, f"{where}: prices of {key}", 0.0, 3600.0)
        if names is GENERAL:
            numbers |= decode_prices(numbers)
        if not any(numbers.values()):
            raise ConfigError(f"{where}: prices of {key}: all are 0")
        prices[int(key)] = tuple(numbers[name] for name in PRICES)
    if units not in prices:
        raise ConfigError(f"{where}: prices of {units} units, the whole device, are missing")
    pairs = value.get("beside", [])
    if not isinstance(pairs, list) or len(pairs) > _MOST_ENTRIES:
        raise ConfigError(f"{where}: beside is not a list")
    beside = tuple(_read_beside(entry, units, f"{where}: beside") for entry in pairs)
    return StepProfile(value["model"], shape, prices, beside)


def _numbers(value: Any, names: Sequence[str], where: str, low: float, high: float) -> dict[str, float]:
    if not isinstance(value, dict) or set(value) != set(names):
        wrong = sorted(set(names) ^ set(value)) if isinstance(value, dict) else []
        raise ConfigError(f"{where}: not one number for each name" + (f": {wrong[0]}" if wrong else ""))
    return {name: _number(value[name], f"{where}: {name}", low, high) for name in names}


def _number(value: Any, where: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f"{where}: {value!r} is not a number between {low:g} and {high:g}")
    return float(value)


def _read_beside(value: Any, units: int, where: str) -> Beside:
    if not isinstance(value, list) or len(value) != 4 or value[2] not in ("prompt", "decode"):
        raise ConfigError(f"{where}: {value!r} is not [units, other units, prompt or decode, slowdown]")
    mine, other = (int(_number(entry, where, 1, units)) for entry in value[:2])
    return Beside(mine, other, value[2] == "prompt", _number(value[3], where, 0.01, 1000.0))
