"""Building blocks without state of their own: linears (packed and plain), the norm, the activation.

A row's result should not depend on how many rows share the call (DESIGN.md, rule 3). What was measured with
oneDNN 3.12 packed linears, on Zen 4 and on a Xeon with AMX, with one thread and two:
float32: every row count from 2 on gives the same bits, a single row does not when there are many inputs, so
rows are padded to 4. bfloat16 without AMX: all counts give the same bits. bfloat16 with AMX: all counts up
to 32 do; above, with more than about 512 inputs, sums are blocked by the count, and results differ by
rounding.
"""

from __future__ import annotations

import logging
from typing import Protocol

import torch
import torch.nn.functional as functional

logger = logging.getLogger(__name__)

PACK_ROWS = 8  # a hint to oneDNN; layouts packed for 8 and for 512 rows measured the same


class Linear(Protocol):
    """x [rows, inputs] -> [rows, outputs], both in the model's dtype."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class PlainLinear:
    """The twin that any torch can run: weight [outputs, inputs], bias [outputs] or None."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


class PackedLinear:
    """A weight reordered once into oneDNN's own layout, which saves reordering it at every call.

    `_reorder_linear_weight` and `_linear_pointwise` are private to torch: ask `packing_works` first.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return result


def packing_works(dtype: torch.dtype) -> bool:
    """Whether this torch has the private packed linear and it gives a linear's result."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator).to(dtype)
    bias = torch.randn(96, generator=generator).to(dtype)
    x = torch.randn(5, 64, generator=generator).to(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.25  # |result| is about 8; one bf16 step there is 0.06
    try:
        result = PackedLinear(weight, bias)(x)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError) as error:
        logger.info(
            "oneDNN packing is not available here, using plain linears: %s", str(error).split("\n")[0]
        )
        return False
    exact = functional.linear(x.double(), weight.double(), bias.double())
    return bool((result.double() - exact).abs().max() < tolerance)


def padded_rows(rows: int, dtype: torch.dtype) -> int:
    """How many rows to compute for `rows`: enough that results do not depend on the count (see above), and
    few distinct counts, because oneDNN compiles a kernel for each (about 1 ms)."""
    if rows > 32:
        return -(-rows // 16) * 16
    if rows <= 4 and dtype != torch.float32:
        return rows
    return -(-rows // 4) * 4


def pad_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """x [n, width] with zero rows added up to `rows`; x itself when it has them."""
    return x if x.shape[0] == rows else functional.pad(x, (0, 0, 0, rows - x.shape[0]))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension."""
    return functional.rms_norm(x, weight.shape, weight, eps)


def silu_and_multiply(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for [rows, gate | up]."""
    half = gate_up.shape[-1] // 2
    return functional.silu(gate_up[:, :half]).mul_(gate_up[:, half:])
