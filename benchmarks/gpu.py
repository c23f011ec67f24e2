"""The GPU engine on one card, random bf16 weights in the shape of an 8B model. Ends in under 9 minutes.

    python3 -m benchmarks.gpu                    # WHEELS=folder unpacks wheels first
    python3 -m benchmarks.gpu --parts steps kernels --shape 0.5b

Parts, in this order:
  steps         prefill and decode alone on the whole card; host time per decode step
  kernels       where the time of a layer goes, operation by operation
  tiles         other sizes for attention's kernels, beside those in use
  offline       1000 tokens in, 1000 out, 256 sequences at a time
  profile       step times over shares of the card, alone and beside each other
  mixed         token streams beside long prompts, every way on the same arrivals; goodput of the best
  predicted     the same in the simulator, from that profile
  transformers  its own continuous batching on the same card, and the same load on this engine
Left out unless named: kernels, tiles, transformers. Without a GPU: one line and exit code 0.
--out is written anew whenever a part, or a way of the mixed load, ends: who cuts this short loses little.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.bare import prepare
from benchmarks.machine import deliver, describe, write_json
from benchmarks.shapes import SHAPES, write_shape

if TYPE_CHECKING:  # what a bare machine imports must come after `prepare`
    from semipd.execute.backend import Backend

# Last what cannot be cut short.
PARTS = ("steps", "kernels", "tiles", "offline", "profile", "mixed", "predicted", "transformers")
USUAL = ("steps", "offline", "profile", "mixed", "predicted")
BUDGET = 480.0  # seconds from the start after which nothing more is begun


@dataclass(frozen=True)
class Scale:
    """How large everything is. The tests have a small one.

    prompts: tokens. steps: (sequences, tokens of context). offline: (sequences, tokens in, tokens out);
    peers: the same beside transformers. chunks: of the policy that mixes. long, typical: tokens of the two
    kinds of prompts; outputs: most tokens. ttft, tpot: targets in seconds. profile: seconds that it may
    take. graph_sides: splits with captured graphs."""

    slots: int = 258
    longest: int = 16384
    prompts: tuple[int, ...] = (512, 2048, 8192)
    steps: tuple[tuple[int, int], ...] = ((1, 1024), (64, 1024), (64, 2048), (128, 1024), (256, 1024))
    offline: tuple[int, int, int] = (256, 1000, 1000)
    peers: tuple[int, int, int] = (128, 1000, 100)
    chunks: tuple[int, ...] = (256, 512, 1024, 2048)
    long: int = 8192
    typical: float = 180.0
    outputs: int = 1000
    ttft: float = 1.0
    tpot: float = 0.04
    profile: float = 70.0
    graph_sides: int = 6


@dataclass
class Setup:
    """What all parts share: one loaded executor and how to make an engine on it."""

    executor: Any
    backend: Backend
    folder: Path
    scale: Scale
    blocks: int
    costs: dict[str, float]
    dtype: str = "bfloat16"
    say: Callable[[str], None] = print
    deadline: float = math.inf  # of time.monotonic
    profile: dict[str, Any] | None = None
    note: Callable[[str, Any], None] = lambda part, found: None  # keeps what a part has found so far

    @property
    def vocabulary(self) -> int:
        return int(self.executor._model.spec.vocabulary)

    def left(self) -> float:
        """Seconds until nothing more should begin."""
        return self.deadline - time.monotonic()

    def engine(self, policy: Any, observers: Sequence[Any], executor: Any = None, clock: Any = None) -> Any:
        """The engine under this policy, on the card or on another executor with its clock."""
        from semipd.core.engine import Engine
        from semipd.core.kv import BlockPool
        from semipd.core.policies import observers_of
        from semipd.core.types import Lane

        pool = BlockPool(self.blocks, 16, False)
        return Engine(
            executor or self.executor,
            policy,
            {Lane.PREFILL: pool, Lane.DECODE: pool},
            clock or DeviceClock(self.backend),
            max_sequences=self.scale.slots - 2,
            max_length=self.scale.longest,
            observers=[*observers, *observers_of(policy)],
        )

    def timer(self) -> Any:
        from semipd.execute.profile_cuda import Sizes, StepTimer

        longest = self.scale.longest
        sizes = Sizes(self.scale.slots, self.blocks, 16, longest, longest)
        return StepTimer(self.executor, sizes, self.vocabulary)


@dataclass(frozen=True)
class DeviceClock:
    """The executor's own clock, for the planner."""

    backend: Any

    def now(self) -> float:
        return float(self.backend.now())


def load(backend: Backend, shape: str, folder: Path, memory_share: float, scale: Scale) -> Setup:
    """Load random weights, fill the KV pool with noise (zeros take less power than data)."""
    from semipd.execute.cuda_start import Shape, start_cuda

    write_shape(shape, folder)
    begin = time.perf_counter()
    longest = scale.longest
    started = start_cuda(
        backend,
        folder,
        Shape(scale.slots, longest, most_rows=longest, memory_share=memory_share),
        load_format="dummy",
        graph_sides=scale.graph_sides,
    )
    started.executor.fill_with_noise()
    seconds = time.perf_counter() - begin
    print(f"loaded in {seconds:.1f} s; KV pool of {started.blocks * 16} tokens", flush=True)
    started.executor.capture_graphs()  # else it would happen between the first requests that are measured
    rest = time.perf_counter() - begin - seconds
    costs = {"load_seconds": seconds, **started.costs, "other_graphs_seconds": rest}
    costs["all_graphs_bytes"] = float(started.executor.graphs.nbytes)
    for name, value in costs.items():
        print(f"  {name:20s} {value:14.2f}")
    dtype = SHAPES[shape]["torch_dtype"]
    return Setup(started.executor, backend, folder, scale, started.blocks, costs, dtype)


def run_parts(setup: Setup, parts: Sequence[str], rate: float, seconds: float) -> dict[str, Any]:
    """Run these parts in their order; an error or the end of the time costs one part alone."""
    from benchmarks import gpu_load, gpu_steps

    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "steps": lambda: gpu_steps.run_steps(setup),
        "kernels": lambda: gpu_steps.run_kernels(setup),
        "tiles": lambda: gpu_steps.run_tiles(setup),
        "offline": lambda: gpu_load.run_offline(setup),
        "transformers": lambda: gpu_load.run_transformers(setup),
        "profile": lambda: gpu_steps.run_profile(setup),
        "mixed": lambda: gpu_load.run_mixed(setup, rate, seconds),
        "predicted": lambda: gpu_load.run_predicted(setup, rate, seconds, result.get("mixed")),
    }
    result: dict[str, Any] = {}
    for part in PARTS:
        if part not in parts:
            continue
        if setup.left() <= 0.0:
            setup.say(f"{part} left out: the time is up")
            setup.note(part, {"left_out": True})
            continue
        setup.say(part)
        begin = time.monotonic()
        try:
            result[part] = runs[part]()
        except Exception as error:  # one part must not cost the others their time on the card
            setup.say(f"  failed: {type(error).__name__}: {error}")
            result[part] = {"error": f"{type(error).__name__}: {error}"}
        setup.note(part, result[part])
        setup.say(f"  ({time.monotonic() - begin:.0f} s)")
    return result


def open_card() -> Backend:
    from semipd.execute.cuda_backend import CudaBackend

    return CudaBackend()


def main(
    arguments: Sequence[str] | None = None,
    card: Callable[[], Backend] | None = None,
    scale: Scale = Scale(),
) -> int:
    """card, scale: what the tests run this on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(USUAL), metavar="PART")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--rate", type=float, default=20.0, help="requests per second of the mixed load")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the mixed load")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    if card is None and (why := prepare()) is not None:
        print(f"GPU benchmark skipped: {why}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        share = 0.55 if "transformers" in options.parts else 0.9
        setup = load((card or open_card)(), options.shape, Path(folder), share, scale)
        setup.deadline = begin + BUDGET
        device = setup.executor.device
        result: dict[str, Any] = {
            "benchmark": "gpu",
            "shape": options.shape,
            "machine": describe(),
            "gpu": device.name,
            "legal_splits": device.legal_splits,
            "start": setup.costs,
        }

        def note(part: str, found: Any) -> None:
            result[part] = found
            if options.out:
                write_json(options.out, result)

        setup.note = note
        note("start", setup.costs)
        run_parts(setup, options.parts, options.rate, options.seconds)
        setup.executor.close()
    deliver(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
