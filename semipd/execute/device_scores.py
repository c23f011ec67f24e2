"""What scores a batch on a device is asked for, and those on their way to the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from semipd.core.types import Score
from semipd.execute.backend import Reading
from semipd.execute.storage import SlotTable


@dataclass(frozen=True)
class Wanted:
    """Tokens to score, an array each. slices: of the batch. rows: of the logits (for prompts: of the step).
    positions: the tokens' own. counts: how many of the best to tell. tokens: ids, where the host knows."""

    slices: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray

    @property
    def most(self) -> int:
        return int(self.counts.max())

    def parts(self, size: int) -> Iterator[Wanted]:
        """The same, at most `size` at a time."""
        for first in range(0, len(self.rows), size):
            yield Wanted(*(values[first : first + size] for values in vars(self).values()))


@dataclass(frozen=True)
class Told:
    """Scores that a transfer to the host will fill in; reading: see `sampler_device.chances_on_device`."""

    wanted: Wanted
    reading: Reading

    def scores(self) -> Iterator[Score]:
        """Raises FloatingPointError where a row had no finite maximum."""
        values = self.reading.values()
        best = (values.shape[1] - 1) // 2
        if not np.isfinite(values[:, : best + 1]).all():
            raise FloatingPointError("the logits of a scored token have no finite maximum")
        wanted = self.wanted
        for index, position, count, row in zip(
            wanted.slices.tolist(), wanted.positions.tolist(), wanted.counts.tolist(), values, strict=True
        ):
            kept = min(count, best)
            ids = row[1 + best : 1 + best + kept].astype(np.int64)
            chances = row[: 1 + kept].tolist()
            yield Score(index, position, chances[0], tuple(ids.tolist()), tuple(chances[1:]))


def wanted_of_produced(
    table: SlotTable, slots: np.ndarray, ends: np.ndarray, sampled: np.ndarray
) -> Wanted | None:
    """Produced tokens to score. ends: the position that follows each slice; sampled: those with a token."""
    counts = table.logprobs[slots[sampled]]
    rows = np.flatnonzero(counts >= 0)
    if not rows.size:
        return None
    slices = sampled[rows]
    return Wanted(slices, rows, ends[slices], counts[rows], np.zeros(rows.size, np.int64))


def wanted_of_prompts(
    table: SlotTable, slots: np.ndarray, starts: np.ndarray, counts: np.ndarray
) -> Wanted | None:
    """Prompt tokens to score: those that follow the positions of a step."""
    best = table.prompt_logprobs[slots]
    ends = np.minimum(starts + counts, table.prompt_length[slots] - 1)
    lengths = np.where(best >= 0, np.maximum(ends - starts, 0), 0)
    total = int(lengths.sum())
    if not total:
        return None
    slices = np.repeat(np.arange(len(lengths)), lengths)
    offsets = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    positions = starts[slices] + offsets + 1
    rows = (np.cumsum(counts) - counts)[slices] + offsets
    tokens = table.tokens[slots[slices], positions].astype(np.int64)
    return Wanted(slices, rows, positions, best[slices], tokens)
