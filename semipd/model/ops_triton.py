# mypy: ignore-errors
"""`ops.Ops` by Triton kernels: shapes and grids. Import only where Triton works, on a GPU or
interpreted."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
import triton

from semipd.model import attention_triton as attention
from semipd.model import layers_triton as layers
from semipd.model.ops import TILE, DeviceStep, Heads, Outline

PROGRAMS_PER_UNIT = 16  # decode splits contexts until there are about this many programs per SM
MOST_SPLITS = 64
HOPPER_SHARED = 200 * 1024  # bytes of shared memory that a program has there, and on nothing older
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tile:
    """How one of attention's kernels works: positions per iteration, warps, iterations in flight. rows: of
    a program of the prefill kernel."""

    block: int
    warps: int
    stages: int
    rows: int = TILE

    @property
    def constants(self) -> dict[str, int]:
        """For a launch."""
        return {"BLOCK_N": self.block, "num_warps": self.warps, "num_stages": self.stages}


class TritonOps:
    """Kernels on `device` for at most `rows` slices of one position in a step.

    Holds the scratch memory of split decode, so it belongs to one lane: two streams must not share it."""

    plans = False

    def __init__(self, device: torch.device, rows: int, heads: Heads, units: int) -> None:
        self._cast = os.environ.get("TRITON_INTERPRET") == "1"
        shared, dtypes = shared_memory(device), (torch.float32, torch.float16, torch.bfloat16)
        # By dtype and whether there is a window. Benchmarks put others here.
        self.prefill_tiles = {
            (dtype, windowed): prefill_tile(heads.dim, dtype, windowed, shared)
            for dtype in dtypes
            for windowed in (False, True)
        }
        self.decode_tiles = {dtype: decode_tile(heads.dim, dtype) for dtype in dtypes}
        self._units = units  # the scratch memory below is enough for this many, and no more
        cells = max(count * decode_splits(count, heads.kv, units) for count in range(1, rows + 1))
        self._sums = torch.empty(cells * heads.query * heads.dim, dtype=torch.float32, device=device)
        self._totals = torch.empty(cells * heads.query, dtype=torch.float32, device=device)
        self._maxima = torch.empty_like(self._totals)

    def plan(self, outline: Outline) -> None:
        """Nothing to prepare: the kernels find everything on the device."""

    def embed(self, step: DeviceStep, table: torch.Tensor, out: torch.Tensor) -> None:
        width = table.shape[1]
        layers.embed_kernel[(step.rows,)](
            out,
            table,
            step.tokens,
            step.row_slots,
            step.positions,
            step.tokens.stride(0),
            WIDTH=width,
            BLOCK=min(triton.next_power_of_2(width), 1024),
        )

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        self._norm(x, x, weight, eps, out, add=False)

    def add_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        self._norm(hidden, delta, weight, eps, out, add=True)

    def _norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        out: torch.Tensor,
        add: bool,
    ) -> None:
        rows, width = x.shape
        block = triton.next_power_of_2(width)
        layers.norm_kernel[(rows,)](
            out,
            x,
            delta,
            weight,
            eps,
            WIDTH=width,
            BLOCK=block,
            ADD=add,
            num_warps=8 if block > 2048 else 4,
        )

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        layer: torch.Tensor,
        step: DeviceStep,
        heads: Heads,
        cosine: torch.Tensor,
        sine: torch.Tensor,
    ) -> None:
        each = 8
        normed = heads.query_norm is not None
        layers.rotate_and_store_kernel[(step.rows, triton.cdiv(heads.query + 2 * heads.kv, each))](
            qkv,
            layer,
            step.row_slots,
            step.positions,
            step.tables,
            cosine,
            sine,
            heads.query_norm if normed else qkv,
            heads.key_norm if normed else qkv,
            heads.eps,
            step.tables.stride(0),
            layer.stride(0),
            layer.stride(1),
            QUERY=heads.query,
            KV=heads.kv,
            DIM=heads.dim,
            HALF_BLOCK=triton.next_power_of_2(heads.dim // 2),
            HEADS=each,
            BLOCK_SIZE=layer.shape[3],
            NORMED=normed,
        )

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
        shape = {
            "QUERY": heads.query,
            "KV": heads.kv,
            "DIM": heads.dim,
            "DIM_BLOCK": max(triton.next_power_of_2(heads.dim), 16),
            "BLOCK_SIZE": layer.shape[3],
            "WINDOWED": window is not None,
            "CAST": self._cast,
        }
        scale = _LOG2_E / math.sqrt(heads.dim)
        strides = (step.tables.stride(0), layer.stride(0), layer.stride(1))
        if tiles := step.tiles.shape[0]:
            tile = self.prefill_tiles[layer.dtype, window is not None]
            parts = TILE // tile.rows
            attention.prefill_kernel[(heads.query, tiles, parts)](
                out, qkv, layer, step.tables, step.tiles, scale, window or 0, *strides,
                BLOCK_M=tile.rows, PARTS=parts, **tile.constants, **shape,
            )  # fmt: skip
        if count := step.singles.shape[0]:
            splits = decode_splits(count, heads.kv, min(units, self._units))
            scratch = (self._sums, self._totals, self._maxima)
            attention.decode_kernel[(count, heads.kv, splits)](
                out, *scratch, qkv, layer, step.tables, step.singles, step.row_slots, step.positions,
                scale, window or 0, *strides,
                GROUP_BLOCK=max(triton.next_power_of_2(heads.query // heads.kv), 16),
                SPLITS=splits, **self.decode_tiles[layer.dtype].constants, **shape,
            )  # fmt: skip
            if splits > 1:
                attention.reduce_kernel[(count, heads.query)](
                    out, *scratch, step.singles,
                    QUERY=heads.query, DIM=heads.dim, DIM_BLOCK=shape["DIM_BLOCK"], SPLITS=splits,
                    num_warps=4,
                )  # fmt: skip

    def gated(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        rows, width = out.shape
        block = min(triton.next_power_of_2(width), 1024)
        layers.gated_kernel[(rows, triton.cdiv(width, block))](out, gate_up, WIDTH=width, BLOCK=block)


def prefill_tile(dim: int, dtype: torch.dtype, windowed: bool, shared: int) -> Tile:
    """As much per iteration as the registers of a thread hold, by what the compiler reports. shared: bytes
    of shared memory that a program may have."""
    hopper = shared >= HOPPER_SHARED
    if dtype == torch.float32:  # the tensor cores take each operand in parts
        if dim > 128:
            return Tile(16, 4, 2, 16)
        return Tile(32, 8, 2) if dim <= 64 or hopper else Tile(16, 4, 2, 32)
    if dim > 128:
        return Tile(32, 8, 2) if hopper else Tile(32, 8, 2, 64)
    return Tile(128 if hopper and not windowed else 64, 8, 2)


def decode_tile(dim: int, dtype: torch.dtype) -> Tile:
    """As `prefill_tile`; the same for every card."""
    return Tile(16, 4, 3) if dtype == torch.float32 and dim > 128 else Tile(64, 4, 3)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have; 0 where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


def decode_splits(rows: int, kv_heads: int, units: int) -> int:
    """Into how many parts to cut every context, a power of two: enough programs to fill the units."""
    wanted = PROGRAMS_PER_UNIT * units // max(rows * kv_heads, 1)
    return min(1 << max(wanted.bit_length() - 1, 0), MOST_SPLITS)
