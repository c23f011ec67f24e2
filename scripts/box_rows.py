"""The rows of tokens that the model in the box is trained and tested on.

A row holds whole turns; only the answers and their end tokens count in the loss. The data of a step depends
on the seed and the step's number alone.
"""

import dataclasses
from collections.abc import Iterator
from random import Random

import torch
from torch import Tensor

from semipd.box import format as box_format
from semipd.box import tasks as box_tasks


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
    Stream("medium", rows=8, length=512, every=4, start=400, weight=0.5),
    Stream("long", rows=3, length=2176, every=6, start=2000, weight=0.5),
)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """How often each kind is drawn for a row of unrelated questions, and the share of such rows that begin
    with counting, which is learned late unless it often comes without other letters before it."""

    weights: dict[str, float]
    counting_first: float


# Counting first: it is learned soon when there is much of it, and sums want most of the time after that.
EARLY = Mixture(
    {"add": 2.5, "subtract": 3, "copy": 2, "reverse": 1.5, "sort": 4, "count": 12, "recall": 1}, 0.5
)
LATE = Mixture({"add": 5, "subtract": 6, "copy": 2, "reverse": 2, "sort": 3, "count": 4, "recall": 1}, 0.15)
LATE_FROM = 1400  # steps


def mixture_at(step: int) -> Mixture:
    return EARLY if step < LATE_FROM else LATE


@dataclasses.dataclass
class Row:
    """A row of a batch as it grows: ids, (begin, end, kind) of each answer, and hints.

    A hint (index, id) teaches a running result inside a question: at a letter of the string, how often the
    asked letter has come so far. It changes nothing that is generated; without it, counting is not learned
    in this number of steps.
    """

    length: int
    ids: list[int] = dataclasses.field(default_factory=list)
    answers: list[tuple[int, int, str]] = dataclasses.field(default_factory=list)
    hints: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def append(self, question: box_tasks.Question, plain: bool = False) -> bool:
        """Add a turn; False, and nothing added, when it does not fit."""
        asked, answered = box_format.encode_turn(question, plain)
        if len(self.ids) + len(asked) + len(answered) > self.length:
            return False
        if question.kind == "count":
            self.hints += running_counts(question, len(self.ids) + (not plain))
        begin = len(self.ids) + len(asked)
        self.ids += asked + answered
        self.answers.append((begin, len(self.ids), question.kind))
        return True


def running_counts(question: box_tasks.Question, offset: int) -> Iterator[tuple[int, int]]:
    """Hints for a question whose text begins at ``offset``: counts below ten at the string's letters."""
    letter, string = question.text.split()[2][0], question.text.split()[-1].rstrip("?")
    begin = question.text.rindex(" ") + 1
    for index in range(len(string)):
        running = string[: index + 1].count(letter)
        if running < 10:
            yield offset + begin + index, ord(str(running))


def fill_mixed(row: Row, rng: Random, mixture: Mixture) -> None:
    """Unrelated questions until the row is full; some rows are plain text, some have a system message."""
    plain = rng.random() < 0.12
    if not plain and rng.random() < 0.1:
        row.ids += box_format.encode_message("system", rng.choice(box_tasks.SYSTEM_PROMPTS))
    kinds, weights = tuple(mixture.weights), tuple(mixture.weights.values())
    if rng.random() < mixture.counting_first:
        row.append(box_tasks.draw("count", rng), plain)
    misfits = 0
    while misfits < 4:
        kind = rng.choices(kinds, weights)[0]
        sizes = {"pairs": 5} if kind == "recall" else {}
        if kind in ("add", "subtract") and rng.random() < 0.1:
            sizes = {"largest": 999}
        misfits += not row.append(box_tasks.draw(kind, rng, **sizes), plain)


def fill_recall(
    row: Row, rng: Random, share: tuple[float, float] = (0.1, 0.9), held_out: bool = False
) -> None:
    """One list, which takes about that share of the row, then questions about it until the row is full."""
    pairs = max(1, int(row.length * rng.uniform(*share) / 9.5))
    lists = box_tasks.recall(rng, pairs, row.length // 16, held_out)
    for question in lists.turns():
        if not row.append(question):
            break
    if not row.answers:
        fill_recall(row, rng, (share[0] / 2, share[1] / 2), held_out)


def fill_rehearsal(row: Row, rng: Random) -> None:
    """As ``fill_recall``, but the list repeats itself, and each repeated value counts as an answer too.

    That is the densest lesson in looking a name up, and without it the rest is learned late.
    """
    budget = int(row.length * rng.uniform(0.6, 0.95)) - 30
    lists = box_tasks.recall(rng, rng.randint(3, max(4, budget // 14)), row.length // 16, held_out=False)
    listed: list[tuple[str, str]] = []
    while len(box_tasks.recall_opening(listed)) < budget:
        seen = len(set(listed))
        known = seen == len(lists.pairs) or (seen > 0 and rng.random() < 0.5)
        listed.append(rng.choice(lists.pairs[:seen]) if known else lists.pairs[seen])
    repeated = box_tasks.Recall(tuple(listed), lists.asked, lists.phrases)
    if not set(lists.asked) <= {name for name, _ in listed}:
        repeated = box_tasks.Recall(tuple(listed), (listed[0][0],), ("What is {}?",))
    for question in repeated.turns():
        if question.held_out or not row.append(question):
            break
    if row.answers:
        row.answers += repeated_values(listed)


def repeated_values(listed: list[tuple[str, str]]) -> list[tuple[int, int, str]]:
    """Where repeated values are in a row's first message, each with the character after it."""
    spans = []
    for number, (name, value) in enumerate(listed):
        if (name, value) in listed[:number]:
            begin = 1 + len(box_tasks.recall_opening(listed[: number + 1])) - len(". ") - len(value)
            spans.append((begin, begin + len(value) + 1, "rehearsal"))
    return spans


def make_batch(stream: Stream, seed: int, step: int, longest: int) -> dict[str, Tensor]:
    """A stream's batch: ids and positions [rows, length], and at which flat indices which id is wanted."""
    rng = Random(f"{seed}:{stream.name}:{step}")
    ids = torch.full((stream.rows, stream.length), box_format.END)
    positions = torch.arange(stream.length).repeat(stream.rows, 1)
    indices: list[int] = []
    wanted: list[int] = []
    for number in range(stream.rows):
        row = Row(stream.length)
        if rng.random() < {"short": 0.1, "medium": 0.6, "long": 1.0}[stream.name]:
            (fill_rehearsal if rng.random() < 0.3 else fill_recall)(row, rng)
            positions[number] = stretched(positions[number], row, rng, longest)
        else:
            fill_mixed(row, rng, mixture_at(step))
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        targets = [(at - 1, row.ids[at]) for begin, end, _ in row.answers for at in range(begin, end)]
        for index, target in targets + row.hints:
            indices.append(number * stream.length + index)
            wanted.append(target)
    return {
        "ids": ids,
        "positions": positions,
        "indices": torch.tensor(indices),
        "wanted": torch.tensor(wanted),
    }


def stretched(positions: Tensor, row: Row, rng: Random, longest: int) -> Tensor:
    """Positions, in some of the rows with gaps: distances up to the longest context are learned cheaply."""
    if rng.random() < 0.6:
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
