"""The same arrivals through the engine on this machine and through the engine simulated on a profile
of it: what the two benchmarks of their agreement share."""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES, write_shape
from semipd.bench.profile import ProfileOptions, profile, write_device
from semipd.bench.simulate import Summary
from semipd.build import build_engine, build_simulation
from semipd.config import from_mapping
from semipd.core.engine import Engine
from semipd.core.partition import Targets
from semipd.core.ports import Observer
from semipd.core.types import Request, Sampling, Slice, Work
from semipd.execute.device_file import load_device
from semipd.execute.sim import VirtualClock
from semipd.execute.step_profile import ProfiledCost
from semipd.trace import Arrival

LONGEST = 2048
BATCH = 4  # streams that are assumed to decode together when a load is scaled to the machine


@dataclass(frozen=True)
class Machine:
    """A model folder, a fresh profile of it on this machine, and what follows from both."""

    shape: str
    folder: Path
    device: Path

    @property
    def cost(self) -> ProfiledCost:
        device = load_device(str(self.device))
        assert device.steps is not None
        return ProfiledCost(device.steps, device.step_seconds, device.sequence_seconds)

    @property
    def units(self) -> int:
        return load_device(str(self.device)).units

    def prompt_seconds(self, tokens: int) -> float:
        """A lone prompt on all cores."""
        return self.cost.seconds(Work.of([Slice(0, 0, tokens)]), self.units)

    def token_seconds(self, batch: int = BATCH, context: int = 300) -> float:
        """A lone decode step on all cores."""
        return self.cost.seconds(Work.decode(batch, batch * context), self.units)

    def rate(self, lengths: Sequence[tuple[int, int]], load: float) -> float:
        """Requests of these (prompt, output) lengths per second that keep the machine busy for `load` of
        its time, when `BATCH` streams decode together and one phase runs at a time."""
        token = self.token_seconds() / BATCH
        work = [self.prompt_seconds(prompt) + output * token for prompt, output in lengths]
        return load * len(work) / sum(work)


@contextmanager
def machine(shape: str, seconds: float, device: Path | None = None) -> Iterator[Machine]:
    """Write the model's folder and profile it, unless a device file of it is given."""
    with model_of(shape) as model:
        file = device or model.parent / "cpu.json"
        if device is None:
            write_device(profile(str(model), profiling(seconds)), file)
        yield Machine(shape, model, file)


@contextmanager
def model_of(shape: str) -> Iterator[Path]:
    """A folder with a config of this shape and no weights; random ones are made when it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        yield write_shape(shape, Path(folder) / shape)


def profiling(seconds: float) -> ProfileOptions:
    """How a model of random weights is profiled."""
    return ProfileOptions(seconds=seconds, load_format="dummy")


def lengths(
    generator: random.Random, prompts: tuple[int, int], outputs: tuple[int, int]
) -> tuple[int, int]:
    """Log-uniform (prompt, output) between the bounds."""

    def draw(low: int, high: int) -> int:
        return round(math.exp(generator.uniform(math.log(low), math.log(high))))

    return draw(*prompts), draw(*outputs)


def poisson(
    generator: random.Random, pairs: Sequence[tuple[int, int]], rate: float, start: float, seconds: float
) -> list[Arrival]:
    """Poisson arrivals for so long, their lengths drawn from `pairs`."""
    found, now = [], start
    while (now := now + generator.expovariate(rate)) < start + seconds:
        found.append(Arrival(now, *generator.choice(pairs)))
    return found


def run_real(
    machine: Machine, settings: Mapping[str, Any], arrivals: Sequence[Arrival], targets: Targets
) -> dict[str, Any]:
    """The arrivals in real time on a fresh engine."""
    config = {
        "model": str(machine.folder),
        "device": "cpu",
        "load_format": "dummy",
        "prefix_cache": False,
        "max_model_len": LONGEST,
        "max_num_seqs": 32,
        **settings,
    }
    summary = Summary({"default": targets})
    observers: list[Observer] = [summary]
    engine = build_engine(from_mapping(config), observers)
    try:
        vocabulary = SHAPES[machine.shape]["vocab_size"]
        _warm_up(engine, vocabulary)
        for attribute, value in vars(Summary({"default": targets})).items():
            setattr(summary, attribute, value)
        _feed(engine, arrivals, vocabulary)
        return summary.data()
    finally:
        engine.executor.close()


def run_simulated(
    machine: Machine, settings: Mapping[str, Any], arrivals: Sequence[Arrival], targets: Targets
) -> dict[str, Any]:
    """The same in virtual time, with the profile for the machine."""
    policy = from_mapping({"max_num_seqs": 32, **settings}).policy
    summary = Summary({"default": targets})
    blocks = 2 * 32 * LONGEST // 16
    engine, _ = build_simulation(
        str(machine.folder), str(machine.device), policy, blocks=blocks, observers=[summary]
    )
    _feed(engine, arrivals, 0)
    return summary.data()


def _feed(engine: Engine, arrivals: Sequence[Arrival], vocabulary: int) -> None:
    """Run until all are done. Lengths are known to the engine as `max_tokens`, on both sides alike.

    vocabulary: of the random tokens of real prompts; 0: tokens are not looked at."""
    clock, generator = engine.clock, random.Random(1)
    start = clock.now()
    requests = []
    for number, arrival in enumerate(arrivals):
        size = arrival.prompt_tokens
        prompt = [generator.randrange(vocabulary) for _ in range(size)] if vocabulary else range(size)
        moment = start + arrival.time
        requests.append(Request(str(number), prompt, arrival.output_tokens, Sampling(), arrival=moment))
    requests.reverse()
    while requests or not engine.idle:
        while requests and requests[-1].arrival <= clock.now():
            engine.add(requests.pop())
        upcoming = requests[-1].arrival if requests else None
        if engine.idle:
            if upcoming is None:
                return
            if isinstance(clock, VirtualClock):
                clock.time = max(clock.time, upcoming)
            else:
                time.sleep(max(upcoming - clock.now(), 0.0))
        else:
            engine.step(upcoming)


def _warm_up(engine: Engine, vocabulary: int) -> None:
    """Touch code and memory once on both lanes."""
    for number, tokens in enumerate((16, 64, 512)):
        prompt = [(7 * index) % vocabulary for index in range(tokens)]
        engine.add(Request(f"warm{number}", prompt, 8, Sampling(), arrival=engine.clock.now()))
    while not engine.idle:
        engine.step()
