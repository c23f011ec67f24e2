"""What ran when on which lane, as a Chrome trace (chrome://tracing, Perfetto) and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from semipd.core.errors import ConfigError
from semipd.core.types import Event, Lane, Stepped, Switched

_TRACKS = {Lane.PREFILL: 1, Lane.DECODE: 2, Lane.TRANSFER: 3}


class Timeline:
    """An observer that keeps every step: for short runs."""

    def __init__(self) -> None:
        self.steps: list[Stepped] = []
        self.switches: list[Switched] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stepped):
            self.steps.append(event)
        elif isinstance(event, Switched):
            self.switches.append(event)

    def events(self) -> list[dict[str, Any]]:
        """Chrome trace events: one slice a step, one counter a lane for the units. In microseconds."""
        rows: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": track, "args": {"name": lane.value}}
            for lane, track in _TRACKS.items()
        ]
        for step in self.steps:
            result, work = step.result, step.work
            rows.append(
                {
                    "ph": "X",
                    "name": f"{work.sequences} seqs, {work.tokens} tokens",
                    "pid": 1,
                    "tid": _TRACKS[result.lane],
                    "ts": 1e6 * result.started,
                    "dur": 1e6 * (result.finished - result.started),
                    "args": {"step": result.step, "split": str(step.split), "context": work.context},
                }
            )
        for switch in self.switches:
            units = {lane.value: count for lane, count in switch.split.units.items()}
            rows.append({"ph": "C", "name": "units", "pid": 1, "ts": 1e6 * switch.now, "args": units})
        return rows

    def write(self, path: Path) -> None:
        """Raises ConfigError when the file cannot be written."""
        try:
            path.write_text(json.dumps({"traceEvents": self.events()}))
        except OSError as error:
            raise ConfigError(f"--timeline: cannot write {path}: {error.strerror}") from None

    def plot_split(self, path: Path) -> None:
        """Units of each phase over time."""
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(9, 2.8))
        times = [switch.now for switch in self.switches]
        for lane in (Lane.PREFILL, Lane.DECODE):
            axes.step(times, [s.split.of(lane) for s in self.switches], where="post", label=lane.value)
        axes.set(xlabel="seconds", ylabel="units")
        axes.legend()
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
