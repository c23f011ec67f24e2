# mypy: ignore-errors
"""Triton kernels between a decoder's matrix products, other than attention. `ops.PlainOps` is their twin.

Pointers advance by element counts that the launchers pass; every row is contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def embed_kernel(
    out, table, tokens, row_slots, positions, token_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per row: its token, looked up in the token table, and that token's embedding."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slots + row)
    token = tl.load(tokens + slot * token_stride + tl.load(positions + row)).to(tl.int64)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(table + token * WIDTH + column, mask=column < WIDTH)
        tl.store(out + row * WIDTH + column, value, mask=column < WIDTH)


@triton.jit
def norm_kernel(out, x, delta, weight, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """One program per row. ADD: x += delta first, and the norm is that of the rounded sum."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    value = tl.load(x + row + column, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + row + column, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(x.dtype.element_ty)
        tl.store(x + row + column, rounded, mask=mask)
        value = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / WIDTH + eps)
    value = value * scale * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row + column, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def rotate_and_store_kernel(
    qkv,
    layer,
    row_slots,
    positions,
    tables,
    cosine,
    sine,
    query_norm,
    key_norm,
    eps,
    table_stride,
    half_stride,
    block_stride,
    QUERY: tl.constexpr,
    KV: tl.constexpr,
    DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NORMED: tl.constexpr,
):
    """One program per row and group of HEADS heads (queries, keys, values in that order)."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half: tl.constexpr = DIM // 2
    column = tl.arange(0, HALF_BLOCK)
    position = tl.load(positions + row)
    slot = tl.load(row_slots + row)

    mask = (head < QUERY + 2 * KV)[:, None] & (column < half)[None, :]
    source = qkv + row * ((QUERY + 2 * KV) * DIM) + head[:, None] * DIM + column[None, :]
    low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)

    is_query = (head < QUERY)[:, None]
    is_value = (head >= QUERY + KV)[:, None]
    if NORMED:
        scale = 1.0 / tl.sqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / DIM + eps)
        inside = column < half
        low_query = tl.load(query_norm + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        low_key = tl.load(key_norm + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        high_query = tl.load(query_norm + half + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        high_key = tl.load(key_norm + half + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        low = tl.where(is_value, low, low * scale[:, None] * tl.where(is_query, low_query, low_key))
        high = tl.where(is_value, high, high * scale[:, None] * tl.where(is_query, high_query, high_key))

    cos = tl.load(cosine + position * half + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sine + position * half + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
    new_low = tl.where(is_value, low, low * cos - high * sin)
    new_high = tl.where(is_value, high, high * cos + low * sin)

    tl.store(source, new_low.to(qkv.dtype.element_ty), mask=mask & is_query)
    tl.store(source + half, new_high.to(qkv.dtype.element_ty), mask=mask & is_query)
    block = tl.load(tables + slot * table_stride + position // BLOCK_SIZE).to(tl.int64)
    side = tl.where(is_value, 1, 0).to(tl.int64)
    kv_head = tl.where(is_value, head[:, None] - QUERY - KV, head[:, None] - QUERY)
    target = (
        layer
        + side * half_stride
        + block * block_stride
        + (kv_head * BLOCK_SIZE + position % BLOCK_SIZE) * DIM
        + column[None, :]
    )
    stored = mask & (head >= QUERY)[:, None]
    tl.store(target, new_low.to(layer.dtype.element_ty), mask=stored)
    tl.store(target + half, new_high.to(layer.dtype.element_ty), mask=stored)


@triton.jit
def gated_kernel(out, gate_up, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row and block of columns: silu(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    gate = tl.load(gate_up + row * (2 * WIDTH) + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * WIDTH + column, value.to(out.dtype.element_ty), mask=mask)
