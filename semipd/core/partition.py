"""Fixed ways to share the device between the two phases. Each is a pure function of a window."""

from __future__ import annotations

from dataclasses import dataclass

from semipd.core.types import Split


@dataclass(frozen=True, slots=True)
class Window:
    """What a controller may look at: observations since its last decision.

    ttft, tpot: seconds of the requests that reached a first token, or finished, in the window.
    arrivals: requests that arrived; seconds: the window's length; prefill_seconds: mean seconds of
    prefill per request at the current split.
    """

    ttft: tuple[float, ...] = ()
    tpot: tuple[float, ...] = ()
    arrivals: int = 0
    seconds: float = 0.0
    prefill_seconds: float = 0.0


class Static:
    """A fixed pair of shares while both phases have work."""

    def __init__(self, prefill: int, decode: int, total: int) -> None:
        self._split = Split.pair(prefill, decode, total)

    def split(self, window: Window, current: Split) -> Split:
        return self._split


class Shared(Static):
    """Both phases on everything, competing: what (100, 100) means in the semi-PD paper."""

    def __init__(self, total: int) -> None:
        super().__init__(total, total, total)
