"""Driver of this engine, through `LLM.generate`. Settings: {"folder": ..., "llm": {LLM's settings}}."""

from __future__ import annotations

import time
from typing import Any

from answer import Generate, Steps, answer, settings

from semipd import LLM, SamplingParams
from semipd.build import build_engine
from semipd.core.types import Event, Tokens


class Recorder:
    """The moments at which steps were applied."""

    def __init__(self) -> None:
        self.steps: Steps = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Tokens):
            self.steps.append((time.perf_counter(), len(event.tokens)))


def start() -> tuple[Generate, dict[str, object]]:
    given: dict[str, Any] = settings()
    recorder = Recorder()
    llm = LLM.from_settings(
        {"model": given["folder"], "device": "cpu", **given["llm"]},
        lambda resolved, observers: build_engine(resolved, [*observers, recorder]),
    )

    def generate(prompts: list[list[int]], new: list[int]) -> Steps:
        recorder.steps = []
        params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in new]
        llm.generate(prompts, params)
        return recorder.steps

    return generate, {"engine": "semipd"}


if __name__ == "__main__":
    answer(start)
