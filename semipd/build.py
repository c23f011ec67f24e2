"""Config to engine: the only file that names concrete classes.

`resolve` turns settings and a model folder into numbers and has no side effect but reading files;
`build_engine` starts processes. Both raise ConfigError with one clear line.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from semipd.config import Config, PolicyConfig
from semipd.core.admission import Admission, Aggressive, Conservative, PastFuture
from semipd.core.auto import Auto
from semipd.core.engine import Engine
from semipd.core.errors import ConfigError
from semipd.core.kv import BlockPool
from semipd.core.partition import Paper, Shared, Static, Targets
from semipd.core.policies import Chunked, Disaggregated, Limits, PrefillFirst, SemiPD
from semipd.core.ports import CostModel, Observer, Policy
from semipd.core.types import Device, Lane, Split
from semipd.execute.clock import MonotonicClock
from semipd.execute.cores import available_cores
from semipd.execute.cpu import CpuExecutor, cpu_device
from semipd.model.spec import ModelSpec, load_spec

DEFAULT_CHUNK_TOKENS = 256
DEFAULT_MEMORY_SHARE = 10  # one part in ten of the machine's memory
DEFAULT_MEMORY_MOST = 2 * 1024**3

log = logging.getLogger("semipd")


@dataclass(frozen=True)
class Resolved:
    """What a Config means for one model on this machine.

    blocks: KV blocks in the pool. max_length: most tokens of one sequence. cores: CPU ids to use.
    """

    config: Config
    folder: Path
    spec: ModelSpec
    name: str
    dtype: str
    blocks: int
    max_length: int
    cores: tuple[int, ...]

    @property
    def block_size(self) -> int:
        return self.config.cache.block_size


def resolve(config: Config) -> Resolved:
    """Find the model, read its shape, size the KV pool. Raises ConfigError."""
    folder = model_folder(config.model.model)
    spec = load_spec(folder)
    dtype = _dtype(config.model.dtype, spec)
    cores = available_cores()
    make_policy(config.policy, cpu_device(len(cores)))  # what cannot work is refused before loading
    blocks, max_length = _pool(config, spec, dtype)
    name = config.server.served_model_name or config.model.model or folder.name
    return Resolved(config, folder, spec, name, dtype, blocks, max_length, cores)


def build_engine(config: Config | Resolved, observers: Iterable[Observer] = ()) -> Engine:
    """Start the executor and put the planner on it. Call on the thread that will run `Engine.step`: the
    executor's processes end with it. The caller closes `engine.executor`."""
    resolved = config if isinstance(config, Resolved) else resolve(config)
    settings = resolved.config
    executor = CpuExecutor(
        resolved.folder,
        dtype=resolved.dtype,
        load_format=settings.model.load_format,
        seed=settings.model.seed,
        slots=settings.policy.max_num_seqs,
        max_length=resolved.max_length,
        blocks=resolved.blocks,
        block_size=resolved.block_size,
        cores=resolved.cores,
    )
    policy = make_policy(settings.policy, executor.device)
    pool = BlockPool(resolved.blocks, resolved.block_size, settings.cache.prefix_cache)
    return Engine(
        executor,
        policy,
        {Lane.PREFILL: pool, Lane.DECODE: pool},
        MonotonicClock(),
        max_sequences=settings.policy.max_num_seqs,
        max_length=resolved.max_length,
        observers=(*observers, *([policy] if callable(policy) else [])),
    )


def model_folder(model: str | None) -> Path:
    """The local folder of a model: a path, or a hub id that is fetched (or found in the hub's cache)."""
    if model is None:
        return default_model()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConfigError(f"no model folder at {model}")
    return _fetch(model)


def default_model() -> Path:
    """The model that ships with the package."""
    return Path(__file__).parent / "box"


def _fetch(model: str) -> Path:
    # Imported here: it takes a quarter of a second, and a local folder does not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"])
        )
    except HFValidationError:
        raise ConfigError(f"no model folder at {model}, and it is not a hub id") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"no folder {model}, and the hub gave no model of that name: {reason}") from error


def _dtype(wanted: str, spec: ModelSpec) -> str:
    if wanted != "auto":
        return wanted
    return "float32" if spec.dtype == "float32" else "bfloat16"


def _pool(config: Config, spec: ModelSpec, dtype: str) -> tuple[int, int]:
    """(blocks, max_length). A stated budget is honoured or refused; an unstated one adapts."""
    cache, asked = config.cache, config.model.max_model_len
    if asked is not None and asked > spec.max_positions:
        raise ConfigError(
            f"--max-model-len {asked} is more than the {spec.max_positions} positions of the model"
        )
    longest = asked or spec.max_positions
    block_bytes = spec.kv_bytes_per_token(4 if dtype == "float32" else 2) * cache.block_size
    if cache.kv_blocks is not None:
        blocks = cache.kv_blocks
    elif cache.kv_memory is not None:
        blocks = cache.kv_memory // block_bytes
    else:
        blocks = _default_memory() // block_bytes
    capacity = blocks * cache.block_size
    if capacity >= longest:
        return blocks, longest
    stated = cache.kv_blocks is not None or cache.kv_memory is not None
    if stated or asked is not None or capacity < cache.block_size:
        needed = -(-longest // cache.block_size)
        mebibytes = -(-needed * block_bytes // 2**20)
        raise ConfigError(
            f"the KV pool holds {capacity} tokens, less than one sequence of {longest}: lower "
            f"--max-model-len, or raise the pool to {needed} blocks ({mebibytes} MiB)"
        )
    log.info("sequences are limited to %d tokens by the KV pool; --kv-memory raises it", capacity)
    return blocks, capacity


def _default_memory() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(memory // DEFAULT_MEMORY_SHARE, DEFAULT_MEMORY_MOST)


def make_policy(settings: PolicyConfig, device: Device, cost: CostModel | None = None) -> Policy:
    """The policy that the settings name, on this device. cost: what `auto` predicts with.

    Raises ConfigError for a split that the device cannot have."""
    admission: dict[str, Admission] = {
        "aggressive": Aggressive(),
        "conservative": Conservative(),
        "past-future": PastFuture(),
    }
    limits = Limits(device.units, batch=settings.max_num_seqs, admission=admission[settings.admission])
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
            half = device.units // 2
            return Disaggregated(limits, Split.pair(device.units - half, half, device.units))
        case _:
            return _semi_pd(settings, limits, device, cost)


def _semi_pd(settings: PolicyConfig, limits: Limits, device: Device, cost: CostModel | None) -> Policy:
    """semi-pd under the controller that `--split` names."""
    targets = Targets(settings.ttft_slo or math.inf, settings.tpot_slo or math.inf)
    stated = settings.ttft_slo is not None or settings.tpot_slo is not None
    split = settings.split or ("auto" if stated and cost is not None else None)
    units = device.units
    if split == "auto":
        if cost is None:
            raise ConfigError(f"--split auto needs a cost model of {device.name}")
        return Auto(limits, device, cost, {"default": targets})
    if split == "shared" or units == 1:
        if split != "shared":
            log.info("one %s cannot be split: both phases share it", device.unit_kind)
        return SemiPD(limits, Shared(units))
    if split == "paper":
        if not stated:
            raise ConfigError("--split paper needs --ttft-slo or --tpot-slo")
        smallest = min((min(pair) for pair in device.legal_splits), default=1)
        return SemiPD(limits, Paper(units, targets, smallest))
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
