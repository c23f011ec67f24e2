"""Weights in 4 or 8 bits: what they are, how a matrix is rounded to them, and linear layers over them.

An unsigned weight u stands for scale * (u - zero); groups of inputs of one output share a scale.
Activations are rounded to 8 bits by the same groups, so sums within a group are exact integers
(csrc/quantized.c).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional

from semipd.model.compiled import PAIR, Native, interleaved, padded_to
from semipd.model.kernels import AVX512_VNNI, QUANTIZED, Kernels, QuantizedShape
from semipd.model.layers import Compute, Kind
from semipd.model.room import Room

logger = logging.getLogger(__name__)

METHODS = ("none", "int8", "int4")
GROUPS_4 = (
    64,
    32,
)  # inputs that share a scale when a matrix is rounded to 4 bits here: the first that fits


@dataclass(frozen=True)
class Quantized:
    """values: uint8 [outputs, inputs], all below 2 ** bits. scale: float32 [outputs, groups]. zero: uint8
    [outputs, groups], or one number for all. A group is inputs / groups inputs, one after another."""

    bits: int
    values: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | int

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def group(self) -> int:
        return self.values.shape[1] // self.scale.shape[1]

    def plain(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix that is meant, [outputs, inputs]."""
        outputs, groups = self.scale.shape
        zero = self.zero[..., None].float() if isinstance(self.zero, torch.Tensor) else float(self.zero)
        values = self.values.view(outputs, groups, -1).float()
        return ((values - zero) * self.scale[..., None]).view(self.shape).to(dtype)


Matrix = torch.Tensor | Quantized


def quantize(weight: torch.Tensor, method: str) -> Quantized:
    """Round a matrix [outputs, inputs] to the nearest: int8 with a scale an output, int4 with one for every
    64 or 32 inputs, or one an output where those do not divide the inputs."""
    outputs, inputs = weight.shape
    if method == "int8":
        scale = weight.abs().amax(1, keepdim=True).float().clamp(min=1e-30) / 127
        values = (weight.float() / scale).round().add_(128).to(torch.uint8)
        return Quantized(8, values, scale, 128)
    group = next((size for size in GROUPS_4 if inputs % size == 0), inputs)
    grouped = weight.float().view(outputs, -1, group)
    largest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))
    scale = largest / -8  # the largest becomes -8 exactly; its sign decides which side has 8 steps
    scale = torch.where(scale == 0, 1.0, scale)
    values = (grouped / scale).round().clamp(-8, 7).add_(8).to(torch.uint8)
    return Quantized(4, values.view(outputs, inputs), scale[..., 0].contiguous(), 8)


def stack(matrices: Sequence[Matrix], dtype: torch.dtype) -> Matrix:
    """The rows of all, one after another; plain where they are not quantised alike."""
    quantized = [matrix for matrix in matrices if isinstance(matrix, Quantized)]
    alike = len({(matrix.bits, matrix.group) for matrix in quantized}) == 1
    if not quantized or len(quantized) < len(matrices) or not alike:
        return torch.cat([plain(matrix, dtype) for matrix in matrices])
    return Quantized(
        quantized[0].bits,
        torch.cat([matrix.values for matrix in quantized]),
        torch.cat([matrix.scale for matrix in quantized]),
        _zeros(quantized),
    )


def plain(matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
    return matrix.plain(dtype) if isinstance(matrix, Quantized) else matrix


def multiply_plainly(x: torch.Tensor, matrix: Quantized, bias: torch.Tensor | None) -> torch.Tensor:
    """The twin of `QuantizedLinear`: the same rounding of x, products in float64. Returns float64."""
    rows, groups = x.shape[0], matrix.scale.shape[1]
    grouped = x.double().view(rows, groups, -1)
    step = grouped.abs().amax(2, keepdim=True) / 127
    rounded = torch.where(step > 0, grouped / step, 0.0).round() * step
    out = rounded.view(rows, -1) @ matrix.plain(torch.float64).T
    return out if bias is None else out + bias.double()


class QuantizedLinear(Native):
    """x bfloat16 [rows, inputs] -> x W + b."""

    def __init__(self, kernels: Kernels, matrix: Quantized, bias: torch.Tensor | None) -> None:
        self._set(
            kernels, matrix.shape[0], _padded(matrix), None if bias is None else padded_to(bias), False
        )

    def _set(
        self, kernels: Kernels, outputs: int, matrix: Quantized, bias: torch.Tensor | None, gated: bool
    ) -> None:
        room, inputs = kernels.room, matrix.shape[1]  # before padding
        group = -(-matrix.group // 32) * 32 if matrix.scale.shape[1] == 1 else matrix.group
        self._width, self._groups = group * matrix.scale.shape[1], matrix.scale.shape[1]
        self._weight = _pack(room, functional.pad(matrix.values, (0, self._width - inputs)), matrix.bits)
        self._scale = _by_pair(room, matrix.scale)
        self._zeros = _by_pair(room, matrix.zero) if isinstance(matrix.zero, torch.Tensor) else None
        self._bias = None if bias is None else bias.float().contiguous()
        pairs = matrix.shape[0] // PAIR
        bias_at = None if self._bias is None else self._bias.data_ptr()
        shape = QuantizedShape(
            *(QUANTIZED, kernels.level, inputs, outputs, pairs, gated, None, bias_at),
            *(matrix.bits, self._width, group),
            matrix.zero if isinstance(matrix.zero, int) else 0,
            self._weight.data_ptr(),
            self._scale.data_ptr(),
            None if self._zeros is None else self._zeros.data_ptr(),
        )
        super().__init__(kernels, shape, outputs)

    def scratch_bytes(self, rows: int, threads: int) -> int:
        return rows * (self._width + 8 * self._groups) + threads * self._width * PAIR


class QuantizedGated(QuantizedLinear):
    """x -> silu(gate(x)) * up(x)."""

    def __init__(
        self,
        kernels: Kernels,
        gate: Quantized,
        gate_bias: torch.Tensor | None,
        up: Quantized,
        up_bias: torch.Tensor | None,
    ) -> None:
        bias = None
        if gate_bias is not None and up_bias is not None:
            bias = interleaved(gate_bias, up_bias)
        zeros = _zeros((gate, up))
        both = Quantized(
            gate.bits,
            interleaved(gate.values, up.values),
            interleaved(gate.scale, up.scale),
            zeros if isinstance(zeros, int) else interleaved(*zeros.chunk(2)),
        )
        self._set(kernels, gate.shape[0], both, bias, True)


def quantized_kind(kernels: Kernels | None, dtype: torch.dtype, method: str, otherwise: Kind) -> Kind:
    """Linears that take matrices in either form. method: what to round plain ones to, or none.

    Quantised ones without a kernel (no AVX512-VNNI, float32, odd groups) become plain: right, but large."""
    ready = kernels is not None and kernels.level >= AVX512_VNNI and dtype == torch.bfloat16

    def fits(matrix: Quantized) -> bool:
        return ready and (matrix.group % 32 == 0 or matrix.scale.shape[1] == 1)

    def rounded(matrix: Matrix) -> Matrix:
        if isinstance(matrix, Quantized) or method == "none":
            return matrix
        return quantize(matrix, method)

    def linear(matrix: Matrix, bias: torch.Tensor | None) -> Compute:
        matrix = rounded(matrix)
        if kernels is not None and isinstance(matrix, Quantized) and fits(matrix):
            return QuantizedLinear(kernels, matrix, bias)
        return otherwise.linear(plain(matrix, dtype), bias)

    def gated(
        gate: Matrix, gate_bias: torch.Tensor | None, up: Matrix, up_bias: torch.Tensor | None
    ) -> Compute:
        gate, up = rounded(gate), rounded(up)
        if not (isinstance(gate, Quantized) and isinstance(up, Quantized)):
            return otherwise.gated(plain(gate, dtype), gate_bias, plain(up, dtype), up_bias)
        if (gate.bits, gate.group) == (up.bits, up.group) and fits(gate) and kernels is not None:
            return QuantizedGated(kernels, gate, gate_bias, up, up_bias)
        return otherwise.gated(plain(gate, dtype), gate_bias, plain(up, dtype), up_bias)

    if not ready:
        logger.info("no kernels for quantised weights here: they are expanded to %s", dtype)
    return Kind("quantized", linear, gated)


def _pack(room: Room, values: torch.Tensor, bits: int) -> torch.Tensor:
    """[columns, inputs] -> the layout of csrc/quantized.h."""
    columns, inputs = values.shape
    lines = values.view(columns // PAIR, 2, 16, inputs // 4, 4).permute(0, 3, 1, 2, 4)
    if bits == 8:
        return room.keep(lines)
    return room.keep(lines[:, :, 0] | lines[:, :, 1] << 4)


def _by_pair(room: Room, x: torch.Tensor) -> torch.Tensor:
    """[columns, groups] -> [pairs, groups, 32]."""
    return room.keep(x.view(-1, PAIR, x.shape[1]).transpose(1, 2))


def _padded(matrix: Quantized) -> Quantized:
    """With outputs up to a multiple of 32, whose scale is 0."""
    zero = padded_to(matrix.zero) if isinstance(matrix.zero, torch.Tensor) else matrix.zero
    return Quantized(matrix.bits, padded_to(matrix.values), padded_to(matrix.scale), zero)


def _zeros(matrices: Sequence[Quantized]) -> torch.Tensor | int:
    first = matrices[0].zero
    if isinstance(first, int) and all(matrix.zero is first or matrix.zero == first for matrix in matrices):
        return first
    each = [
        matrix.zero
        if isinstance(matrix.zero, torch.Tensor)
        else torch.full(matrix.scale.shape, matrix.zero, dtype=torch.uint8)
        for matrix in matrices
    ]
    return torch.cat(each)
