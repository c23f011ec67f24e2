"""From a model folder to a GPU executor: weights, the memory plan, partitions, graphs, warm kernels."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from semipd.core.errors import ConfigError
from semipd.core.types import Lane
from semipd.execute.backend import Backend, Side
from semipd.execute.cuda import LANES, CudaExecutor
from semipd.execute.cuda_graphs import SIDES_AT_START, DecodeGraphs, buckets
from semipd.execute.cuda_lane import LaneState
from semipd.execute.cuda_partition import Placement
from semipd.execute.device_storage import DeviceStorage
from semipd.model.device_model import DeviceModel, buffer_bytes, load_device_model
from semipd.model.ops import TILE, DeviceStep
from semipd.model.sampler_device import (
    DeviceAdjustments,
    DeviceMasks,
    DeviceRules,
    chances_on_device,
    sample_on_device,
)
from semipd.model.spec import ModelSpec, load_spec

GRAPH_BYTES = 2**30  # what captured graphs may take, kept free for them
GIB = 2**30

log = logging.getLogger("semipd")


@dataclass(frozen=True)
class Shape:
    """Sizes of an executor. blocks: of the KV pool, or None for what fits. max_length: most tokens of one
    sequence; `fixed_length`: refuse rather than lower it. most_rows: positions of one step."""

    slots: int
    max_length: int
    block_size: int = 16
    blocks: int | None = None
    fixed_length: bool = True
    most_rows: int = 2304
    memory_share: float = 0.9


@dataclass(frozen=True)
class Started:
    """An executor, and the sizes that it has. costs: what its start took, seconds and bytes of the device's
    memory by name."""

    executor: CudaExecutor
    blocks: int
    max_length: int
    costs: Mapping[str, float]


def start_cuda(
    backend: Backend,
    folder: str | os.PathLike[str],
    shape: Shape,
    *,
    dtype: str = "auto",
    load_format: str = "auto",
    seed: int = 0,
    depth: int = 2,
    graph_sides: int = SIDES_AT_START,
) -> Started:
    """Load the model and put an executor on it; blocks until graphs are captured. graph_sides: splits whose
    graphs are captured now, the others' when the device is idle; 0 for no graphs at all. Raises ConfigError
    with what was needed when memory does not suffice."""
    spec = load_spec(os.fspath(folder))
    with _memory_errors(backend, spec):
        _check_memory(backend, spec, shape, dtype)
        model = load_device_model(
            os.fspath(folder),
            str(backend.device),
            positions=shape.max_length,
            dtype=dtype,
            load_format=load_format,
            seed=seed,
        )
        states = _lanes(backend, model, shape)
        most_rows = states[0].buffers.hidden.shape[0]
        blocks, max_length = _pool(backend, model, shape)
        storage = DeviceStorage(backend, model, shape.slots, max_length, blocks, shape.block_size, folder)
        costs = _Costs(backend)
        placement = Placement(
            {lane: backend.whole(lane) for lane in LANES}, backend.partition(), backend.units
        )
        costs.note("partitions")
        graphs = _warm_all(backend, model, storage, states, placement, graph_sides, costs)
    _announce(backend, placement, blocks * shape.block_size, graphs)
    executor = CudaExecutor(
        backend, model, storage, placement, states, graphs, most_rows=most_rows, depth=depth
    )
    return Started(executor, blocks, max_length, costs.found)


def _warm_all(
    backend: Backend,
    model: DeviceModel,
    storage: DeviceStorage,
    states: list[LaneState],
    placement: Placement,
    graph_sides: int,
    costs: _Costs,
) -> DecodeGraphs:
    """Run every kernel of both lanes once, then capture the first graphs."""
    decode = next(state for state in states if state.lane is Lane.DECODE)
    slots = storage.table.slots
    graphs = DecodeGraphs(
        backend, model, storage, decode.buffers, decode.ops, slots, GRAPH_BYTES, graph_sides > 0
    )
    backend.settle()  # what was made so far was filled on another stream than those that read it
    for state in states:
        _warm(backend, model, storage, state, placement.sides(state.lane))
    costs.note("warming")
    sides = placement.sides(Lane.DECODE)
    graphs.capture_all(_spread(sides, graph_sides))
    for side in sides:
        graphs.wish(side)
    costs.note("graphs")
    return graphs


class _Costs:
    """Notes the time and the memory that a part of the start took, since the part before it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.found: dict[str, float] = {}
        self._free, self._begin = backend.memory()[0], time.perf_counter()

    def note(self, part: str) -> None:
        free, now = self._backend.memory()[0], time.perf_counter()
        self.found[f"{part}_seconds"] = now - self._begin
        self.found[f"{part}_bytes"] = float(self._free - free)
        self._free, self._begin = free, now


def _check_memory(backend: Backend, spec: ModelSpec, shape: Shape, dtype: str) -> None:
    """Refuse, before anything is read, what the device cannot hold. Raises ConfigError."""
    itemsize = 4 if (spec.dtype if dtype == "auto" else dtype) == "float32" else 2
    rows, samples = _heights(shape)
    weights = spec.weight_bytes(itemsize)
    buffers = len(LANES) * buffer_bytes(spec, itemsize, rows, samples)
    free, total = backend.memory()
    if weights + buffers > free:
        raise ConfigError(
            f"out of GPU memory: the weights need {weights / GIB:.2f} GiB and the buffers of both lanes "
            f"{buffers / GIB:.2f}; {free / GIB:.2f} of {total / GIB:.1f} GiB are free; use a smaller "
            "model, or lower --max-num-seqs (and --chunk-tokens)"
        )


def _heights(shape: Shape) -> tuple[int, int]:
    """(rows, samples) of a lane's buffers, enough for the largest graph too."""
    samples = max(buckets(shape.slots)[-1], shape.slots)
    return max(shape.most_rows, samples), samples


def _lanes(backend: Backend, model: DeviceModel, shape: Shape) -> list[LaneState]:
    """Both lanes with their buffers."""
    rows, samples = _heights(shape)
    return [
        LaneState(lane, model.buffers(rows, samples), backend.ops(model, samples), model.spec.layers)
        for lane in LANES
    ]


def _pool(backend: Backend, model: DeviceModel, shape: Shape) -> tuple[int, int]:
    """(blocks, max_length) of the KV pool. Raises ConfigError with what is needed and what there is."""
    spec, size = model.spec, shape.block_size
    block_bytes = spec.kv_bytes_per_token(model.dtype.itemsize) * size
    free, total = backend.memory()
    tables = DeviceStorage.table_bytes(shape.slots, shape.max_length, size)
    usable = int(free - (1.0 - shape.memory_share) * total - GRAPH_BYTES - tables)
    fitting = max(usable // block_bytes - 1, 0)
    if shape.blocks is not None and shape.blocks * size < shape.max_length:
        raise ConfigError(
            f"the KV pool holds {shape.blocks * size} tokens, less than one sequence of "
            f"{shape.max_length}: lower --max-model-len, or raise the pool to "
            f"{-(-shape.max_length // size)} blocks"
        )
    needed = shape.blocks if shape.blocks is not None else -(-shape.max_length // size)
    blocks = shape.blocks if shape.blocks is not None else fitting
    if shape.blocks is None and not shape.fixed_length and size <= fitting * size < shape.max_length:
        log.info("sequences are limited to %d tokens by the GPU's free memory", fitting * size)
        return fitting, fitting * size
    if needed > fitting:
        raise ConfigError(
            f"out of GPU memory: the KV pool needs {(needed + 1) * block_bytes / GIB:.2f} GiB for "
            f"{needed * size} tokens, and {max(usable, 0) / GIB:.2f} GiB of {total / GIB:.1f} are left "
            f"beside weights, buffers and graphs; lower --max-model-len or --kv-blocks, or raise "
            f"--gpu-memory-share (now {shape.memory_share:g})"
        )
    return blocks, shape.max_length


@contextmanager
def _memory_errors(backend: Backend, spec: ModelSpec) -> Iterator[None]:
    """Turn the allocator's error into one line that says what to lower; a failed start gives the device
    back."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = backend.memory()
        backend.close()
        raise ConfigError(
            f"out of GPU memory: the weights take {spec.weight_bytes() / GIB:.2f} GiB at 2 bytes each, and "
            f"{free / GIB:.2f} of {total / GIB:.1f} GiB are free; lower --max-num-seqs or --max-model-len, "
            "or use a smaller model"
        ) from error
    except BaseException:
        backend.close()
        raise


def _warm(
    backend: Backend, model: DeviceModel, storage: DeviceStorage, state: LaneState, sides: tuple[Side, ...]
) -> None:
    """Run every kind of step once on scratch, so that no request waits for a compiler: kernels differ by
    the side's size and the number of single rows, so all of these run a layer on every side. Each stream
    gets its cuBLAS workspace on the way."""
    rows = TILE + 4
    longest = min(rows, storage.table.max_length)
    most = min(storage.table.slots, state.buffers.logits.shape[0])
    singles = [2**power for power in range(most.bit_length())]
    work = [(sides[0], 0, longest, model.spec.layers)] if longest > 1 else []
    work += [
        (side, alone, 0, model.spec.layers if side is sides[0] else 1)
        for side in sides
        for alone in singles
    ]
    for side, alone, tiled, layers in work:
        with torch.inference_mode(), backend.on(side):
            step = _scratch_step(backend, storage, alone, min(tiled, TILE))
            _plan_scratch(storage, state, alone, min(tiled, TILE))
            units = partial(getattr, side, "units")
            launches = model.launch(step, state.buffers, storage.kv, state.ops, units)
            for _ in itertools.islice(launches, layers):
                pass
            if side is sides[0] and alone == 1:
                _warm_sampling(backend, state)
        event = backend.record(side)
        while not event.done():
            backend.rest(threading.Event(), 1e-3)


def _warm_sampling(backend: Backend, state: LaneState) -> None:
    """Draw a token by every rule: a kernel's first launch loads it, which may wait for the device."""
    chances, whole = (
        backend.upload(np.full((1, 1), 0.5)).float()[0],
        backend.upload(np.ones((1, 1), np.int64)),
    )
    for filtered in (False, True):
        rules = DeviceRules(
            temperature=chances,
            top_p=chances,
            min_p=chances,
            top_k=whole[0],
            seed=whole[0],
            position=whole[0],
            banned=whole,
            banning=whole[0] != 0,
            filtered=filtered,
            adjustments=DeviceAdjustments(
                *(whole[0] * 0, whole.int(), whole[0], whole[0] * 0),
                *(chances, chances, chances),
                bias_tokens=whole,
                bias=chances[None],
            ),
            masks=DeviceMasks(
                whole[0] * 0, whole.expand(1, -(-state.buffers.logits.shape[1] // 64)).contiguous()
            ),
        )
        ids = sample_on_device(state.buffers.logits[:1], rules)
        chances_on_device(state.buffers.logits[:1], ids, 1)


def _plan_scratch(storage: DeviceStorage, state: LaneState, alone: int, tiled: int) -> None:
    """`Ops.plan` for `_scratch_step`."""
    if state.ops.plans:
        counts = np.array([1] * alone + [tiled] * bool(tiled), np.int64)
        state.ops.plan(storage.outline(np.full_like(counts, storage.scratch), 0 * counts, counts))


def _scratch_step(backend: Backend, storage: DeviceStorage, alone: int, tiled: int) -> DeviceStep:
    """`alone` single rows and a tile of `tiled` rows, all of the scratch slot."""
    rows = alone + tiled
    positions = np.concatenate((np.zeros(alone, np.int64), np.arange(tiled)))
    tiles = np.array([[storage.scratch, 0, alone, tiled]] if tiled else [], np.int64).reshape(-1, 4)
    return DeviceStep(
        backend.upload(np.full(rows, storage.scratch)),
        backend.upload(positions),
        storage.tokens,
        storage.tables,
        backend.upload(tiles),
        backend.upload(np.arange(alone)),
        backend.upload(np.arange(1)) if tiled else None,
    )


def _spread(sides: tuple[Side, ...], count: int) -> list[Side]:
    """The whole device and up to count - 1 partitions, evenly over their sizes."""
    if count < 1:
        return []
    parts, wanted = sides[1:], min(count - 1, len(sides) - 1)
    step = len(parts) / wanted if wanted else 0.0
    return [sides[0], *(parts[int((index + 0.5) * step)] for index in range(wanted))]


def _announce(backend: Backend, placement: Placement, tokens: int, graphs: DecodeGraphs) -> None:
    splits = ", ".join(f"{prefill}:{decode}" for prefill, decode in placement.legal_splits)
    log.info("%s: %d SMs, splits %s", backend.name, backend.units, splits or "none (both lanes share)")
    log.info("KV pool of %d tokens; graphs take %.0f MiB", tokens, graphs.nbytes / 2**20)
