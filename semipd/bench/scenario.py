"""`semipd simulate`: one engine on a simulated device under one workload, as settings."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from semipd.bench import lengths, traces, workload
from semipd.bench.report import json_line
from semipd.bench.simulate import Summary, run
from semipd.bench.timeline import Timeline
from semipd.build import build_simulation, targets_of
from semipd.config import PolicyConfig, from_mapping
from semipd.core.errors import ConfigError
from semipd.core.partition import Targets
from semipd.core.ports import Observer
from semipd.flags import add_flags, check_fields, from_flags, setting
from semipd.trace import Arrival

DEFAULT_REQUESTS = 1000
GOAL = 0.9  # attainment that defines goodput
STEADY = (0.15, 0.9)  # part of the arrivals that counts for goodput: warm-up and drain are cut
PRECISION = 0.02  # of the goodput, relative


@dataclass(frozen=True)
class Scenario:
    """Simulation"""

    model: str = setting("llama3-8b", "a named model, or a folder with a config.json")
    device: str = setting("a100-80g", "a named device, or a device file")
    tensor_parallel: int = setting(1, "devices that share each layer", "integer", low=1, high=64)
    pipeline_parallel: int = setting(
        1, "groups of layers on devices of their own", "integer", low=1, high=64
    )
    devices: int = setting(
        1, "disaggregated: 1 (two halves) or 2 (two whole ones)", "integer", low=1, high=2
    )
    workload: str = setting("sharegpt", f"lengths: {', '.join(lengths.NAMED)}, or IN,OUT such as 1K,128")
    arrivals: str = setting("poisson", "poisson, gamma:CV or onoff:ON,OFF")
    rate: float = setting(4.0, "requests per second", "number", low=1e-6, high=1e6)
    requests: int | None = setting(
        None, "how many arrive (default: 1000, or the whole trace)", "size", low=1, high=10**9
    )
    trace: str | None = setting(None, "arrivals and lengths from this file instead")
    trace_format: str = setting("semipd", "format of --trace", "choice", choices=tuple(traces.READERS))
    trace_speed: float = setting(1.0, "times as fast as recorded", "number", low=1e-6, high=1e6)
    kv_blocks: int | None = setting(None, "KV blocks (default: from the memory)", "size", low=1, high=2**31)
    block_size: int = setting(16, "tokens per KV block", "integer", low=1, high=1024)
    seed: int = setting(0, "of arrivals and lengths", "integer", low=0, high=2**63 - 1)

    def __post_init__(self) -> None:
        check_fields(self)

    def arrive(self) -> Iterator[Arrival]:
        """The requests of this scenario, in order of time. Raises ConfigError."""
        if self.trace is not None:
            rows = traces.read(Path(self.trace), self.trace_format, self.seed, self.trace_speed)
            return itertools.islice(rows, self.requests)
        times = workload.parse_times(self.arrivals, self.rate)
        return workload.generate(times, _lengths(self.workload), self.seed, self._generated)

    @property
    def span(self) -> float:
        """Seconds that the arrivals are expected to take; infinite for a trace."""
        return math.inf if self.trace is not None else self._generated / self.rate

    @property
    def _generated(self) -> int:
        return DEFAULT_REQUESTS if self.requests is None else self.requests


def _lengths(text: str) -> workload.Lengths:
    if "," in text:
        prompt, _, output = text.partition(",")
        return lengths.Pair(lengths.parse_side(prompt), lengths.parse_side(output))
    return lengths.named(text)


def simulate(
    scenario: Scenario, policy: PolicyConfig, *, steady: bool = False, observers: Iterable[Observer] = ()
) -> dict[str, Any]:
    """Run the scenario; the result as plain data. steady: count only requests in the steady part."""
    window = (STEADY[0] * scenario.span, STEADY[1] * scenario.span) if steady else (0.0, math.inf)
    summary = Summary(targets_of(policy), window)
    engine, clock = build_simulation(
        scenario.model,
        scenario.device,
        policy,
        tensor_parallel=scenario.tensor_parallel,
        pipeline_parallel=scenario.pipeline_parallel,
        whole_devices=scenario.devices == 2,
        blocks=scenario.kv_blocks,
        block_size=scenario.block_size,
        observers=(summary, *observers),
    )
    run(engine, clock, scenario.arrive(), summary)
    engine.check_idle()
    return summary.data()


def find_goodput(scenario: Scenario, policy: PolicyConfig, precision: float = PRECISION) -> dict[str, Any]:
    """The highest rate at which `GOAL` of the requests meet both targets, by bisection to `precision`
    (relative), and the result there. All rates see the same requests (common random numbers)."""
    if scenario.trace is not None:
        raise ConfigError("--find-goodput varies the rate; a trace has its own (--trace-speed scales it)")
    if all(target == Targets() for target in targets_of(policy).values()):
        raise ConfigError("--find-goodput needs --ttft-slo or --tpot-slo")

    def at(rate: float) -> dict[str, Any]:
        return simulate(dataclasses.replace(scenario, rate=rate), policy, steady=True)

    low, high, best = 0.0, scenario.rate, None
    while high < 1e5 and (found := at(high))["attainment"] >= GOAL:
        low, high, best = high, 2.0 * high, found
    if best is None:
        low = high / 2.0
        while low > 1e-3 and (best := at(low))["attainment"] < GOAL:
            low, high, best = low / 2.0, low, None
        if best is None:
            return {**at(1e-3), "goodput": 0.0}
    while high - low > precision * high:
        middle = (low + high) / 2.0
        found = at(middle)
        if found["attainment"] >= GOAL:
            low, best = middle, found
        else:
            high = middle
    return {**best, "goodput": low}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `semipd simulate`."""
    add_flags(parser.add_argument_group("Simulation"), Scenario)
    add_flags(parser.add_argument_group("Scheduling"), PolicyConfig)
    parser.add_argument("--find-goodput", action="store_true", help="bisect the rate at 90%% attainment")
    parser.add_argument("--timeline", metavar="FILE", help="write a Chrome trace of the lanes")
    parser.add_argument("--plot", metavar="DIR", help="pictures: latency against rate, split over time")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")


def run_command(options: argparse.Namespace) -> int:
    """Run `semipd simulate`: a table, then one JSON line. Raises ConfigError."""
    scenario = from_flags(Scenario, options)
    names = [entry.name for entry in dataclasses.fields(PolicyConfig)]
    policy = from_mapping({name: getattr(options, name) for name in names}).policy
    timeline = Timeline()
    pictures = _picture_folder(options.plot) if options.plot else None
    if options.find_goodput:
        result = find_goodput(scenario, policy)
        scenario = dataclasses.replace(scenario, rate=max(result["goodput"], 1e-3))
    else:
        observers = [timeline] if options.timeline or options.plot else []
        result = simulate(scenario, policy, observers=observers)
    if options.find_goodput and (options.timeline or options.plot):
        simulate(scenario, policy, observers=[timeline])
    if options.timeline:
        timeline.write(Path(options.timeline))
    if pictures is not None:
        _plot(pictures, scenario, policy, timeline)
    named = {"model": scenario.model, "device": scenario.device, "policy": policy.policy}
    result = {**named, "split": policy.split, "rate": scenario.rate, "seed": scenario.seed, **result}
    if not options.json:
        Console().print(_table(result))
    sys.stdout.write(json_line(result) + "\n")
    return 0


def _table(result: dict[str, Any]) -> Table:
    title = f"{result['model']} on {result['device']}, {result['policy']}, {result['rate']:.3g} req/s"
    table = Table(title=title)
    for heading in ("", "mean", "p50", "p90", "p99"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in ("ttft", "tpot", "itl", "e2e"):
        figures = result[f"{name}_s"]
        cells = (f"{1e3 * figures[key]:.1f} ms" for key in ("mean", "p50", "p90", "p99"))
        table.add_row(name.upper(), *cells)
    table.add_section()
    for label, key, shape in (
        ("goodput", "goodput", "{:.2f} req/s"),
        ("attainment", "attainment", "{:.1%}"),
        ("requests", "request_throughput", "{:.2f} /s"),
        ("output tokens", "output_throughput", "{:.0f} /s"),
        ("KV peak", "kv_peak", "{:.1%}"),
        ("split switches", "split_switches", "{}"),
    ):
        if key in result:
            table.add_row(label, shape.format(result[key]), "", "", "")
    if result["refused"]:  # they count as missed, so an attainment may have no other reason
        table.add_row("refused: too long", str(result["refused"]), "", "", "")
    return table


def _picture_folder(path: str) -> Path:
    """The folder, made. Raises ConfigError where there can be no pictures: before anything is simulated."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib")
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--plot: cannot make the folder {path}: {error.strerror}") from None
    return folder


def _plot(folder: Path, scenario: Scenario, policy: PolicyConfig, timeline: Timeline) -> None:
    from matplotlib import pyplot

    timeline.plot_split(folder / "split.png")
    if scenario.trace is not None:
        return
    rates = [scenario.rate * factor for factor in (0.25, 0.5, 0.75, 1.0, 1.25)]
    results = [simulate(dataclasses.replace(scenario, rate=rate), policy) for rate in rates]
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for axes, name in zip(panels, ("ttft_s", "tpot_s"), strict=True):
        for key in ("mean", "p90", "p99"):
            axes.plot(rates, [1e3 * result[name][key] for result in results], "o-", label=key)
        axes.set(xlabel="requests per second", ylabel=f"{name[:-2].upper()}, ms", yscale="log")
        axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "latency.png", dpi=120)
    pyplot.close(figure)
