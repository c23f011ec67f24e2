"""The loop that every driver runs: a request a line in, what happened a line out. Standard library only, so
that it works under any peer's interpreter.

In:  {"prompts": [[token id, ...], ...], "new": [tokens to generate, ...]}
Out: {"steps": [[seconds since the request, tokens that came], ...]}, in order, or {"error": "..."}
The first line out, before any request, is {"ready": {facts about the peer}}.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable

Steps = list[tuple[float, int]]  # (moment of time.perf_counter, tokens that came)
Generate = Callable[[list[list[int]], list[int]], Steps]


def settings() -> dict[str, object]:
    """What the benchmark told this driver: the JSON object that is its only argument."""
    found: dict[str, object] = json.loads(sys.argv[1])
    return found


def answer(start: Callable[[], tuple[Generate, dict[str, object]]]) -> None:
    """Start the peer, then serve requests until standard input ends.

    What the peer prints goes to standard error: the lines out stay clean."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    generate, facts = start()
    print(json.dumps({"ready": facts}), file=lines)
    for line in sys.stdin:
        request = json.loads(line)
        begin = time.perf_counter()
        try:
            steps = generate(request["prompts"], request["new"])
            reply: dict[str, object] = {"steps": [(moment - begin, tokens) for moment, tokens in steps]}
        except Exception as error:  # the benchmark names it and leaves this figure out
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(reply), file=lines)
