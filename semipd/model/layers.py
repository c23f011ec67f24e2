"""Building blocks without state of their own: linears and gated linears (packed and plain), the norm, rows.

A row's result should not depend on how many rows share the call (DESIGN.md, rule 3). What was measured with
oneDNN 3.12 packed linears, on Zen 4 and on a Xeon with AMX, with one thread and two:
float32: every row count from 2 on gives the same bits, a single row does not when there are many inputs, so
rows are padded to 4. bfloat16 without AMX: all counts give the same bits. bfloat16 with AMX: all counts up
to 32 do; above, with more than about 512 inputs, sums are blocked by the count, and results differ by
rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as functional

logger = logging.getLogger(__name__)

PACK_ROWS = 8  # a hint to oneDNN; layouts packed for 8 and for 512 rows measured the same
Compute = Callable[
    [torch.Tensor], torch.Tensor
]  # x [rows, inputs] -> [rows, outputs], in the model's dtype


@dataclass(frozen=True)
class Kind:
    """One way to hold and run linears. `linear(weight [outputs, inputs], bias)` gives x -> x W + b;
    `gated(gate weight, gate bias, up weight, up bias)` gives x -> silu(gate(x)) * up(x). Weights are
    tensors; `quantized_kind` also takes quantised ones."""

    name: str
    linear: Callable[..., Compute]
    gated: Callable[..., Compute]


@dataclass(frozen=True)
class Layer:
    """One layer's parameters. The norms of queries and keys exist in some families only."""

    qkv: Compute
    output: Compute
    gate_up: Compute
    down: Compute
    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    window: int | None


class PlainLinear:
    """The twin that any torch can run."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight.clone()  # it may be a view of a file
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


class PlainGated:
    """Gate and up projection as one matrix."""

    def __init__(
        self,
        gate: torch.Tensor,
        gate_bias: torch.Tensor | None,
        up: torch.Tensor,
        up_bias: torch.Tensor | None,
    ) -> None:
        self.size = gate.shape[0]
        self.weight = torch.cat((gate, up))
        self.bias = (
            torch.cat((gate_bias, up_bias)) if gate_bias is not None and up_bias is not None else None
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        both = functional.linear(x, self.weight, self.bias)
        return functional.silu(both[:, : self.size]).mul_(both[:, self.size :])


class PackedLinear:
    """A weight reordered once into oneDNN's own layout, which saves reordering it at every call.

    The operators are private to torch: ask `choose_kind` first. The unpacked weight is not kept."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return result


class PackedGated:
    """Gate and up projection apart, so that oneDNN applies the activation and the product to each tile
    while it is in cache: on 512 rows of 896 to 2 x 4864 a fifth of the time of both."""

    def __init__(
        self,
        gate: torch.Tensor,
        gate_bias: torch.Tensor | None,
        up: torch.Tensor,
        up_bias: torch.Tensor | None,
    ) -> None:
        self.gate = PackedLinear(gate, gate_bias)
        self.up = PackedLinear(up, up_bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        linear = torch.ops.mkldnn._linear_pointwise
        gate = linear(x, self.gate.packed, self.gate.bias, "swish", [], "")
        result: torch.Tensor = linear.binary(x, gate, self.up.packed, self.up.bias, "mul")
        return result


PLAIN = Kind("plain", PlainLinear, PlainGated)
PACKED = Kind("packed", PackedLinear, PackedGated)


def choose_kind(dtype: torch.dtype) -> Kind:
    """PACKED where this torch has the private operators and they give the right results, else PLAIN."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / 4).to(dtype)

    x, parameters = random(5, 64), (random(96, 64), random(96), random(96, 64), random(96))
    exact = [tensor.double() for tensor in parameters]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # results are of size 1
    try:
        linear = PackedLinear(*parameters[:2])(x) - PlainLinear(*exact[:2])(x.double())
        gated = PackedGated(*parameters)(x) - PlainGated(*exact)(x.double())
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.info("no packed linears here, using plain ones: %s", str(error).partition("\n")[0])
        return PLAIN
    wrong = max(float(linear.abs().max()), float(gated.abs().max()))
    if not wrong < tolerance:
        logger.warning("packed linears are off by %.2g here, using plain ones", wrong)
        return PLAIN
    return PACKED


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
