"""Driver of llama.cpp's batched core.

Settings: {"file": GGUF, "threads": 2, "sequences": 16, "length": 2048, "batch": 2048,
"unified": false, "quantized": false}.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

from answer import Generate, Steps, answer, settings
from llama_core import Core


def start() -> tuple[Generate, dict[str, object]]:
    given: dict[str, Any] = settings()
    core = Core(**given)

    def generate(prompts: list[list[int]], new: list[int]) -> Steps:
        for number, (prompt, count) in enumerate(zip(prompts, new, strict=True)):
            core.add(number, prompt, count)
        steps: Steps = []
        while not core.idle:
            came = core.step()
            steps.append((time.perf_counter(), len(came)))
        return steps

    return generate, {"engine": "llama.cpp", "version": version("llama-cpp-python")}


if __name__ == "__main__":
    answer(start)
