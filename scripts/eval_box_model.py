"""Ask the model in the box held-out questions; print the share of right answers by task and length.

The same questions go through transformers and, with ``--engine``, through semipd; both decode greedily in
fp32 and must give the same tokens. The last line is one JSON object.

    python scripts/eval_box_model.py --engine --questions 200
"""

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM

from semipd import LLM, SamplingParams
from semipd.box import format as box_format
from semipd.box import tasks as box_tasks

BOX = Path(box_tasks.__file__).parent
RECALL_LENGTHS = (64, 128, 256, 512, 1024, 2000, 4000)
LONGEST_ANSWER = 40


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt, its right answer, and the cell of the table it counts in."""

    task: str
    column: str
    prompt: tuple[int, ...]
    answer: str


def cases(questions: int, seed: int) -> list[Case]:
    """``questions`` held-out ones for each cell: alone, after other turns (256 tokens), by length."""
    found = []
    for kind in box_tasks.KINDS:
        rng = Random(f"{seed}:{kind}")
        for _ in range(questions):
            question = box_tasks.draw(kind, rng, held_out=True)
            prompt = box_format.encode_turn(question)[0]
            found.append(Case(kind, "alone", tuple(prompt), question.answer))
            found.append(Case(kind, "in 256", (*history(rng, 256 - len(prompt)), *prompt), question.answer))
    for kind in ("add", "subtract"):
        rng = Random(f"{seed}:{kind}:999")
        for _ in range(questions):
            question = box_tasks.draw(kind, rng, held_out=True, largest=999)
            found.append(
                Case(f"{kind} to 999", "alone", tuple(box_format.encode_turn(question)[0]), question.answer)
            )
    for length in RECALL_LENGTHS:
        rng = Random(f"{seed}:recall:{length}")
        for _ in range(questions):
            question = next(box_tasks.recall_of_length(rng, length - 3).turns())
            prompt = box_format.encode_turn(question)[0]
            found.append(Case(f"recall at {length}", "alone", tuple(prompt), question.answer))
    return found


def history(rng: Random, room: int) -> list[int]:
    """Earlier turns, unrelated and answered rightly, that take at most ``room`` tokens."""
    ids: list[int] = []
    while True:
        kind = rng.choice([kind for kind in box_tasks.KINDS if kind != "recall"])
        asked, answered = box_format.encode_turn(box_tasks.draw(kind, rng, held_out=True))
        turn = asked + answered
        if len(ids) + len(turn) > room:
            return ids
        ids += turn


@torch.inference_mode()
def answer_with_transformers(
    folder: Path, asked: Sequence[Case], batch_tokens: int = 32_000
) -> list[list[int]]:
    """Greedy fp32 answers, ids without the end token; a batch holds prompts of one length: no padding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers: list[list[int]] = [[] for _ in asked]
    by_length: dict[int, list[int]] = {}
    for number, case in enumerate(asked):
        by_length.setdefault(len(case.prompt), []).append(number)
    for length, numbers in by_length.items():
        rows = max(1, batch_tokens // length)
        for begin in range(0, len(numbers), rows):
            group = numbers[begin : begin + rows]
            prompts = torch.tensor([asked[number].prompt for number in group])
            mask = torch.ones_like(prompts)
            output = model.generate(
                prompts, attention_mask=mask, do_sample=False, max_new_tokens=LONGEST_ANSWER
            )
            for number, ids in zip(group, output[:, length:].tolist(), strict=True):
                answers[number] = without_end(ids)
    return answers


def answer_with_engine(folder: Path, asked: Sequence[Case], settings: dict[str, str]) -> list[list[int]]:
    """Greedy fp32 answers of semipd, all requests at once, ids without the end token."""
    greedy = SamplingParams(temperature=0.0, max_tokens=LONGEST_ANSWER)
    with LLM(str(folder), dtype="float32", **settings) as llm:
        results = llm.generate([list(case.prompt) for case in asked], greedy)
    return [without_end(result.outputs[0].token_ids) for result in results]


def without_end(ids: list[int]) -> list[int]:
    """The ids before the end token."""
    return ids[: ids.index(box_format.END)] if box_format.END in ids else ids


def table(asked: Sequence[Case], texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """The share of right answers by task and column."""
    marks: dict[str, dict[str, list[bool]]] = {}
    for case, text in zip(asked, texts, strict=True):
        marks.setdefault(case.task, {}).setdefault(case.column, []).append(text == case.answer)
    return {
        task: {column: round(sum(hits) / len(hits), 4) for column, hits in columns.items()}
        for task, columns in marks.items()
    }


def show(shares: dict[str, dict[str, float]]) -> None:
    """Print the table, one task a line."""
    print(f"{'task':<18} {'alone':>8} {'in 256':>8}")
    for task, columns in shares.items():
        cells = [
            f"{columns[column]:8.1%}" if column in columns else " " * 8 for column in ("alone", "in 256")
        ]
        print(f"{task:<18} {' '.join(cells)}")


def measured(answers: Sequence[list[int]], asked: Sequence[Case], seconds: float) -> dict[str, object]:
    """One way's part of the result; prints its table."""
    shares = table(asked, [bytes(ids).decode(errors="replace") for ids in answers])
    show(shares)
    return {"shares": shares, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=BOX)
    parser.add_argument("--questions", type=int, default=200, help="questions for each cell of the table")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--threads", type=int, default=2, help="of transformers")
    parser.add_argument("--engine", action="store_true", help="ask semipd too, and compare the tokens")
    parser.add_argument("--policy", default="semi-pd", help="of semipd")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    asked = cases(arguments.questions, arguments.seed)
    result: dict[str, object] = {
        "benchmark": "box_model",
        "questions_per_cell": arguments.questions,
        "seed": arguments.seed,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(f"transformers, fp32, {arguments.questions} questions a cell")
    began = time.perf_counter()
    answers = answer_with_transformers(arguments.folder, asked)
    result["transformers"] = measured(answers, asked, time.perf_counter() - began)
    if arguments.engine:
        print(f"\nsemipd ({arguments.policy}), fp32, all {len(asked)} requests at once")
        began = time.perf_counter()
        engine_answers = answer_with_engine(arguments.folder, asked, {"policy": arguments.policy})
        result["semipd"] = measured(engine_answers, asked, time.perf_counter() - began)
        different = sum(ours != theirs for ours, theirs in zip(engine_answers, answers, strict=True))
        print(f"\n{len(asked) - different} of {len(asked)} answers have the same tokens")
        result["different_answers"] = different
    print(json.dumps(result))


if __name__ == "__main__":
    main()
