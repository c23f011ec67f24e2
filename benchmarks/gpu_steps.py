"""Single steps on the card: their times, where they go, and what other tiles would give."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu import Setup

TARGETS = {  # milliseconds on one H200, from the issue that asked for them
    "prefill 2048": 50.0,
    "prefill 8192": 235.0,
    "decode 1x1024": 5.2,
    "decode 64x1024": 8.0,
    "decode 128x1024": 11.0,
    "host overhead per decode step": 0.15,
}
PREFILL_TILES = ((64, 4, 2), (64, 8, 2), (64, 8, 3), (128, 8, 2), (128, 8, 3))  # block, warps, stages
DECODE_TILES = ((32, 4, 5), (64, 4, 2), (64, 4, 3), (64, 4, 5), (128, 4, 3), (128, 8, 3))
ONCE = ("embed", "head", "greedy")  # in a step; the others in every layer
SHARES = (1, 2, 4)  # decode's number of parts, for so much of the card


def run_steps(setup: Setup) -> dict[str, Any]:
    """Prefill and decode alone on the whole card, in milliseconds, and what the host takes per step."""
    from semipd.core.types import Lane, Split

    timer, units = setup.timer(), setup.executor.device.units
    found: dict[str, Any] = {}
    setup.executor.resize(Split.lone(Lane.PREFILL, units))
    for tokens in setup.scale.prompts:
        found[f"prefill {tokens}"] = 1e3 * statistics.median(timer.prefill(tokens))
    setup.executor.resize(Split.lone(Lane.DECODE, units))
    for batch, context in setup.scale.steps:
        if timer.can_decode(batch, context):
            found[f"decode {batch}x{context}"] = 1e3 * statistics.median(timer.decode(batch, context, 20))
    for batch in dict.fromkeys(batch for batch, _ in setup.scale.steps):
        found[f"host overhead at {batch}"] = 1e3 * host_overhead(timer, batch, setup.scale.steps[0][1])
    found["host overhead per decode step"] = max(
        value for name, value in found.items() if name.startswith("host overhead at")
    )
    for name, value in found.items():
        target = TARGETS.get(name)
        verdict = (
            "" if target is None else f"   target {target:g}: {'met' if value <= target else 'missed'}"
        )
        setup.say(f"  {name:32s} {value:9.3f} ms{verdict}")
    return found


def host_overhead(timer: Any, batch: int, context: int, steps: int = 50) -> float:
    """Median host seconds to check, pack and launch one decode step."""
    from semipd.core.types import Lane

    executor = timer.executor
    batches = timer._decode_batches(batch, context)
    times = []
    for _ in range(steps):
        step = next(batches)
        begin = time.perf_counter()
        executor.submit(Lane.DECODE, step)
        executor._launch_due()
        times.append(time.perf_counter() - begin)
        while not executor.wait(None):
            pass
    return statistics.median(times)


def run_profile(setup: Setup) -> dict[str, Any]:
    """Curves over shares, as `semipd profile` measures them, for a while."""
    from semipd.execute.profile_cuda import measure

    budget = min(setup.scale.profile, max(setup.left() - 30.0, 1.0))
    setup.profile = measure(setup.timer(), setup.say, budget=budget)
    return setup.profile


def run_kernels(setup: Setup) -> dict[str, Any]:
    """Milliseconds of each operation of one layer, times the layers, for prompts and decode steps."""
    found: dict[str, Any] = {}
    for name, step, lane in steps_of(setup):
        times = {}
        for operation, launch in operations(setup, step, lane):
            count = 1 if operation in ONCE else setup.executor._model.spec.layers
            count *= 2 if operation == "norm" else 1
            times[operation] = 1e3 * count * timed(setup, lane, launch)
        times["sum"] = sum(times.values())
        found[name] = times
        setup.say(f"  {name}: " + ", ".join(f"{key} {value:.2f}" for key, value in times.items()) + " ms")
    return found


def run_tiles(setup: Setup) -> dict[str, Any]:
    """Microseconds of attention in one layer for every tile, those in use marked."""
    found: dict[str, Any] = {}
    for name, step, lane in steps_of(setup):
        state = setup.executor._lanes[lane]
        if not hasattr(state.ops, "decode_tiles"):
            setup.say("  these are no Triton kernels: there are no tiles to choose")
            return {}
        rows = dict(tried(setup, step, lane))
        found[name] = rows
        best = min((key for key in rows if rows[key] is not None), key=lambda key: rows[key])
        shown = ", ".join(
            f"{key} {value:.0f}" if value is not None else f"{key} does not run"
            for key, value in rows.items()
        )
        setup.say(f"  {name}: best {best}; {shown} us")
    return found


def tried(setup: Setup, step: Any, lane: Any) -> Iterator[tuple[str, float | None]]:
    """(tile, microseconds), the one in use first; None where the card cannot run it."""
    from semipd.model.ops_triton import Tile

    executor, ops = setup.executor, setup.executor._lanes[lane].ops
    prefill = step.tiles.shape[0] > 0
    layer = executor._model.layers[0]
    key = (executor._storage.kv.dtype, layer.window is not None)
    used = ops.prefill_tiles[key] if prefill else ops.decode_tiles[key[0]]
    tiles = [used, *(Tile(*tile) for tile in (PREFILL_TILES if prefill else DECODE_TILES))]
    try:
        for tile in dict.fromkeys(tiles):
            if prefill:
                ops.prefill_tiles[key] = tile
            else:
                ops.decode_tiles[key[0]] = tile
            for share in (1,) if prefill else SHARES:
                launch = attention(setup, step, lane, executor.device.units // share)
                label = f"{tile.block}/{tile.warps}/{tile.stages}" + (f" 1/{share}" if share > 1 else "")
                try:
                    yield label, 1e6 * timed(setup, lane, launch)
                except Exception as error:  # too much shared memory, or a compiler that refuses
                    setup.say(f"  {label}: {str(error).splitlines()[0][:100]}")
                    yield label, None
    finally:
        if prefill:
            ops.prefill_tiles[key] = used
        else:
            ops.decode_tiles[key[0]] = used


def steps_of(setup: Setup) -> Iterator[tuple[str, Any, Any]]:
    """(name, step on the device, lane) of the prompts and decode steps that are measured."""
    from semipd.core.types import Lane

    timer = setup.timer()
    for tokens in setup.scale.prompts:
        yield (
            f"prefill {tokens}",
            packed(setup, Lane.PREFILL, next(timer._prefill_batches(tokens))),
            Lane.PREFILL,
        )
    for batch, context in setup.scale.steps:
        if timer.can_decode(batch, context):
            batches = timer._decode_batches(batch, context)
            yield f"decode {batch}x{context}", packed(setup, Lane.DECODE, next(batches)), Lane.DECODE


def packed(setup: Setup, lane: Any, batch: Any) -> Any:
    """This batch's step, sent to the device as the executor would."""
    import torch

    from semipd.execute.device_storage import columns_of

    executor = setup.executor
    storage, side = executor._storage, executor._placement.sides(lane)[0]
    with torch.inference_mode(), setup.backend.on(side):
        ready = storage.pack(batch, columns_of(batch.slices), setup.scale.longest)
        step, _ = storage.step(ready, setup.backend)
    setup.backend.settle()
    return step


def attention(setup: Setup, step: Any, lane: Any, units: int) -> Callable[[], None]:
    executor = setup.executor
    state, layer = executor._lanes[lane], executor._model.layers[0]
    buffers, kv = state.buffers, executor._storage.kv[0]
    qkv, mixed = buffers.qkv[: step.rows], buffers.mixed[: step.rows]
    return lambda: state.ops.attend(qkv, kv, step, layer.heads, layer.window, units, mixed)


def operations(setup: Setup, step: Any, lane: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each operation of a step, as the model launches it."""
    from semipd.model.sampler_device import greedy

    executor, rows = setup.executor, step.rows
    model, state = executor._model, executor._lanes[lane]
    ops, layer, kv, eps = state.ops, model.layers[0], executor._storage.kv[0], model.spec.norm_eps
    own = {name: value[:rows] for name, value in vars(state.buffers).items()}
    samples = rows if step.sample is None else step.sample.shape[0]
    normed, logits = state.buffers.normed[:samples], state.buffers.logits[:samples]
    yield "embed", lambda: ops.embed(step, model._embedding, own["hidden"])
    yield "qkv", lambda: layer.qkv.into(own["qkv"], own["normed"])
    tables = model._cosine, model._sine
    yield "rotate", lambda: ops.rotate_and_store(own["qkv"], kv, step, layer.heads, *tables)
    yield "attention", attention(setup, step, lane, executor.device.units)
    yield "output", lambda: layer.output.into(own["delta"], own["mixed"])
    norm = layer.mlp_norm
    yield "norm", lambda: ops.add_norm(own["hidden"], own["delta"], norm, eps, own["normed"])
    yield "gate and up", lambda: layer.gate_up.into(own["gate_up"], own["normed"])
    yield "gated", lambda: ops.gated(own["gate_up"], own["gated"])
    yield "down", lambda: layer.down.into(own["delta"], own["gated"])
    yield "head", lambda: model._head.into(logits, normed)
    yield "greedy", lambda: greedy(logits)


def timed(setup: Setup, lane: Any, launch: Callable[[], Any], repeats: int = 10) -> float:
    """Seconds of device time of one launch, the mean of `repeats` in a captured graph: a host that
    launches them one by one would be slower than some of them."""
    import torch

    backend, side = setup.backend, setup.executor._placement.sides(lane)[0]

    def launches() -> None:
        with torch.inference_mode():
            for _ in range(repeats):
                launch()

    with backend.on(side):
        launches()
        replay = backend.capture(side, launches)
        replay()
        begin = backend.record(side)
        replay()
        end = backend.record(side)
    backend.settle()
    return float(end.seconds_since(begin)) / repeats
