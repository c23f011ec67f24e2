"""What arrives, when and how long: seeded generators that yield one `Arrival` at a time.

Times and lengths come from separate streams of the seed, and times are drawn in units of the mean gap.
So two runs that differ only in the rate see the same requests in the same order (common random numbers).
Draws are made in chunks of fixed size: memory stays flat, and the sequence does not depend on how much of
it is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from semipd.core.errors import ConfigError
from semipd.trace import Arrival
from semipd.units import parse_seconds

MAX_RATE = 1e6
CHUNK = 1024

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


def prefix_keys(arrival: Arrival, block_size: int) -> list[bytes]:
    """Keys for an engine's own block size, as far as the trace tells: 12 bytes per full block.

    A trace's id names everything up to the end of its block, so (id of the trace block that holds the
    last token of an engine block, index of the engine block) names that engine block's whole prefix.
    """
    known = min(arrival.prompt_tokens, len(arrival.keys) * arrival.block_size)
    return [
        (arrival.keys[(end - 1) // arrival.block_size] % 2**64).to_bytes(8, "little")
        + end.to_bytes(4, "little")
        for end in range(block_size, known + 1, block_size)
    ]


# Arrival times


class Times(Protocol):
    """A point process. `gaps` draws in units of the mean gap; `clock` maps their running sum to seconds."""

    def gaps(self, generator: np.random.Generator, count: int) -> Floats: ...
    def clock(self, elapsed: Floats) -> Floats: ...


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent arrivals, `rate` per second; an infinite rate means all at once."""

    rate: float

    def __post_init__(self) -> None:
        _check_rate(self.rate, infinite=True)

    def gaps(self, generator: np.random.Generator, count: int) -> Floats:
        return generator.standard_exponential(count)

    def clock(self, elapsed: Floats) -> Floats:
        return elapsed / self.rate


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gamma-distributed gaps with coefficient of variation `cv`: above 1 bursty, below 1 regular."""

    rate: float
    cv: float

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        if not 0.01 <= self.cv <= 100:
            raise ConfigError(f"a coefficient of variation of {self.cv:g} is not between 0.01 and 100")

    def gaps(self, generator: np.random.Generator, count: int) -> Floats:
        shape = self.cv**-2
        return generator.standard_gamma(shape, count) / shape

    def clock(self, elapsed: Floats) -> Floats:
        return elapsed / self.rate


@dataclass(frozen=True, slots=True)
class OnOff:
    """Poisson arrivals whose rate alternates, starting with an "on" period.

    rate: mean over a whole cycle, per second. quiet: rate while off as a share of the rate while on.
    """

    rate: float
    on_seconds: float
    off_seconds: float
    quiet: float = 0.0

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        for seconds in (self.on_seconds, self.off_seconds):
            if not 1e-3 <= seconds <= 1e6:
                raise ConfigError(f"an on or off period of {seconds:g} s is not between 0.001 and 1e6")
        if not 0 <= self.quiet <= 1:
            raise ConfigError(f"a quiet share of {self.quiet:g} is not between 0 and 1")

    def gaps(self, generator: np.random.Generator, count: int) -> Floats:
        return generator.standard_exponential(count)

    def clock(self, elapsed: Floats) -> Floats:
        period = self.on_seconds + self.off_seconds
        on_rate = self.rate * period / (self.on_seconds + self.quiet * self.off_seconds)
        cycles, rest = np.divmod(elapsed, self.rate * period)
        on_arrivals = on_rate * self.on_seconds
        off_rate = max(on_rate * self.quiet, 1e-300)
        late = self.on_seconds + (rest - on_arrivals) / off_rate
        return cycles * period + np.where(rest <= on_arrivals, rest / on_rate, late)


def _check_rate(rate: float, infinite: bool = False) -> None:
    if not (1e-6 <= rate <= MAX_RATE or (infinite and rate == math.inf)):
        raise ConfigError(f"a rate of {rate:g} per second is not between 1e-6 and {MAX_RATE:g}")


def parse_rate(text: str | float) -> float:
    """Requests per second: a number, or "inf" for all at once. Raises ConfigError."""
    try:
        rate = float(text)
    except (TypeError, ValueError):
        raise ConfigError(f"{text!r} is not a rate; write 2.5 (requests per second) or inf") from None
    _check_rate(rate, infinite=True)
    return rate


def parse_times(text: str, rate: float) -> Times:
    """An arrival process of mean `rate`: "poisson", "gamma:CV" or "onoff:ON,OFF" (two times).

    Raises ConfigError."""
    name, _, rest = text.partition(":")
    match name, rest.split(",") if rest else []:
        case "poisson", []:
            return Poisson(rate)
        case "gamma", [cv]:
            return Gamma(rate, _number(cv, "a coefficient of variation"))
        case "onoff", [on_time, off_time]:
            return OnOff(rate, parse_seconds(on_time), parse_seconds(off_time))
        case _:
            raise ConfigError(f"{text!r} is no arrival process; write poisson, gamma:CV or onoff:ON,OFF")


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not {what}") from None


# The stream of arrivals


class Lengths(Protocol):
    """A joint distribution of (prompt tokens, output tokens). See `semipd.bench.lengths`."""

    def draw(self, generator: np.random.Generator, first: int, count: int) -> tuple[Counts, Counts]:
        """Lengths of the arrivals number `first` to `first + count - 1`, each at least 1."""
        ...


def generate(
    times: Times,
    lengths: Lengths,
    seed: int,
    requests: int | None = None,
    duration: float | None = None,
) -> Iterator[Arrival]:
    """Yield arrivals until `requests` were made or `duration` seconds have passed, whichever is first.

    A pure function of its arguments. Without both limits it never ends."""
    for_times, for_lengths = (
        np.random.Generator(np.random.PCG64(child)) for child in np.random.SeedSequence(seed).spawn(2)
    )
    made, elapsed = 0, 0.0
    while True:
        steps = elapsed + np.cumsum(times.gaps(for_times, CHUNK))
        elapsed = float(steps[-1])
        prompts, outputs = lengths.draw(for_lengths, made, CHUNK)
        rows = zip(times.clock(steps).tolist(), prompts.tolist(), outputs.tolist(), strict=True)
        for moment, prompt, output in rows:
            if (requests is not None and made >= requests) or (duration is not None and moment > duration):
                return
            yield Arrival(moment, prompt, output)
            made += 1
