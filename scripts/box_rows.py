"""The rows of tokens that the model in the box is trained and tested on.

A row holds whole turns; only the answers and their end tokens count in the loss. The data of a step depends
on the seed and the step's number alone.
"""

import dataclasses
from collections.abc import Iterator
from random import Random

import torch
from torch import Tensor

from semipd import box_format, box_tasks


@dataclasses.dataclass(frozen=True)
class Stream:
    """One kind of batch: ``rows`` of ``length`` tokens, on every ``every``-th step from ``start`` on."""

    name: str
    rows: int
    length: int
    every: int
    start: int
    weight: float


STREAMS = (
    Stream("short", rows=64, length=128, every=1, start=0, weight=1.0),
    Stream("medium", rows=8, length=512, every=3, start=400, weight=0.5),
    Stream("long", rows=3, length=2176, every=6, start=1400, weight=0.5),
)
KIND_WEIGHTS = {
    "add": 4,
    "subtract": 4,
    "copy": 1,
    "reverse": 1.5,
    "sort": 1,
    "count": 2,
    "recall": 1,
}


@dataclasses.dataclass
class Row:
    """A row of a batch as it grows: ids, and (begin, end, kind) of each answer."""

    length: int
    ids: list[int] = dataclasses.field(default_factory=list)
    answers: list[tuple[int, int, str]] = dataclasses.field(default_factory=list)

    def append(self, question: box_tasks.Question, plain: bool = False) -> bool:
        """Add a turn; False, and nothing added, when it does not fit."""
        asked, answered = box_format.encode_turn(question, plain)
        if len(self.ids) + len(asked) + len(answered) > self.length:
            return False
        begin = len(self.ids) + len(asked)
        self.ids += asked + answered
        self.answers.append((begin, len(self.ids), question.kind))
        return True


def fill_mixed(row: Row, rng: Random) -> None:
    """Unrelated questions until the row is full; some rows are plain text, some have a system message."""
    plain = rng.random() < 0.12
    if not plain and rng.random() < 0.1:
        row.ids += box_format.encode_message("system", rng.choice(box_tasks.SYSTEM_PROMPTS))
    kinds, weights = tuple(KIND_WEIGHTS), tuple(KIND_WEIGHTS.values())
    misfits = 0
    while misfits < 4:
        kind = rng.choices(kinds, weights)[0]
        sizes = {"pairs": 5} if kind == "recall" else {}
        if kind in ("add", "subtract") and rng.random() < 0.2:
            sizes = {"largest": 999}
        misfits += not row.append(box_tasks.draw(kind, rng, **sizes), plain)


def fill_recall(
    row: Row, rng: Random, share: tuple[float, float] = (0.3, 0.9), held_out: bool = False
) -> None:
    """One list, which takes about that share of the row, then questions about it until the row is full."""
    pairs = max(1, int(row.length * rng.uniform(*share) / 9.5))
    for question in box_tasks.recall(rng, pairs, row.length // 16, held_out).turns():
        if not row.append(question):
            break
    if not row.answers:
        fill_recall(row, rng, (share[0] / 2, share[1] / 2), held_out)


def make_batch(stream: Stream, seed: int, step: int, longest: int) -> dict[str, Tensor]:
    """A stream's batch: ids and positions [rows, length], and the flat indices whose next token counts."""
    rng = Random(f"{seed}:{stream.name}:{step}")
    ids = torch.full((stream.rows, stream.length), box_format.END)
    positions = torch.arange(stream.length).repeat(stream.rows, 1)
    targets: list[int] = []
    for number in range(stream.rows):
        row = Row(stream.length)
        recalls = rng.random() < {"short": 0.25, "medium": 0.7, "long": 1.0}[stream.name]
        if recalls:
            fill_recall(row, rng)
            positions[number] = stretched(positions[number], row, rng, longest)
        else:
            fill_mixed(row, rng)
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        for begin, end, _ in row.answers:
            targets += range(number * stream.length + begin - 1, number * stream.length + end - 1)
    return {"ids": ids, "positions": positions, "indices": torch.tensor(targets)}


def stretched(positions: Tensor, row: Row, rng: Random, longest: int) -> Tensor:
    """Positions, in half of the rows with gaps: distances up to the longest context are learned cheaply."""
    if rng.random() < 0.5:
        return positions
    positions = positions.clone()
    room = longest - row.length
    for _ in range(rng.randint(1, 3)):
        gap = rng.randint(0, room)
        room -= gap
        positions[rng.randrange(1, row.length) :] += gap
    return positions


def held_out_rows(stream: Stream, kind: str, seed: int) -> Iterator[Row]:
    """Rows of held-out questions: one alone in a row, or, in longer rows, a list that fills it."""
    rng = Random(f"{seed}:evaluate:{stream.name}:{kind}")
    for _ in range(stream.rows):
        row = Row(stream.length)
        if stream.name != "short":
            fill_recall(row, rng, (0.85, 0.9), held_out=True)
        while not row.answers:
            row.append(box_tasks.draw(kind, rng, held_out=True))
        yield row
