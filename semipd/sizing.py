"""How large the KV pool is and how long a sequence may get, out of settings and a model's shape."""

from __future__ import annotations

import logging

from semipd.config import Config
from semipd.core.errors import ConfigError
from semipd.execute.cgroup import total_memory
from semipd.model.spec import ModelSpec

DEFAULT_MEMORY_SHARE = 10  # one part in ten of the memory that this process may use
DEFAULT_MEMORY_MOST = 2 * 1024**3

log = logging.getLogger("semipd")


def dtype_of(wanted: str, spec: ModelSpec) -> str:
    """The arithmetic: as asked for, or what the model is stored in, as far as there are kernels for it."""
    if wanted != "auto":
        return wanted
    return "float32" if spec.dtype == "float32" else "bfloat16"


def stated_pool(config: Config, spec: ModelSpec, dtype: str) -> tuple[int | None, int]:
    """(blocks, most tokens of a sequence) as far as the settings say; blocks is None for an unstated pool.

    Raises ConfigError."""
    cache, asked = config.cache, config.model.max_model_len
    if asked is not None and asked > spec.max_positions:
        raise ConfigError(
            f"--max-model-len {asked} is more than the {spec.max_positions} positions of the model"
        )
    blocks = cache.kv_blocks
    if cache.kv_memory is not None:
        blocks = cache.kv_memory // (spec.kv_bytes_per_token(itemsize(dtype)) * cache.block_size)
    return blocks, asked or spec.max_positions


def itemsize(dtype: str) -> int:
    """Bytes of a number."""
    return 4 if dtype == "float32" else 2


def pool_size(config: Config, spec: ModelSpec, dtype: str) -> tuple[int, int]:
    """(blocks, most tokens of a sequence). What was asked for is honoured, or refused by ConfigError; what
    was not adapts."""
    cache, asked = config.cache, config.model.max_model_len
    blocks, longest = stated_pool(config, spec, dtype)
    block_bytes = spec.kv_bytes_per_token(itemsize(dtype)) * cache.block_size
    if blocks is None:
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
    return min(total_memory() // DEFAULT_MEMORY_SHARE, DEFAULT_MEMORY_MOST)
