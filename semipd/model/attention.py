"""Attention over a paged KV pool, for batches whose slices have any start and count.

One layer of the pool is [2 (keys, values), blocks, kv_heads, block_size, head_dim]. A position p of a
sequence lies in block `table[p // block_size]` at offset `p % block_size`. What a step needs besides the
tensors is worked out once (`plan_attention`) and used by every layer.

A row's result depends on its own sequence alone: a one-token slice is padded to a length that follows from
its own context, and a longer slice is cut into tiles that follow from its own start and count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional

TILE = 256  # query rows that share one call when a mask is needed
UNSEEN = float("-inf")


@dataclass(frozen=True)
class Ragged:
    """The slices of a step: slice i computes positions `starts[i] .. starts[i] + counts[i] - 1`; its rows
    follow those of slice i - 1. tables: int [slices, any], block numbers of each sequence from position 0
    on.
    """

    starts: np.ndarray
    counts: np.ndarray
    tables: np.ndarray
    block_size: int

    @property
    def offsets(self) -> np.ndarray:
        """First row of each slice."""
        first: np.ndarray = np.cumsum(self.counts) - self.counts
        return first


@dataclass(frozen=True)
class DecodeGroup:
    """One-token slices of similar context, attended to in one call.

    rows: int64 [n], rows of the queries. pages: int64 [2 * n * kv_heads * blocks], what to gather, see
    `_pages`. mask: [n, 1, 1, blocks * block_size], 0 where a key is visible.
    """

    rows: torch.Tensor
    pages: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class PrefillSlice:
    """One longer slice. `keys` positions were gathered; the slice starts at the `lead`-th of them.

    mask: [tile, columns] for `_tiles`, or None when the slice is the whole sequence and plainly causal."""

    row: int
    count: int
    lead: int
    pages: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True)
class AttentionPlan:
    """Everything about a step that the attention of a layer needs, for one window."""

    ragged: Ragged
    window: int | None
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillSlice, ...]


def plan_attention(
    ragged: Ragged, window: int | None, kv_heads: int, blocks: int, dtype: torch.dtype
) -> AttentionPlan:
    """Work out groups, gathers and masks. blocks: size of the pool; dtype: of queries and pool."""
    single = ragged.counts == 1
    groups: dict[int, list[int]] = {}
    for i in np.flatnonzero(single):
        first = _first_block(int(ragged.starts[i]), window, ragged.block_size)
        own = int(ragged.starts[i]) // ragged.block_size + 1 - first
        groups.setdefault(_bucket(own), []).append(int(i))
    offsets = ragged.offsets
    decode = tuple(
        _decode_group(ragged, offsets, np.array(members), size, window, kv_heads, blocks, dtype)
        for size, members in sorted(groups.items())
    )
    prefill = tuple(
        _prefill_slice(ragged, int(offsets[i]), int(i), window, kv_heads, blocks, dtype)
        for i in np.flatnonzero(~single)
    )
    return AttentionPlan(ragged, window, decode, prefill)


def attend(q: torch.Tensor, layer: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """q [T, heads, head_dim] against one layer of the pool, which already holds the step's own keys and
    values.

    Returns [T, heads * head_dim]; rows beyond the plan's slices are zero."""
    _, _, kv_heads, block_size, head_dim = layer.shape
    pages = layer.view(-1, block_size * head_dim)
    heads = q.shape[1]
    out = q.new_zeros(q.shape)
    for group in plan.decode:
        n = group.rows.numel()
        gathered = pages.index_select(0, group.pages).view(2, n, kv_heads, -1, head_dim)
        query = q.index_select(0, group.rows).view(n, kv_heads, heads // kv_heads, head_dim)
        mixed = functional.scaled_dot_product_attention(
            query, gathered[0], gathered[1], attn_mask=group.mask
        )
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


def kv_rows(
    blocks: np.ndarray, offsets: np.ndarray, pool: int, kv_heads: int, block_size: int
) -> torch.Tensor:
    """Where the keys and values of positions at (block, offset) go: rows of a layer seen as [-1, head_dim],
    int64 [T * 2 * kv_heads], for `write_kv`."""
    head = np.arange(2)[:, None] * pool * kv_heads + np.arange(kv_heads)  # [2, kv_heads]
    page = blocks.astype(np.int64)[:, None, None] * kv_heads + head
    return torch.from_numpy((page * block_size + offsets[:, None, None]).reshape(-1))


def write_kv(kv: torch.Tensor, layer: torch.Tensor, rows: torch.Tensor) -> None:
    """Write kv [T, 2 * kv_heads, head_dim] (keys, then values) at `kv_rows`."""
    head_dim = layer.shape[-1]
    layer.view(-1, head_dim).index_copy_(0, rows, kv.reshape(-1, head_dim))


def _attend_slice(
    q: torch.Tensor, gathered: torch.Tensor, piece: PrefillSlice, window: int | None, out: torch.Tensor
) -> None:
    """q [count, heads, head_dim] against gathered [2, 1, kv_heads, keys, head_dim], into out."""
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
        high = piece.lead + end
        low = 0 if window is None else max(0, piece.lead + begin - window + 1)
        keys, values = gathered[..., low:high, :]
        shift = piece.mask.shape[1] - TILE - (piece.lead + begin)  # column of the first gathered key
        mask = piece.mask[: end - begin, low + shift : high + shift]
        mixed = functional.scaled_dot_product_attention(
            query[:, :, begin:end], keys, values, attn_mask=mask, enable_gqa=True
        )
        out[begin:end].copy_(mixed[0].transpose(0, 1))


def _decode_group(
    ragged: Ragged,
    offsets: np.ndarray,
    members: np.ndarray,
    size: int,
    window: int | None,
    kv_heads: int,
    pool: int,
    dtype: torch.dtype,
) -> DecodeGroup:
    positions = ragged.starts[members].astype(np.int64)
    first = np.array([_first_block(int(p), window, ragged.block_size) for p in positions])
    columns = first[:, None] + np.arange(size)
    last = positions // ragged.block_size
    tables = ragged.tables[members[:, None], np.minimum(columns, last[:, None])]
    keys = first[:, None] * ragged.block_size + np.arange(size * ragged.block_size)
    visible = keys <= positions[:, None]
    if window is not None:
        visible &= keys > positions[:, None] - window
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(torch.from_numpy(~visible), UNSEEN)
    rows = torch.from_numpy(offsets[members].astype(np.int64))
    return DecodeGroup(rows, _pages(tables, kv_heads, pool), mask[:, None, None])


def _prefill_slice(
    ragged: Ragged, row: int, index: int, window: int | None, kv_heads: int, pool: int, dtype: torch.dtype
) -> PrefillSlice:
    start, count = int(ragged.starts[index]), int(ragged.counts[index])
    first = _first_block(start, window, ragged.block_size)
    last = (start + count - 1) // ragged.block_size
    pages = _pages(ragged.tables[index : index + 1, first : last + 1], kv_heads, pool)
    lead = start - first * ragged.block_size
    if start == 0 and (window is None or count <= window):
        return PrefillSlice(row, count, lead, pages, None)
    return PrefillSlice(row, count, lead, pages, _tile_mask(lead + count, window, dtype))


def _tile_mask(keys: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """[TILE, keys + TILE]: column c stands for the key `c - keys` positions after the tile's first row, so
    a view of it is the mask of any tile of a slice with up to `keys` keys."""
    distance = torch.arange(-keys, TILE)[None] - torch.arange(TILE)[:, None]
    hidden = distance > 0
    if window is not None:
        hidden |= distance <= -window
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, UNSEEN)


def _pages(tables: np.ndarray, kv_heads: int, pool: int) -> torch.Tensor:
    """Rows to gather from a layer seen as [2 * blocks * kv_heads, block_size * head_dim], in the order
    [2, sequences, kv_heads, blocks], so that what was gathered is already laid out for attention."""
    head = np.arange(2)[:, None, None, None] * (pool * kv_heads) + np.arange(kv_heads)[:, None]
    return torch.from_numpy((tables.astype(np.int64)[:, None, :] * kv_heads + head).reshape(-1))


def _first_block(position: int, window: int | None, block_size: int) -> int:
    """The first block that a query at `position` sees."""
    return 0 if window is None else max(0, position - window + 1) // block_size


def _bucket(blocks: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: at most half as much again is padding, and few
    groups."""
    power = 1 << (blocks - 1).bit_length()
    return power // 4 * 3 if power >= 4 and blocks <= power // 4 * 3 else power
