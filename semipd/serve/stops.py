"""Stop strings, found wherever the borders of tokens fall."""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """Passes text on, holding back what may be the start of a stop string.

    What it passes on and where it stops do not depend on how the text was cut into pieces: the match that
    ends first counts, and of those the longest.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """include: whether the stop string itself is passed on too."""
        self._stops = stops
        self._include = include
        self._held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """The text that is now certain. After a match, `found` is true and the rest is dropped."""
        if not self._stops or not piece:
            return piece
        text = self._held + piece
        match = self._first_match(text)
        if match is not None:
            self.found = True
            self._held = ""
            return text[: match[1] if self._include else match[0]]
        keep = self._partial(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What is held back, once nothing will follow."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, int] | None:
        """Where the match that ends first starts and ends."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = start + len(stop), start
        return (best[1], best[0]) if best else None

    def _partial(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while start >= 0 and len(text) - start > longest:
                if stop.startswith(text[start:]):
                    longest = len(text) - start
                    break
                start = text.find(stop[0], start + 1)
        return longest
