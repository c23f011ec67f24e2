"""The questions' answers are right by an independent reading of their text, and the split holds."""

import re
from random import Random

import pytest

from semipd.box import tasks as box_tasks

ASKED = 400


def solve(question: box_tasks.Question) -> str:
    """Answer from the text alone, without the generators' code."""
    text = question.text
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    if question.kind == "add":
        return str(sum(numbers))
    if question.kind == "subtract":
        left, right = reversed(numbers) if text.startswith("Subtract") else numbers
        return str(left - right)
    if question.kind == "sort":
        return "".join(sorted(re.findall(r"\d", text)))
    if question.kind == "count":
        match = re.fullmatch(r"How many (.)(?:'s are)? in (\w+)\?", text)
        assert match
        return str(len(match[2]) - len(match[2].replace(match[1], "")))
    if question.kind == "recall":
        name = re.search(r"(?:What is|And) (\w+)\?$", text)
        assert name
        return re.findall(rf"\b{name[1]}=(\d+)", text)[0]
    body = re.sub(r"^(Copy: |Repeat: |Repeat after me: |Reverse: |Spell )", "", text)
    if question.kind == "reverse":
        return "".join(reversed(body.removesuffix(" backwards.")))
    return body


@pytest.mark.parametrize("kind", box_tasks.KINDS)
def test_answers_are_right(kind: str) -> None:
    rng = Random(1)
    for _ in range(ASKED):
        question = box_tasks.draw(kind, rng)
        assert question.answer == solve(question), question


def test_three_digit_sums_and_differences_are_right() -> None:
    rng = Random(2)
    drawn = [box_tasks.draw(kind, rng, largest=999) for kind in ("add", "subtract") for _ in range(ASKED)]
    assert all(question.answer == solve(question) for question in drawn)
    assert max(int(question.answer) for question in drawn) > 999
    assert min(int(question.answer) for question in drawn) < 0


@pytest.mark.parametrize("kind", box_tasks.KINDS)
def test_the_two_sides_of_the_split_share_no_question(kind: str) -> None:
    rng = Random(3)
    taught = {box_tasks.draw(kind, rng).key for _ in range(ASKED)}
    asked = {box_tasks.draw(kind, rng, held_out=True).key for _ in range(50)}
    assert asked and not taught & asked
    assert not any(box_tasks.is_held_out(key) for key in taught)


def test_a_sum_and_its_mirror_are_on_the_same_side() -> None:
    rng = Random(4)
    sides: dict[frozenset[int], set[bool]] = {}
    for _ in range(20_000):
        question = box_tasks.add(rng, largest=20)
        sides.setdefault(frozenset(map(int, re.findall(r"\d+", question.text))), set()).add(
            question.held_out
        )
    assert all(len(side) == 1 for side in sides.values())


def test_the_split_is_about_one_in_twenty_and_does_not_move() -> None:
    keys = [f"add:{left}+{right}" for left in range(100) for right in range(left, 100)]
    held_out = [key for key in keys if box_tasks.is_held_out(key)]
    assert 0.03 < len(held_out) / len(keys) < 0.07
    assert held_out[:3] == ["add:0+14", "add:0+44", "add:0+69"]


def test_follow_up_questions_are_about_the_first_turns_list() -> None:
    lists = box_tasks.recall(Random(5), pairs=30, questions=12)
    first, *others = lists.turns()
    assert len({name for name, _ in lists.pairs}) == 30
    assert first.text.startswith("Remember: ")
    for turn in others:
        assert "=" not in turn.text
        assert turn.answer == solve(
            box_tasks.Question("recall", f"{first.text} {turn.text}", turn.answer, "")
        )


@pytest.mark.parametrize("characters", [64, 500, 2000])
def test_a_list_of_a_length_fills_it_and_is_held_out(characters: int) -> None:
    for seed in range(5):
        question = next(box_tasks.recall_of_length(Random(seed), characters).turns())
        assert characters - 20 <= len(question.text) <= characters
        assert question.held_out
        assert question.answer == solve(question)


def test_the_same_seed_gives_the_same_questions() -> None:
    first = [box_tasks.draw(kind, Random(6)) for kind in box_tasks.KINDS]
    assert first == [box_tasks.draw(kind, Random(6)) for kind in box_tasks.KINDS]
