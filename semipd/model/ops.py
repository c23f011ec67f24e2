"""What a decoder does between its matrix products on a device that runs kernels asynchronously, as one
protocol with two implementations: plain PyTorch here, Triton in `ops_triton`.

Nothing here allocates what a later layer needs: results go to buffers that the caller owns, so that their
addresses stay the same from step to step (CUDA graphs) and from stream to stream. Nothing of a Triton
implementation reads from the device, so a launching thread never waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as functional


@dataclass(frozen=True)
class DeviceStep:
    """The rows of one step, all int64 on the device unless said otherwise.

    row_slots, positions: [T], what each row computes. tokens: int32 [slots, any], the token table, read at
    (slot, position). tables: int32 [slots, any], the block tables. tiles: [n, 4], runs of rows of one
    slice as (slot, first position, first row, rows), at most `TILE` rows each. singles: [m], the rows whose
    slice has one position. sample: [k], the rows whose next token is wanted, or None for all rows.
    """

    row_slots: torch.Tensor
    positions: torch.Tensor
    tokens: torch.Tensor
    tables: torch.Tensor
    tiles: torch.Tensor
    singles: torch.Tensor
    sample: torch.Tensor | None

    @property
    def rows(self) -> int:
        return self.row_slots.shape[0]


@dataclass(frozen=True)
class Outline:
    """What the host knows of a step: its slices, int64 [n] each on the host; the block tables on the device
    and the positions of a block. graph: a captured graph of n rows runs it."""

    slots: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    tables: torch.Tensor
    block_size: int
    graph: bool = False


@dataclass(frozen=True)
class Heads:
    """How a row of queries, keys and values is laid out: `query` heads, then `kv` keys, then `kv` values,
    each `dim` wide. query_norm, key_norm: weights [dim] of the norms of some families, else None."""

    query: int
    kv: int
    dim: int
    eps: float
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None


TILE = 128  # most query rows of a prefill tile


class Ops(Protocol):
    """Every method writes its last argument(s) and returns nothing. Activations are [rows, width] in the
    model's dtype, contiguous; arithmetic is float32."""

    @property
    def plans(self) -> bool:
        """Whether `plan` has to be called."""
        ...

    def plan(self, outline: Outline) -> None:
        """Called on the host before the first launch of every step, and before each replay of a captured
        one, on the step's stream, when the block tables are up to date there. Writes no argument."""
        ...

    def embed(self, step: DeviceStep, table: torch.Tensor, out: torch.Tensor) -> None:
        """out [T, hidden] = table[token of each row]."""
        ...

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        """out = x / rms(x) * weight."""
        ...

    def add_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        """hidden += delta (rounded to its dtype), then out = norm(hidden)."""
        ...

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        layer: torch.Tensor,
        step: DeviceStep,
        heads: Heads,
        cosine: torch.Tensor,
        sine: torch.Tensor,
    ) -> None:
        """Norm (where the family has one) and rotate the queries of qkv in place; norm and rotate the keys
        and write them, and the values, into `layer` [2, blocks, kv_heads, block_size, head_dim]. The keys
        in qkv are left undefined. cosine, sine: [positions, head_dim / 2]."""
        ...

    def attend(
        self,
        qkv: torch.Tensor,
        layer: torch.Tensor,
        step: DeviceStep,
        heads: Heads,
        window: int | None,
        units: int,
        out: torch.Tensor,
    ) -> None:
        """out [T, query heads * head_dim]: each row's queries against its sequence in `layer`, causal, over
        the last `window` positions. units: SMs that the launch may count on."""
        ...

    def gated(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """out [T, n] = silu(gate_up[:, :n]) * gate_up[:, n:]."""
        ...


class PlainOps:
    """The twin that any torch can run: slow, and it reads sizes back from the device."""

    plans = False

    def plan(self, outline: Outline) -> None:
        """Nothing to prepare."""

    def embed(self, step: DeviceStep, table: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(functional.embedding(step.tokens[step.row_slots, step.positions], table))

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        out.copy_(_norm(x.float(), weight, eps))

    def add_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        hidden.copy_(hidden.float() + delta.float())
        self.norm(hidden, weight, eps, out)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        layer: torch.Tensor,
        step: DeviceStep,
        heads: Heads,
        cosine: torch.Tensor,
        sine: torch.Tensor,
    ) -> None:
        rows = qkv.view(step.rows, -1, heads.dim)
        cosines, sines = (table[step.positions].float()[:, None] for table in (cosine, sine))
        query = _normed(rows[:, : heads.query].float(), heads.query_norm, heads.eps)
        key = _normed(rows[:, heads.query : heads.query + heads.kv].float(), heads.key_norm, heads.eps)
        rows[:, : heads.query] = _rotated(query, cosines, sines).to(qkv.dtype)
        size = layer.shape[3]
        blocks = step.tables[step.row_slots, step.positions // size].long()
        offsets = step.positions % size
        layer[0].transpose(1, 2)[blocks, offsets] = _rotated(key, cosines, sines).to(layer.dtype)
        layer[1].transpose(1, 2)[blocks, offsets] = rows[:, heads.query + heads.kv :].to(layer.dtype)

    def attend(
        self,
        qkv: torch.Tensor,
        layer: torch.Tensor,
        step: DeviceStep,
        heads: Heads,
        window: int | None,
        units: int,
        out: torch.Tensor,
    ) -> None:
        queries = qkv.view(step.rows, -1, heads.dim)[:, : heads.query]
        mixed = out.view(step.rows, heads.query, heads.dim)
        for row in step.singles.tolist():
            slot, first = int(step.row_slots[row]), int(step.positions[row])
            mixed[row : row + 1] = _attend(queries[row : row + 1], layer, step.tables[slot], first, window)
        for slot, first, row, count in step.tiles.tolist():
            rows = slice(row, row + count)
            mixed[rows] = _attend(queries[rows], layer, step.tables[slot], first, window)

    def gated(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        gate, up = gate_up.float().chunk(2, dim=-1)
        out.copy_(functional.silu(gate) * up)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def _normed(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x if weight is None else _norm(x, weight, eps)


def _rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """x float32 [T, heads, dim], each pair (i, i + dim / 2) turned by its position's angle."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1)


def _attend(
    queries: torch.Tensor, layer: torch.Tensor, table: torch.Tensor, first: int, window: int | None
) -> torch.Tensor:
    """queries [n, heads, dim] at positions first.. of one sequence -> the same shape, in layer's dtype."""
    count, heads, dim = queries.shape
    end = first + count
    begin = 0 if window is None else max(0, first - window + 1)
    seen = torch.arange(begin, end, device=layer.device)
    size = layer.shape[3]
    blocks = table[seen // size].long()
    keys, values = layer.transpose(2, 3)[:, blocks, seen % size].float().unbind(0)
    at = torch.arange(first, end, device=layer.device)[:, None]
    hidden = seen > at
    if window is not None:
        hidden = hidden | (seen <= at - window)
    query = queries.float().view(count, keys.shape[1], -1, dim)
    scores = torch.einsum("nhgd,thd->hgnt", query, keys) / dim**0.5
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hgnt,thd->nhgd", weights, values).reshape(count, heads, dim).to(layer.dtype)
