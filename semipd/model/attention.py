"""Attention over a paged KV pool, for batches whose slices have any start and count.

One layer of the pool is [2 (keys, values), blocks, kv_heads, block_size, head_dim]. A position p of a
sequence lies in block `table[p // block_size]` at offset `p % block_size`. What a step needs besides the
tensors is worked out once (`plan_attention`) and used by every layer.

A row's result depends on its own sequence alone: a one-token slice is padded to a length that follows from
its own context, and a longer slice is cut into tiles that follow from its own start and count. Where there
are compiled kernels, one-token slices are read in place instead, in parts that follow from their context.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional

from semipd.model.kernels import DecodeParts, Kernels, PrefillTiles, can_tile

TILE = 256  # query rows that share one call when a mask is needed
GATHER_BYTES = 2**24  # one-token slices share a call up to this many gathered bytes
UNSEEN = float("-inf")


@dataclass(frozen=True)
class Pool:
    """The shape of a KV pool [layers, 2, blocks, kv_heads, block_size, head_dim]."""

    blocks: int
    kv_heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype

    @staticmethod
    def of(kv: torch.Tensor) -> Pool:
        _, _, blocks, kv_heads, block_size, head_dim = kv.shape
        return Pool(blocks, kv_heads, block_size, head_dim, kv.dtype)

    def pages(self, tables: np.ndarray) -> torch.Tensor:
        """Rows to gather from a layer seen as [2 * blocks * kv_heads, block_size * head_dim] for the blocks
        of tables [sequences, n], in the order [2, sequences, kv_heads, n]: what attention wants to read."""
        half = np.arange(2)[:, None, None, None] * (self.blocks * self.kv_heads)
        head = np.arange(self.kv_heads)[:, None]
        return torch.from_numpy(
            (tables.astype(np.int64)[:, None] * self.kv_heads + head + half).reshape(-1)
        )

    def rows(self, blocks: np.ndarray, offsets: np.ndarray) -> torch.Tensor:
        """Rows of a layer seen as [-1, head_dim] where the keys and values of positions at (block, offset)
        are kept: int64 [positions * 2 * kv_heads], for `write_kv`."""
        head = np.arange(2)[:, None] * (self.blocks * self.kv_heads) + np.arange(self.kv_heads)
        page = blocks.astype(np.int64)[:, None, None] * self.kv_heads + head
        return torch.from_numpy((page * self.block_size + offsets[:, None, None]).reshape(-1))


@dataclass(frozen=True)
class Ragged:
    """The slices of a step: slice i computes positions `starts[i] .. starts[i] + counts[i] - 1` (int64);
    its rows follow those of slice i - 1. tables: int [slices, any], blocks of each sequence from its first.
    """

    starts: np.ndarray
    counts: np.ndarray
    tables: np.ndarray


@dataclass(frozen=True)
class DecodeGroup:
    """One-token slices of similar context, attended to in one call.

    rows: int64 [n], rows of the queries; None when they are all the step's rows in order. pages: what to
    gather. mask: [n, 1, 1, gathered positions], 0 where a key is visible."""

    rows: torch.Tensor | None
    pages: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class PrefillSlice:
    """One longer slice, its first query row, and what to gather; `lead` gathered positions come before it.

    mask: see `_tile_mask`; None when the slice is a whole sequence and plainly causal."""

    row: int
    count: int
    lead: int
    pages: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True)
class AttentionPlan:
    """What the attention of every layer with this window needs to know of a step."""

    ragged: Ragged
    pool: Pool
    window: int | None
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillSlice, ...]
    parts: DecodeParts | None = None  # instead of `decode`, for the compiled kernel
    tiles: tuple[PrefillTiles, ...] = ()  # instead of `prefill`, likewise


def plan_attention(
    ragged: Ragged, pool: Pool, window: int | None, kernels: Kernels | None = None
) -> AttentionPlan:
    """Work out groups, gathers and masks, or what the kernels want. window: how many positions a query
    sees, itself included."""
    single = ragged.counts == 1
    first_rows = np.cumsum(ragged.counts) - ragged.counts
    decode, prefill, tiles, parts = [], [], [], None
    if kernels is not None and single.any():
        parts = DecodeParts(
            kernels, first_rows[single], ragged.starts[single], ragged.tables[single], window
        )
    elif single.any():
        first = _first_block(ragged.starts, pool, window)
        sizes = np.array([_bucket(int(n)) for n in ragged.starts // pool.block_size + 1 - first])
        for size in np.unique(sizes[single]):
            members = np.flatnonzero(single & (sizes == size))
            for part in _parts(members, int(size), pool):
                rows = None if part.size == single.size else torch.from_numpy(first_rows[part])
                decode.append(_decode_group(ragged, rows, part, int(size), pool, window))
    tiled = can_tile(kernels, pool.head_dim, pool.dtype)
    for index in np.flatnonzero(~single):
        if kernels is not None and tiled:
            start, count = int(ragged.starts[index]), int(ragged.counts[index])
            row, table = int(first_rows[index]), ragged.tables[index]
            tiles.append(PrefillTiles(kernels, row, start, count, table, window))
            continue
        prefill.append(_prefill_slice(ragged, int(first_rows[index]), int(index), pool, window))
    return AttentionPlan(ragged, pool, window, tuple(decode), tuple(prefill), parts, tuple(tiles))


def attend(q: torch.Tensor, layer: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """q [T, heads, head_dim] (the rows of the plan's slices) against one layer of the pool, which already
    holds the step's own keys and values. Returns [T, heads * head_dim]."""
    _, _, kv_heads, block_size, head_dim = layer.shape
    pages = layer.view(-1, block_size * head_dim)
    heads = q.shape[1]
    out = q.new_empty(q.shape)
    if plan.parts is not None:
        plan.parts.attend(q, layer, out)
    for tile in plan.tiles:
        tile.attend(q, layer, out)
    for group in plan.decode:
        n = group.mask.shape[0]
        keys, values = pages.index_select(0, group.pages).view(2, n, kv_heads, -1, head_dim)
        query = q if group.rows is None else q.index_select(0, group.rows)
        query = query.reshape(n, kv_heads, heads // kv_heads, head_dim)
        mixed = functional.scaled_dot_product_attention(query, keys, values, attn_mask=group.mask)
        if group.rows is None:
            return mixed.reshape(n, -1)
        out.index_copy_(0, group.rows, mixed.reshape(n, heads, head_dim))
    for piece in plan.prefill:
        gathered = pages.index_select(0, piece.pages).view(2, 1, kv_heads, -1, head_dim)
        rows = slice(piece.row, piece.row + piece.count)
        _attend_slice(q[rows], gathered, piece, plan.window, out[rows])
    return out.view(q.shape[0], -1)


def attend_plainly(q: torch.Tensor, layer: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """The twin of `attend`: row by row, in float32, straight from the definition."""
    _, _, kv_heads, block_size, head_dim = layer.shape
    out = torch.zeros_like(q)
    ragged, row = plan.ragged, 0
    for start, count, table in zip(ragged.starts, ragged.counts, ragged.tables, strict=True):
        for position in range(int(start), int(start + count)):
            first = 0 if plan.window is None else max(0, position - plan.window + 1)
            seen = np.arange(first, position + 1)
            blocks = torch.from_numpy(table[seen // block_size].astype(np.int64))
            keys, values = layer[:, blocks, :, torch.from_numpy(seen % block_size)].float().unbind(1)
            query = q[row].float().view(kv_heads, -1, head_dim)
            scores = torch.einsum("hgd,thd->hgt", query, keys) / head_dim**0.5
            mixed = torch.einsum("hgt,thd->hgd", scores.softmax(-1), values)
            out[row] = mixed.reshape(-1, head_dim).to(q.dtype)
            row += 1
    return out.view(q.shape[0], -1)


def write_kv(kv: torch.Tensor, layer: torch.Tensor, rows: torch.Tensor) -> None:
    """Write kv [T, 2 * kv_heads, head_dim] (keys, then values) at `Pool.rows`."""
    head_dim = layer.shape[-1]
    layer.view(-1, head_dim).index_copy_(0, rows, kv.reshape(-1, head_dim))


def _attend_slice(
    q: torch.Tensor, gathered: torch.Tensor, piece: PrefillSlice, window: int | None, out: torch.Tensor
) -> None:
    """q [count, heads, head_dim] against gathered [2, 1, kv_heads, positions, head_dim], into out."""
    query = q.transpose(0, 1)[None]
    if piece.mask is None:
        keys, values = gathered[..., : piece.count, :]
        mixed = functional.scaled_dot_product_attention(
            query, keys, values, is_causal=True, enable_gqa=True
        )
        out.copy_(mixed[0].transpose(0, 1))
        return
    for begin in range(0, piece.count, TILE):
        end = min(begin + TILE, piece.count)
        low = 0 if window is None else max(0, piece.lead + begin - window + 1)
        high = piece.lead + end
        keys, values = gathered[..., low:high, :]
        column = piece.mask.shape[1] - TILE - (piece.lead + begin)  # of the first gathered position
        mask = piece.mask[: end - begin, column + low : column + high]
        mixed = functional.scaled_dot_product_attention(
            query[:, :, begin:end], keys, values, attn_mask=mask, enable_gqa=True
        )
        out[begin:end].copy_(mixed[0].transpose(0, 1))


def _decode_group(
    ragged: Ragged,
    rows: torch.Tensor | None,
    members: np.ndarray,
    size: int,
    pool: Pool,
    window: int | None,
) -> DecodeGroup:
    """The one-token slices `members`, each padded to `size` blocks by repeating its last one."""
    positions = ragged.starts[members]
    first = _first_block(positions, pool, window)
    columns = np.minimum(first[:, None] + np.arange(size), (positions // pool.block_size)[:, None])
    tables = ragged.tables[members[:, None], columns]
    keys = first[:, None] * pool.block_size + np.arange(size * pool.block_size)
    hidden = keys > positions[:, None]
    if window is not None:
        hidden |= keys <= positions[:, None] - window
    mask = torch.zeros(hidden.shape, dtype=pool.dtype).masked_fill_(torch.from_numpy(hidden), UNSEEN)
    return DecodeGroup(rows, pool.pages(tables), mask[:, None, None])


def _prefill_slice(ragged: Ragged, row: int, index: int, pool: Pool, window: int | None) -> PrefillSlice:
    start, count = int(ragged.starts[index]), int(ragged.counts[index])
    first = int(_first_block(ragged.starts[index], pool, window))
    last = (start + count - 1) // pool.block_size
    pages = pool.pages(ragged.tables[index : index + 1, first : last + 1])
    lead = start - first * pool.block_size
    causal = start == 0 and (window is None or count <= window)
    return PrefillSlice(row, count, lead, pages, None if causal else _tile_mask(lead + count, window, pool))


def _tile_mask(positions: int, window: int | None, pool: Pool) -> torch.Tensor:
    """[TILE, positions + TILE]: column c is the key `c - positions` after the tile's first row. The mask of
    any tile of a slice with up to `positions` gathered positions is a view of it."""
    distance = torch.arange(-positions, TILE) - torch.arange(TILE)[:, None]
    hidden = distance > 0
    if window is not None:
        hidden |= distance <= -window
    return torch.zeros(hidden.shape, dtype=pool.dtype).masked_fill_(hidden, UNSEEN)


def _first_block(positions: np.ndarray, pool: Pool, window: int | None) -> np.ndarray:
    """The first block that a query at each position sees."""
    if window is None:
        return np.zeros_like(positions)
    first: np.ndarray = np.maximum(0, positions - window + 1) // pool.block_size
    return first


def _parts(members: np.ndarray, size: int, pool: Pool) -> list[np.ndarray]:
    """Members in parts that stay below GATHER_BYTES (or are one slice)."""
    page = pool.block_size * pool.head_dim * pool.dtype.itemsize
    most = max(1, GATHER_BYTES // (2 * size * pool.kv_heads * page))
    return [members[i : i + most] for i in range(0, members.size, most)]


def _bucket(blocks: int) -> int:
    """The next of 1, 2, ... 8, 10, 12, 14, 16, 20, ...: four steps to a doubling, so at most a quarter is
    padding and groups are few."""
    step = 1 << max(0, (blocks - 1).bit_length() - 3)
    return -(-blocks // step) * step
