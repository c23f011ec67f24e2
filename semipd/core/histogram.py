"""A histogram with logarithmic buckets: flat memory, quantiles within 1%, any range."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil, log2

PER_OCTAVE = 36  # buckets per doubling: the middle of a bucket is within 2 ** (1 / 72) = 0.97% of its ends
_BELOW, _ABOVE = 16, 32  # octaves covered below and above `unit`; values outside count in the outer buckets
_ZERO = _BELOW * PER_OCTAVE  # index of the bucket that ends at `unit`
_SIZE = _ZERO + _ABOVE * PER_OCTAVE + 1


@dataclass(frozen=True, slots=True)
class HistogramData:
    """What a histogram held at one moment, as plain data.

    buckets: occupied buckets only; bucket i counts values in (unit * g ** (i - 1), unit * g ** i] with
    g = 2 ** (1 / PER_OCTAVE), so every power of two times `unit` is the end of a bucket.
    """

    unit: float
    count: int
    total: float
    buckets: dict[int, int] = field(default_factory=dict)

    def below(self, index: int) -> int:
        """How many values were at most `unit * 2 ** (index / PER_OCTAVE)`."""
        return sum(count for bucket, count in self.buckets.items() if bucket <= index)


class LogHistogram:
    """Counts of values around `unit` (1e-3 for seconds, 1 for tokens), from unit/65,536 to unit * 2**32.

    Smaller values (zero included) count as the smallest. `least` and `greatest` are exact."""

    __slots__ = ("_buckets", "_scale", "count", "greatest", "least", "total", "unit")

    def __init__(self, unit: float = 1e-3) -> None:
        self.unit = unit
        self.count = 0
        self.total = 0.0
        self.least = float("inf")
        self.greatest = float("-inf")
        self._scale = 1.0 / unit
        self._buckets = [0] * _SIZE

    def add(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` over. NaN is refused by ValueError."""
        ratio = value * self._scale
        if ratio <= 0.0:
            index = 0
        else:
            index = ceil(log2(ratio) * PER_OCTAVE) + _ZERO
            if index < 0:
                index = 0
            elif index >= _SIZE:
                index = _SIZE - 1
        self._buckets[index] += times
        self.count += times
        self.total += value * times
        if value < self.least:
            self.least = value
        if value > self.greatest:
            self.greatest = value

    @property
    def mean(self) -> float:
        """The exact mean; 0 when empty."""
        return self.total / self.count if self.count else 0.0

    def quantile(self, q: float) -> float:
        """The value of rank ceil(q * count), within 1%; 0 when empty. q: 0 to 1."""
        if not self.count:
            return 0.0
        rank = max(1, ceil(q * self.count))
        if rank >= self.count:
            return self.greatest
        index = bisect_left(list(accumulate(self._buckets)), rank)
        middle = self.unit * 2.0 ** ((index - _ZERO - 0.5) / PER_OCTAVE) if index else self.least
        return min(max(middle, self.least), self.greatest)

    def merge(self, other: LogHistogram) -> None:
        """Add everything that `other`, of the same unit, has counted."""
        if other.unit != self.unit:
            raise ValueError(f"histograms of {self.unit:g} and {other.unit:g} do not add up")
        self._buckets = [a + b for a, b in zip(self._buckets, other._buckets, strict=True)]
        self.count += other.count
        self.total += other.total
        self.least = min(self.least, other.least)
        self.greatest = max(self.greatest, other.greatest)

    def data(self) -> HistogramData:
        """A copy as plain data."""
        buckets = {index - _ZERO: count for index, count in enumerate(self._buckets) if count}
        return HistogramData(self.unit, self.count, self.total, buckets)
