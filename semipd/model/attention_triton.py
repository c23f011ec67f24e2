# mypy: ignore-errors
"""Triton kernels of attention over the paged KV pool. `ops.PlainOps.attend` is their twin.

A layer of the pool is [2 (keys, values), blocks, kv_heads, block_size, dim]. Position p of a slot lies in
block tables[slot, p // block_size]. Sums are float32; softmax is taken in base 2 over running maxima
(online softmax, Milakov and Gimelshein 2018; tiled as in FlashAttention, Dao et al. 2022).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _page_pointers(
    layer,
    tables,
    slot,
    kv_head,
    position,
    inside,
    table_stride,
    block_stride,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Where the rows of these positions of one KV head begin. MASKED: only those `inside` are there."""
    entry = tables + slot * table_stride + position // BLOCK_SIZE
    if MASKED:
        block = tl.load(entry, mask=inside, other=0)
    else:
        block = tl.load(entry)
    return layer + block.to(tl.int64) * block_stride + (kv_head * BLOCK_SIZE + position % BLOCK_SIZE) * DIM


@triton.jit
def _load_rows(rows, column, inside, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """[rows, DIM_BLOCK]; zeros outside. A load that needs no mask has none: it takes fewer instructions."""
    pointers = rows[:, None] + column[None, :]
    if MASKED:
        return tl.load(pointers, mask=inside[:, None] & (column < DIM)[None, :], other=0.0)
    if DIM != DIM_BLOCK:
        return tl.load(pointers, mask=(column < DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _dot(a, b, CAST: tl.constexpr):
    """Matrix product in float32. CAST: convert first (the interpreter's bfloat16 product is wrong). Float32
    operands go through the tensor cores in three parts, which loses next to nothing: exact products would
    take scalar instructions and several kilobytes of spilled registers a thread."""
    if CAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _absorb(
    query,
    mixed,
    total,
    best,
    at,
    begin,
    end,
    window,
    scale,
    layer,
    tables,
    slot,
    kv_head,
    table_stride,
    half_stride,
    block_stride,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ENDS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAST: tl.constexpr,
):
    """Attend query [ROWS, DIM_BLOCK], whose row i stands at position at[i], to the positions from begin to
    end. Returns (unnormalised sum [ROWS, DIM_BLOCK], sum of weights, greatest product) per row, having put
    together those given and what was added. scale: of the products, in base 2.

    ENDS: the last block may reach beyond end. CAUSAL: some rows may stand before some positions.
    WINDOWED: some positions may have left the window of some rows. Where all three are false nothing is
    compared, which is what most of a long context should be."""
    column = tl.arange(0, DIM_BLOCK)
    for start in range(begin, end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        inside = position < end if ENDS else position >= 0
        rows = _page_pointers(
            layer,
            tables,
            slot,
            kv_head,
            position,
            inside,
            table_stride,
            block_stride,
            DIM,
            BLOCK_SIZE,
            ENDS,
        )
        key = _load_rows(rows, column, inside, DIM, DIM_BLOCK, ENDS)
        score = _dot(query, tl.trans(key), CAST)
        if ENDS or CAUSAL or WINDOWED:
            visible = inside[None, :]
            if CAUSAL:
                visible = visible & (position[None, :] <= at[:, None])
            if WINDOWED:
                visible = visible & (position[None, :] > at[:, None] - window)
            score = tl.where(visible, score, float("-inf"))
        higher = tl.maximum(best, tl.max(score, axis=1))
        base = higher * scale
        if CAUSAL or WINDOWED:  # a row may have seen nothing so far
            base = tl.where(higher == float("-inf"), 0.0, base)
        weight = tl.exp2(score * scale - base[:, None])
        decay = tl.exp2(best * scale - base)
        total = total * decay + tl.sum(weight, axis=1)
        value = _load_rows(rows + half_stride, column, inside, DIM, DIM_BLOCK, ENDS)
        mixed = mixed * decay[:, None] + _dot(weight.to(value.dtype), value, CAST)
        best = higher
    return mixed, total, best


@triton.jit
def prefill_kernel(
    out,
    qkv,
    layer,
    tables,
    tiles,
    scale,
    window,
    table_stride,
    half_stride,
    block_stride,
    QUERY: tl.constexpr,
    KV: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAST: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program per query head and tile of rows of one slice, or one for each of PARTS of a tile. scale:
    1 / sqrt(dim) in base 2."""
    head = tl.program_id(0)
    tile = tiles + tl.program_id(1) * 4
    slot = tl.load(tile)
    first = tl.load(tile + 1).to(tl.int32)
    row = tl.load(tile + 2)
    count = tl.load(tile + 3).to(tl.int32)
    if PARTS > 1:
        above = tl.program_id(2) * BLOCK_M
        count = tl.minimum(tl.maximum(count - above, 0), BLOCK_M)
        row += above
        first = tl.where(count > 0, first + above, -1)  # without rows there is nothing to attend to

    offset = tl.arange(0, BLOCK_M)
    column = tl.arange(0, DIM_BLOCK)
    mask = (offset < count)[:, None] & (column < DIM)[None, :]
    rows = row + offset
    width: tl.constexpr = (QUERY + 2 * KV) * DIM
    query = tl.load(qkv + rows[:, None] * width + head * DIM + column[None, :], mask=mask, other=0.0)
    at = first + offset
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, DIM_BLOCK], tl.float32)
    kv_head = head // (QUERY // KV)
    begin = 0
    if WINDOWED:
        # What the first row still sees and the last one does not any more.
        begin = tl.maximum(0, first - window + 1)
        seen_by_all = tl.minimum(tl.maximum(0, first + count - window), first + 1)
        parted = begin + tl.cdiv(tl.maximum(seen_by_all - begin, 0), BLOCK_N) * BLOCK_N
        mixed, total, best = _absorb(
            query, mixed, total, best, at, begin, tl.minimum(parted, first + count), window, scale,
            layer, tables, slot, kv_head, table_stride, half_stride, block_stride,
            DIM, DIM_BLOCK, BLOCK_SIZE, BLOCK_N, True, True, True, CAST,
        )  # fmt: skip
        begin = parted
    # Whole blocks that every row sees; then those that some rows stand before.
    whole = begin + tl.maximum(first + 1 - begin, 0) // BLOCK_N * BLOCK_N
    mixed, total, best = _absorb(
        query, mixed, total, best, at, begin, whole, window, scale,
        layer, tables, slot, kv_head, table_stride, half_stride, block_stride,
        DIM, DIM_BLOCK, BLOCK_SIZE, BLOCK_N, False, False, False, CAST,
    )  # fmt: skip
    mixed, total, best = _absorb(
        query, mixed, total, best, at, whole, first + count, window, scale,
        layer, tables, slot, kv_head, table_stride, half_stride, block_stride,
        DIM, DIM_BLOCK, BLOCK_SIZE, BLOCK_N, True, True, WINDOWED, CAST,
    )  # fmt: skip
    result = (mixed / tl.where(total == 0.0, 1.0, total)[:, None]).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * (QUERY * DIM) + head * DIM + column[None, :], result, mask=mask)


@triton.jit
def decode_kernel(
    out,
    sums,
    totals,
    maxima,
    qkv,
    layer,
    tables,
    singles,
    row_slots,
    positions,
    scale,
    window,
    table_stride,
    half_stride,
    block_stride,
    QUERY: tl.constexpr,
    KV: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAST: tl.constexpr,
):
    """One program per single row, KV head and part of the context; the heads that share the KV head are the
    rows of one product. With one part it writes `out`; else partial sums [singles, QUERY, SPLITS, DIM], and
    totals and maxima (scaled) without DIM, for `reduce_kernel`."""
    index = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    group: tl.constexpr = QUERY // KV
    row = tl.load(singles + index)
    slot = tl.load(row_slots + row)
    position = tl.load(positions + row).to(tl.int32)

    first = 0
    if WINDOWED:
        first = tl.maximum(0, position - window + 1)
    part = tl.cdiv(tl.cdiv(position + 1 - first, SPLITS), BLOCK_N) * BLOCK_N
    begin = first + split * part
    end = tl.minimum(begin + part, position + 1)

    member = tl.arange(0, GROUP_BLOCK)
    head = kv_head * group + member
    column = tl.arange(0, DIM_BLOCK)
    mask = (member < group)[:, None] & (column < DIM)[None, :]
    width: tl.constexpr = (QUERY + 2 * KV) * DIM
    query = tl.load(qkv + row * width + head[:, None] * DIM + column[None, :], mask=mask, other=0.0)
    best = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    mixed = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
    # The row stands behind all positions and in its window are all of them: only the last block has an end.
    whole = begin + tl.maximum(end - begin, 0) // BLOCK_N * BLOCK_N
    mixed, total, best = _absorb(
        query, mixed, total, best, member, begin, whole, window, scale,
        layer, tables, slot, kv_head, table_stride, half_stride, block_stride,
        DIM, DIM_BLOCK, BLOCK_SIZE, BLOCK_N, False, False, False, CAST,
    )  # fmt: skip
    mixed, total, best = _absorb(
        query, mixed, total, best, member, whole, end, window, scale,
        layer, tables, slot, kv_head, table_stride, half_stride, block_stride,
        DIM, DIM_BLOCK, BLOCK_SIZE, BLOCK_N, True, False, False, CAST,
    )  # fmt: skip
    if SPLITS == 1:
        target = out + row * (QUERY * DIM) + head[:, None] * DIM + column[None, :]
        tl.store(target, (mixed / total[:, None]).to(out.dtype.element_ty), mask=mask)
        return
    cell = (index * QUERY + head) * SPLITS + split
    tl.store(sums + cell[:, None] * DIM + column[None, :], mixed, mask=mask)
    tl.store(totals + cell, total, mask=member < group)
    tl.store(maxima + cell, best * scale, mask=member < group)


@triton.jit
def reduce_kernel(
    out,
    sums,
    totals,
    maxima,
    singles,
    QUERY: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program per single row and query head: put the parts of its context together."""
    index = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = tl.load(singles + index)
    part = tl.arange(0, SPLITS)
    column = tl.arange(0, DIM_BLOCK)
    cell = (index * QUERY + head) * SPLITS + part
    best = tl.load(maxima + cell)
    weight = tl.exp2(best - tl.max(best, axis=0))  # the first part has at least one position
    total = tl.sum(weight * tl.load(totals + cell), axis=0)
    inside = (column < DIM)[None, :]
    sum_ = tl.load(sums + cell[:, None] * DIM + column[None, :], mask=inside, other=0.0)
    mixed = tl.sum(sum_ * weight[:, None], axis=0) / total
    target = out + (row * QUERY + head) * DIM + column
    tl.store(target, mixed.to(out.dtype.element_ty), mask=column < DIM)
