"""Driver of this engine, through `LLM.generate`. Settings: {"folder": ..., "llm": {LLM's settings}}."""

from __future__ import annotations

import time
from typing import Any

from answer import Generate, Steps, answer, settings

from semipd import LLM, SamplingParams
from semipd.build import build_engine, resolve
from semipd.config import from_mapping
from semipd.core.types import Event, Tokens
from semipd.serve.model_folder import read_model_folder


class Recorder:
    """The moments at which steps were applied."""

    def __init__(self) -> None:
        self.steps: Steps = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Tokens):
            self.steps.append((time.perf_counter(), len(event.tokens)))


def start() -> tuple[Generate, dict[str, object]]:
    given: dict[str, Any] = settings()
    config = from_mapping({"model": given["folder"], "device": "cpu", **given["llm"]})
    resolved = resolve(config)
    recorder = Recorder()
    model = read_model_folder(resolved.folder)
    llm = LLM.from_builder(config, model, lambda observers: build_engine(resolved, [*observers, recorder]))

    def generate(prompts: list[list[int]], new: list[int]) -> Steps:
        recorder.steps = []
        params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in new]
        llm.generate(prompts, params)
        return recorder.steps

    return generate, {"engine": "semipd"}


if __name__ == "__main__":
    answer(start)
