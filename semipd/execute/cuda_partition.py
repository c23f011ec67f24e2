"""Where a lane's next launch goes: the table of splits, and the rule that shares overlap only on purpose.

A lane may launch on a side while the other lane's unfinished work is on a side with other SMs. When the
split changes, the lane that shrinks moves at its next launch (waiting, on the device, for what it would
overlap with); the lane that grows stays where it is until the other has left what it takes, so it never
waits for the switch. A lone phase has the whole device. Where both shares overlap on purpose, or the
device cannot be cut, both use the whole device and the streams' priorities decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from semipd.core.types import Lane, Split
from semipd.execute.backend import Pair, Side


@dataclass(frozen=True)
class Place:
    """A side, and whether its stream must first wait for the other lane's last launch."""

    side: Side
    wait: bool


class Placement:
    """Chooses sides. `whole`: each lane's side on the whole device; `pairs`: the partitions."""

    def __init__(self, whole: Mapping[Lane, Side], pairs: Sequence[Pair], units: int) -> None:
        self._whole = dict(whole)
        self._pairs = tuple(sorted(pairs, key=lambda pair: pair.decode.units))
        self._units = units
        self._target = self._whole
        self._overlap = True

    @property
    def legal_splits(self) -> tuple[tuple[int, int], ...]:
        """(prefill, decode) units as granted."""
        return tuple((pair.prefill.units, pair.decode.units) for pair in self._pairs)

    def sides(self, lane: Lane) -> tuple[Side, ...]:
        """The whole device first, then each partition's side, decode's share rising."""
        return (self._whole[lane], *(pair.side(lane) for pair in self._pairs))

    def retarget(self, split: Split) -> None:
        """Follow this split from the next launch on; the nearest partition when it is none of them."""
        prefill, decode = split.of(Lane.PREFILL), split.of(Lane.DECODE)
        lone = not prefill or not decode
        self._overlap = not self._pairs or prefill + decode > split.total
        if lone or self._overlap:
            self._target = self._whole
            return
        # In equal parts of the split's own total, so that a split made for another card means something.
        wanted = decode * self._units / split.total
        pair = min(self._pairs, key=lambda pair: abs(pair.decode.units - wanted))
        self._target = {lane: pair.side(lane) for lane in self._whole}

    def place(self, lane: Lane, mine: Side | None, other: Side | None) -> Place:
        """mine: where this lane launched last, if ever; other: where the other lane's unfinished work is,
        None when it has none."""
        wanted = self._target[lane]
        if other is None or self._overlap or disjoint(wanted, other):
            return Place(wanted, False)
        growing = mine is not None and mine.units < wanted.units
        if growing and mine is not None and disjoint(mine, other):
            return Place(mine, False)
        return Place(wanted, True)


def disjoint(one: Side, other: Side) -> bool:
    """Whether two sides are known to share no SM."""
    if one is other:
        return False
    if one.pair >= 0 and one.pair == other.pair:
        return True  # the two sides of one split
    return one.sms is not None and other.sms is not None and not one.sms & other.sms
