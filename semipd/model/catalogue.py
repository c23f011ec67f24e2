"""Models by name, for simulating without a checkpoint: the shapes their makers published."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from semipd.core.errors import ConfigError
from semipd.model.spec import MlaSpec, ModelSpec, MoeSpec

CATALOGUE: Mapping[str, ModelSpec] = MappingProxyType(
    {
        "llama3-8b": ModelSpec(
            family="llama",
            layers=32,
            hidden=4096,
            heads=32,
            kv_heads=8,
            head_dim=128,
            intermediate=14336,
            vocabulary=128256,
            max_positions=8192,
            rope_theta=500000.0,
            dtype="bfloat16",
        ),
        "llama3-70b": ModelSpec(
            family="llama",
            layers=80,
            hidden=8192,
            heads=64,
            kv_heads=8,
            head_dim=128,
            intermediate=28672,
            vocabulary=128256,
            max_positions=8192,
            rope_theta=500000.0,
            dtype="bfloat16",
        ),
        "llama3.1-405b": ModelSpec(
            family="llama",
            layers=126,
            hidden=16384,
            heads=128,
            kv_heads=8,
            head_dim=128,
            intermediate=53248,
            vocabulary=128256,
            max_positions=131072,
            rope_theta=500000.0,
            dtype="bfloat16",
        ),
        "qwen3-8b": ModelSpec(
            family="qwen3",
            layers=36,
            hidden=4096,
            heads=32,
            kv_heads=8,
            head_dim=128,
            intermediate=12288,
            vocabulary=151936,
            max_positions=40960,
            rope_theta=1000000.0,
            qk_norm=True,
            dtype="bfloat16",
        ),
        "qwen3-14b": ModelSpec(
            family="qwen3",
            layers=40,
            hidden=5120,
            heads=40,
            kv_heads=8,
            head_dim=128,
            intermediate=17408,
            vocabulary=151936,
            max_positions=40960,
            rope_theta=1000000.0,
            qk_norm=True,
            dtype="bfloat16",
        ),
        "qwen2.5-0.5b": ModelSpec(
            family="qwen2",
            layers=24,
            hidden=896,
            heads=14,
            kv_heads=2,
            head_dim=64,
            intermediate=4864,
            vocabulary=151936,
            max_positions=32768,
            rope_theta=1000000.0,
            tied=True,
            qkv_bias=True,
            dtype="bfloat16",
        ),
        # 16 billion parameters, 2.2 of them for a token; no low-rank query.
        "deepseek-v2-lite": ModelSpec(
            family="deepseek",
            layers=27,
            hidden=2048,
            heads=16,
            kv_heads=16,
            head_dim=192,
            intermediate=10944,
            vocabulary=102400,
            max_positions=163840,
            mla=MlaSpec(kv_rank=512, rope_dim=64, nope_dim=128, value_dim=128),
            moe=MoeSpec(experts=64, chosen=6, width=1408, shared=2, dense_layers=1),
            dtype="bfloat16",
        ),
        # 671 billion parameters, 37 of them for a token, stored in 8 bits with a scale per block.
        "deepseek-v3": ModelSpec(
            family="deepseek",
            layers=61,
            hidden=7168,
            heads=128,
            kv_heads=128,
            head_dim=192,
            intermediate=18432,
            vocabulary=129280,
            max_positions=163840,
            mla=MlaSpec(kv_rank=512, rope_dim=64, nope_dim=128, value_dim=128, query_rank=1536),
            moe=MoeSpec(experts=256, chosen=8, width=2048, shared=1, dense_layers=3),
            dtype="fp8_block",
        ),
        # The small shapes of our own CPU benchmarks.
        "tiny-12m": ModelSpec(
            family="llama",
            layers=6,
            hidden=384,
            heads=6,
            kv_heads=2,
            head_dim=64,
            intermediate=1024,
            vocabulary=8192,
            max_positions=2048,
            tied=True,
            dtype="bfloat16",
        ),
        "tiny-1m": ModelSpec(
            family="llama",
            layers=2,
            hidden=128,
            heads=4,
            kv_heads=2,
            head_dim=32,
            intermediate=384,
            vocabulary=4096,
            max_positions=2048,
            tied=True,
            dtype="bfloat16",
        ),
    }
)


def named_spec(name: str) -> ModelSpec:
    """The shape of a known model. Raises ConfigError that lists the names."""
    spec = CATALOGUE.get(name)
    if spec is None:
        near = difflib.get_close_matches(name, CATALOGUE, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(CATALOGUE)}"
        raise ConfigError(f"no model named {name!r}; {hint}")
    return spec
