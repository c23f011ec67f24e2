"""An engine process with the fake executor, for tests: `python -m tests.serve.fake_process FD`.

The environment says how long a step takes (FAKE_PACE, milliseconds) and loading (FAKE_DELAY, seconds)."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from semipd.config import Config
from semipd.core.engine import Engine
from semipd.core.errors import ConfigError
from semipd.core.ports import Observer
from semipd.serve.engine_process import main
from tests.serve.fakes import LiveFake, make_engine


def build(config: Config, observers: Sequence[Observer]) -> Engine:
    """Refuses a max_model_len of 7, as a stand-in for whatever building may refuse."""
    if config.model.max_model_len == 7:
        raise ConfigError("seven is not a length")
    time.sleep(float(os.environ.get("FAKE_DELAY", "0")))
    executor = LiveFake(pace=float(os.environ.get("FAKE_PACE", "0")) / 1000)
    return make_engine(executor, observers)


if __name__ == "__main__":
    main(sys.argv[1:], build)
