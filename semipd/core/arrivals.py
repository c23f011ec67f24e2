"""What prompts are to be expected, judged by those that came in the last seconds."""

from __future__ import annotations

import math

MEMORY = 10.0  # seconds over which they are averaged
FIRST = 2.0  # seconds, or those that come at once at the start would be the rule
_FEW = 8.0  # arrivals that do not say yet how even their gaps are
_MOST = 9.0  # squared variation of gaps that is believed


class Arrivals:
    """rate, load: prompts, and seconds of prefill when each runs alone, per second.

    long_part, long_load: what parts of the two are of long prompts, which have more tokens than the prompt
    of the mean token. calm: how much faster than in an M/M/1 queue the chance to wait falls with the time,
    Kingman's 2 / (Ca^2 + Cs^2), with the squared variations of the gaps between prompts and of their
    lengths; the latter counts for at most 1, as it is mostly the long ones that wait for long ones.
    """

    def __init__(self) -> None:
        self.rate = self.load = 0.0
        self.long_part = self.long_load = 0.5
        self.calm = 1.0
        self._since, self._last = math.inf, 0.0
        # Fading sums, of squares too, and those of long prompts.
        self._prompts = self._seconds = self._gaps = self._tokens = 0.0
        self._gaps2 = self._tokens2 = self._long = self._long_seconds = 0.0

    def meet(self, time: float, tokens: int, seconds: float) -> None:
        """A prompt of so many tokens, and of so many seconds alone, came at a time."""
        if self._since == math.inf:
            self._since = self._last = time
        gap = max(time - self._last, 0.0)
        self._last += gap
        fading = math.exp(-gap / MEMORY)
        self._prompts = self._prompts * fading + 1.0
        self._seconds = self._seconds * fading + seconds
        self._gaps = self._gaps * fading + gap
        self._gaps2 = self._gaps2 * fading + gap * gap
        self._tokens = self._tokens * fading + tokens
        self._tokens2 = self._tokens2 * fading + tokens * tokens
        long = tokens > self._tokens2 / self._tokens
        self._long = self._long * fading + long
        self._long_seconds = self._long_seconds * fading + long * seconds
        self._conclude()

    def _conclude(self) -> None:
        seen = MEMORY * (1.0 - math.exp(-max(self._last - self._since, FIRST) / MEMORY))
        self.rate, self.load = self._prompts / seen, self._seconds / seen
        self.long_part, self.long_load = self._long / self._prompts, self._long_seconds / self._seconds
        gaps = _variation(self._prompts, self._gaps, self._gaps2) if self._prompts > _FEW else 1.0
        lengths = _variation(self._prompts, self._tokens, self._tokens2)
        self.calm = 2.0 / (min(max(gaps, 1.0), _MOST) + min(lengths, 1.0))


def _variation(count: float, total: float, squares: float) -> float:
    """Variance over squared mean."""
    return max(count * squares / total**2 - 1.0, 0.0) if total > 0.0 else 1.0
