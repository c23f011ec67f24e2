"""Config to engine: the only file that names concrete classes.

`resolve` turns settings and a model folder into numbers and has no side effect but reading files;
`build_engine` starts processes. Both raise ConfigError with one clear line.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from semipd.config import Config, PolicyConfig
from semipd.core.admission import Admission, Aggressive, Conservative, PastFuture
from semipd.core.auto import Auto
from semipd.core.deadline import ByDeadline
from semipd.core.engine import Engine
from semipd.core.errors import ConfigError
from semipd.core.kv import BlockPool
from semipd.core.order import PromptOrder, PromptWork
from semipd.core.partition import Paper, Shared, Static, Targets
from semipd.core.policies import (
    PREFILL_TOKENS,
    Chunked,
    Disaggregated,
    Limits,
    PrefillFirst,
    SemiPD,
    observers_of,
)
from semipd.core.ports import CostModel, Executor, Observer, Policy
from semipd.core.price import KEPT
from semipd.core.types import Device, Lane, Split
from semipd.execute.choose import has_gpu
from semipd.execute.clock import MonotonicClock
from semipd.execute.cores import available_cores
from semipd.execute.cost import StepCost, kv_capacity
from semipd.execute.device_file import DeviceFile, load_device
from semipd.execute.launch import ResidentProcess
from semipd.execute.sim import Isolated, SimExecutor, VirtualClock
from semipd.execute.step_profile import ProfiledCost, shape_of
from semipd.model.catalogue import CATALOGUE, named_spec
from semipd.model.folder import model_folder
from semipd.model.spec import ModelSpec, load_spec
from semipd.sizing import dtype_of, itemsize, pool_size, stated_pool

DEFAULT_CHUNK_TOKENS = 256
GENERIC_CPU = "cpu-generic"  # what auto predicts with where this machine was not profiled
DEFAULT_TRANSFER_BANDWIDTH = 64 * 10**9  # bytes per second: a PCIe 5 link

log = logging.getLogger("semipd")


@dataclass(frozen=True)
class Resolved:
    """What a Config means for one model on this machine.

    device: cpu or cuda. blocks: KV blocks in the pool; None on a GPU means what fits beside the weights.
    max_length: most tokens of one sequence, or on a GPU what is asked for. cores: CPU ids to use.
    """

    config: Config
    folder: Path
    spec: ModelSpec
    names: tuple[str, ...]
    device: str
    dtype: str
    blocks: int | None
    max_length: int
    cores: tuple[int, ...]

    @property
    def name(self) -> str:
        """The first of the names in the API."""
        return self.names[0]

    @property
    def block_size(self) -> int:
        return self.config.cache.block_size


def resolve(config: Config) -> Resolved:
    """Find the model, read its shape, size the KV pool. Raises ConfigError."""
    folder = model_folder(config.model.model)
    spec = load_spec(folder)
    dtype = dtype_of(config.model.dtype, spec)
    cores = available_cores()
    device = config.model.device
    if device == "auto":
        device = "cuda" if has_gpu() else "cpu"
    blocks: int | None
    if device == "cuda":
        if config.model.quantization != "none":
            raise ConfigError("--quantization is for the CPU: add --device cpu or leave it out")
        blocks, max_length = stated_pool(config, spec, dtype)
    else:
        from semipd.execute.cpu import cpu_device

        if config.model.attention_backend != "triton":
            raise ConfigError("--attention-backend is for the GPU: add --device cuda or leave it out")
        known = cpu_device(len(cores))  # what cannot work is refused before loading
        make_policy(config.policy, known, predictor(config.policy, spec, dtype, known))
        blocks, max_length = pool_size(config, spec, dtype)
    names = config.server.served_model_name or (config.model.model or folder.name,)
    return Resolved(config, folder, spec, names, device, dtype, blocks, max_length, cores)


def build_engine(
    config: Config | Resolved,
    observers: Iterable[Observer] = (),
    resident: ResidentProcess | None = None,
) -> Engine:
    """Start the executor and put the planner on it. Call on the thread that will run `Engine.step`, which
    must outlive the loading at least. The caller closes `engine.executor`. resident: one that was started
    before, for an engine on the CPU."""
    resolved = config if isinstance(config, Resolved) else resolve(config)
    settings = resolved.config
    if resolved.device == "cuda":
        executor, blocks, max_length = _start_cuda(resolved)
    else:
        executor, blocks, max_length = _start_cpu(resolved, resident)
    try:
        known = executor.device
        cost = predictor(settings.policy, resolved.spec, resolved.dtype, known)
        policy = make_policy(settings.policy, known, cost)
    except ConfigError:
        executor.close()
        raise
    pool = BlockPool(blocks, resolved.block_size, settings.cache.prefix_cache)
    return Engine(
        executor,
        policy,
        {Lane.PREFILL: pool, Lane.DECODE: pool},
        MonotonicClock(),
        max_sequences=settings.policy.max_num_seqs,
        max_length=max_length,
        observers=(*observers, *observers_of(policy)),
    )


def _start_cpu(resolved: Resolved, resident: ResidentProcess | None) -> tuple[Executor, int, int]:
    """(executor, KV blocks, most tokens of one sequence)."""
    from semipd.execute.cpu import CpuExecutor

    assert resolved.blocks is not None
    executor = CpuExecutor(
        resolved.folder,
        dtype=resolved.dtype,
        load_format=resolved.config.model.load_format,
        seed=resolved.config.model.seed,
        quantization=resolved.config.model.quantization,
        quantize_head=resolved.config.model.quantize_head,
        slots=resolved.config.policy.max_num_seqs,
        max_length=resolved.max_length,
        blocks=resolved.blocks,
        block_size=resolved.block_size,
        cores=resolved.cores,
        resident=resident,
    )
    return executor, resolved.blocks, resolved.max_length


def _start_cuda(resolved: Resolved) -> tuple[Executor, int, int]:
    """As `_start_cpu`; torch is imported here, in the process that runs the engine, and nowhere else."""
    from semipd.execute.cuda_backend import CudaBackend
    from semipd.execute.cuda_start import Shape, start_cuda

    settings = resolved.config
    batch = settings.policy.max_num_seqs
    shape = Shape(
        slots=batch,
        max_length=resolved.max_length,
        block_size=resolved.block_size,
        blocks=resolved.blocks,
        fixed_length=settings.model.max_model_len is not None,
        most_rows=max(Limits.prefill_tokens, settings.policy.chunk_tokens or 0) + batch,
        memory_share=settings.cache.gpu_memory_share,
    )
    started = start_cuda(
        CudaBackend(attention=settings.model.attention_backend),
        resolved.folder,
        shape,
        dtype=settings.model.dtype,
        load_format=settings.model.load_format,
        seed=settings.model.seed,
    )
    return started.executor, started.blocks, started.max_length


def build_simulation(
    model: str,
    device: str,
    settings: PolicyConfig,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    whole_devices: bool = False,
    blocks: int | None = None,
    block_size: int = 16,
    observers: Iterable[Observer] = (),
) -> tuple[Engine, VirtualClock]:
    """The same engine on a simulated device under a virtual clock.

    model: a name of the catalogue or a folder. device: a name or a device file. whole_devices: give each
    side of `disaggregated` a device of its own rather than half of one. Raises ConfigError."""
    spec = named_spec(model) if model in CATALOGUE else load_spec(model_folder(model))
    hardware = load_device(device)
    ranks = tensor_parallel * pipeline_parallel
    two_pools = settings.policy == "disaggregated"
    if two_pools and not whole_devices:
        hardware = hardware.varied(slower=2.0)  # half of everything, units kept
    step_cost = _step_cost(spec, hardware, tensor_parallel, pipeline_parallel)
    cost: CostModel = Isolated(step_cost, hardware.units) if two_pools else step_cost
    tokens = kv_capacity(spec, hardware, ranks) // (2 if two_pools and not whole_devices else 1)
    blocks = blocks or max(tokens // block_size, 1)
    first = BlockPool(blocks, block_size)
    second = BlockPool(blocks, block_size, first=blocks) if two_pools else first
    known = hardware.device()
    if two_pools:
        known = dataclasses.replace(known, lanes=frozenset(Lane))
    policy = make_policy(settings, known, cost)
    clock = VirtualClock()
    bandwidth = settings.transfer_bandwidth or DEFAULT_TRANSFER_BANDWIDTH
    copy_seconds = spec.kv_bytes_per_token(2) * block_size / bandwidth
    engine = Engine(
        SimExecutor(known, cost, clock, block_copy_seconds=copy_seconds),
        policy,
        {Lane.PREFILL: first, Lane.DECODE: second, Lane.TRANSFER: second},
        clock,
        max_sequences=settings.max_num_seqs,
        max_length=min(spec.max_positions, blocks * block_size),
        observers=(*observers, *observers_of(policy)),
    )
    return engine, clock


def _step_cost(
    spec: ModelSpec, hardware: DeviceFile, tensor_parallel: int = 1, pipeline_parallel: int = 1
) -> CostModel:
    """Kernel by kernel, or by whole steps where the device file holds a profile of those."""
    if hardware.steps is None:
        return StepCost(spec, hardware, tensor_parallel, pipeline_parallel)
    if tensor_parallel * pipeline_parallel > 1:
        raise ConfigError(f"device {hardware.name} is a profile of one machine: no parallel degrees")
    return _profiled(spec, hardware, dtype_of("auto", spec), hardware.units)


def _profiled(spec: ModelSpec, hardware: DeviceFile, dtype: str, units: int) -> CostModel:
    assert hardware.steps is not None
    steps = hardware.steps.scaled(shape_of(spec, itemsize(dtype)))
    return ProfiledCost(steps, hardware.step_seconds, hardware.sequence_seconds, units)


def predictor(settings: PolicyConfig, spec: ModelSpec, dtype: str, device: Device) -> CostModel | None:
    """What `auto` and the orders of prompts predict with on a real device; None when the settings ask for
    neither, or nothing is known of the device. Raises ConfigError for a bad device file."""
    targets = any(target != Targets() for target in targets_of(settings).values())
    chosen = settings.split == "auto" or (settings.split is None and targets)
    wanted = (settings.policy == "semi-pd" and chosen) or settings.prompt_order in ("shortest", "deadline")
    name = settings.device_file or (GENERIC_CPU if device.unit_kind == "core" else None)
    if name is None or not wanted:
        return None
    hardware = load_device(name)
    if hardware.unit_kind != device.unit_kind:
        raise ConfigError(
            f"--device-file: {hardware.name} has {hardware.unit_kind}s, not {device.unit_kind}s"
        )
    if hardware.steps is None:
        return StepCost(spec, hardware, dtype=dtype)
    return _profiled(spec, hardware, dtype, device.units)


def make_policy(settings: PolicyConfig, device: Device, cost: CostModel | None = None) -> Policy:
    """The policy that the settings name, on this device. cost: what `auto` and the orders of prompts
    predict with.

    Raises ConfigError for a split that the device cannot have, or a prediction that nothing makes."""
    admission: dict[str, Admission] = {
        "aggressive": Aggressive(),
        "conservative": Conservative(),
        "past-future": PastFuture(),
    }
    work = PromptWork(cost, device.units) if cost is not None else None
    order = _order(settings, device, work, "deadline" if _is_auto(settings, cost) else "fcfs")
    limits = Limits(
        device.units, batch=settings.max_num_seqs, admission=admission[settings.admission], order=order
    )
    match settings.policy:
        case "prefill-first":
            return PrefillFirst(limits)
        case "chunked":
            tokens = settings.chunk_tokens or DEFAULT_CHUNK_TOKENS
            return Chunked(limits, tokens, settings.long_prompt_threshold or 0)
        case "disaggregated":
            if Lane.TRANSFER not in device.lanes:
                raise ConfigError(
                    f"the policy disaggregated needs two pools, which {device.name} has not; "
                    "semipd simulate runs it"
                )
            # Each side owns its own device or half; the cost model knows how fast that is.
            return Disaggregated(limits, Split.pair(device.units, device.units, device.units))
        case _:
            if _is_auto(settings, cost):
                if cost is None:
                    raise ConfigError(f"--split auto needs a cost model of {device.name}")
                kept = settings.slo_attainment or KEPT
                return Auto(limits, device, cost, targets_of(settings), work, kept=kept)
            return _semi_pd(settings, limits, device)


def _order(
    settings: PolicyConfig, device: Device, work: PromptWork | None, usual: str
) -> PromptOrder | None:
    """Of the prompts; None: as they come."""
    name = settings.prompt_order or usual
    if name == "fcfs":
        return None
    if work is None:
        raise ConfigError(f"--prompt-order {name} needs a cost model of {device.name}")
    if name == "shortest":
        return work.shortest
    targets = targets_of(settings)
    if settings.prompt_order and all(target.ttft == math.inf for target in targets.values()):
        raise ConfigError("--prompt-order deadline needs --ttft-slo")
    return ByDeadline(work, targets, PREFILL_TOKENS)


def _is_auto(settings: PolicyConfig, cost: CostModel | None) -> bool:
    """Whether auto is asked for: by name, or by a target without a split where it can predict."""
    stated = cost is not None and any(target != Targets() for target in targets_of(settings).values())
    chosen = settings.split == "auto" or (settings.split is None and stated)
    return settings.policy == "semi-pd" and chosen


def targets_of(settings: PolicyConfig) -> dict[str, Targets]:
    """Latency targets by service class; those of requests without a class are under "default"."""
    default = {"default": Targets(settings.ttft_slo or math.inf, settings.tpot_slo or math.inf)}
    return default | {
        entry.name: Targets(entry.ttft or math.inf, entry.tpot or math.inf)
        for entry in settings.classes or ()
    }


def _semi_pd(settings: PolicyConfig, limits: Limits, device: Device) -> Policy:
    """semi-pd under the controller that `--split` names, other than auto."""
    targets = targets_of(settings)
    split, units = settings.split, device.units
    if split == "shared" or not device.legal_splits:
        if split != "shared":
            log.info("%s cannot be split: both phases share it", device.name)
        return SemiPD(limits, Shared(units))
    if split == "paper":
        if targets["default"] == Targets():
            raise ConfigError("--split paper needs --ttft-slo or --tpot-slo")
        smallest = min((min(pair) for pair in device.legal_splits), default=1)
        return SemiPD(limits, Paper(units, targets["default"], smallest))
    if split is None:
        pairs = device.legal_splits
        return SemiPD(limits, Static(*pairs[len(pairs) // 2], units))
    return SemiPD(limits, Static(*_static(split, device), units))


def _static(split: str, device: Device) -> tuple[int, int]:
    """Units of "static:P,D". Raises ConfigError."""
    kind, _, shares = split.partition(":")
    parts = shares.split(",")
    if kind != "static" or len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise ConfigError(f"--split: {split!r} is not auto, static:P,D, shared or paper")
    prefill, decode = (int(part) for part in parts)
    units = device.units
    if not (1 <= prefill <= units and 1 <= decode <= units):
        raise ConfigError(
            f"--split: {split} does not fit {units} {device.unit_kind}s; each phase needs 1 to {units}"
        )
    return prefill, decode
