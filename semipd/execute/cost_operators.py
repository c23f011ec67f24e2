"""What each operator computes and moves: the formulas that the fit and the cost model share.

Every function takes numbers or equal-length numpy arrays (only arithmetic is used) and returns a Demand;
bytes count reads and writes of device memory once, FLOPs are counted at bfloat16's pace (an 8-bit product
is half of one). The features are what a kernel's efficiency depends on.
"""

from __future__ import annotations

from typing import Any

from semipd.execute.cost_surface import Demand
from semipd.model.spec import MlaSpec

# Bytes per weight or activation of the precisions that can be priced, and FLOP/s relative to bfloat16.
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0, "fp8_block": 1.0}
SPEED = {"float32": 0.5, "bfloat16": 1.0, "float16": 1.0, "fp8": 2.0, "fp8_block": 2.0}

Number = Any  # float or numpy.ndarray

GEMM = ("m", "n", "k")
CONTEXT_ATTENTION = ("reach", "rows", "head_dim", "group")
GENERATION_ATTENTION = ("length", "rows", "head_dim", "group")
MOE = ("load", "width", "experts", "hidden", "ranks")
MLA = ("reach", "tokens", "heads")
ALLREDUCE = ("elements", "devices")


def output_bytes(dtype: str) -> float:
    """Bytes of a result: 8-bit products are written in 16 bits."""
    return max(BYTES[dtype], 2.0)


def gemm(m: Number, n: Number, k: Number, dtype: str) -> Demand:
    """(m, k) times (k, n)."""
    moved = (m * k + n * k) * BYTES[dtype] + m * n * output_bytes(dtype)
    return Demand(2.0 * m * n * k / SPEED[dtype], moved, 0.0 * m, (m, n, k))


def context_attention(
    tokens: Number,
    pairs: Number,
    context: Number,
    heads: Number,
    kv_heads: Number,
    head_dim: Number,
    kv_bytes: float,
    bytes_per_value: float = 2.0,
) -> Demand:
    """Causal attention of prompt slices: `pairs` of query and visible key, `context` keys read in all."""
    moved = (
        2.0 * tokens * heads * head_dim * bytes_per_value + 2.0 * context * kv_heads * head_dim * kv_bytes
    )
    features = (pairs / tokens, tokens * heads, head_dim, heads / kv_heads)
    return Demand(4.0 * heads * head_dim * pairs, moved, 0.0 * tokens, features)


def generation_attention(
    sequences: Number,
    context: Number,
    heads: Number,
    kv_heads: Number,
    head_dim: Number,
    kv_bytes: float,
    bytes_per_value: float = 2.0,
) -> Demand:
    """One query per sequence over `context` keys in all."""
    moved = (
        2.0 * sequences * heads * head_dim * bytes_per_value
        + 2.0 * context * kv_heads * head_dim * kv_bytes
    )
    features = (context / sequences, sequences * kv_heads, head_dim, heads / kv_heads)
    return Demand(4.0 * heads * head_dim * context, moved, 0.0 * sequences, features)


def moe(
    tokens: Number,
    hidden: Number,
    width: Number,
    chosen: Number,
    experts: Number,
    tensor_ranks: Number,
    expert_ranks: Number,
    dtype: str,
) -> Demand:
    """Routed experts of one layer on one rank: gate, up and down of `chosen` of `experts` per token.

    Weights of E * (1 - (1 - k/E)^tokens) distinct experts are read; activations are gathered, gated and
    summed for all pairs of token and expert, whichever rank holds the expert.
    """
    share = width / tensor_ranks
    local = experts / expert_ranks
    pairs = tokens * chosen
    distinct = local * (1.0 - (1.0 - chosen / experts) ** tokens)
    activations = pairs * (3.0 * hidden + 6.0 * share) * 2.0
    weights = 3.0 * distinct * hidden * share * BYTES[dtype]
    flops = 6.0 * pairs / expert_ranks * hidden * share / SPEED[dtype]
    return Demand(flops, weights, activations, (pairs / experts, share, local, hidden, expert_ranks))


def mla_projections(hidden: int, heads: Number, mla: MlaSpec) -> Number:
    """Parameters of the projections around latent attention on a rank with `heads` heads."""
    query_in = hidden if mla.query_rank == 0 else mla.query_rank
    down = hidden * (mla.query_rank + mla.latent_dim)
    return down + query_in * heads * mla.query_dim + heads * mla.value_dim * hidden


def mla_context(
    tokens: Number,
    pairs: Number,
    context: Number,
    heads: Number,
    mla: MlaSpec,
    kv_bytes: float,
    module: tuple[int, str] | None = None,
) -> Demand:
    """Latent attention of prompt slices: keys and values are expanded from the latents, then attended.

    module: (hidden size, dtype) when the projections belong to it.
    """
    expand = mla.kv_rank * heads * (mla.nope_dim + mla.value_dim)
    flops = 2.0 * pairs * heads * (mla.query_dim + mla.value_dim) + 2.0 * context * expand
    moved = (
        context * mla.latent_dim * kv_bytes
        + 2.0 * expand
        + 4.0 * tokens * heads * (mla.query_dim + mla.value_dim)
    )
    return _around(flops, moved, tokens, (pairs / tokens, tokens, heads), heads, mla, module)


def mla_generation(
    sequences: Number,
    context: Number,
    heads: Number,
    mla: MlaSpec,
    kv_bytes: float,
    module: tuple[int, str] | None = None,
) -> Demand:
    """Latent attention of one query per sequence, with the expansions absorbed into query and output."""
    expand = mla.kv_rank * heads * (mla.nope_dim + mla.value_dim)
    flops = 2.0 * context * heads * (mla.latent_dim + mla.kv_rank) + 2.0 * sequences * expand
    moved = context * mla.latent_dim * kv_bytes + 2.0 * expand
    return _around(flops, moved, sequences, (context / sequences, sequences, heads), heads, mla, module)


def _around(
    flops: Number,
    moved: Number,
    tokens: Number,
    features: tuple[Number, ...],
    heads: Number,
    mla: MlaSpec,
    module: tuple[int, str] | None,
) -> Demand:
    if module is None:
        return Demand(flops, moved, 0.0 * tokens, features)
    hidden, dtype = module
    parameters = mla_projections(hidden, heads, mla)
    flops = flops + 2.0 * tokens * parameters / SPEED[dtype]
    return Demand(flops, moved + parameters * BYTES[dtype], 0.0 * tokens, features)


def allreduce(elements: Number, devices: Number) -> Demand:
    """A sum over devices of 16-bit elements. The link's speed is in the correction."""
    return Demand(0.0 * elements, 2.0 * elements, 0.0 * elements, (elements, devices))
