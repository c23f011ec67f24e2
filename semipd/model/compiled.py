"""Linear layers on the compiled kernels: bfloat16 weights packed once, one kernel for any number of rows.

Only for processors with AMX, where they read weights at memory speed (oneDNN's packed ones reach half of it
on two cores), and where a row's result has the same bits for any number of rows and threads, which oneDNN's
has not. Elsewhere oneDNN's packed linears were measured at memory speed already (layers.py).
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as functional

from semipd.model.kernels import AMX, Kernels, LinearShape
from semipd.model.layers import Compute, Kind

PAIR, DEPTH = 32, 32  # columns and inputs of a packed tile (csrc/linear.h)


class CompiledLinear:
    """x -> x W + b. The unpacked weight is not kept."""

    def __init__(self, kernels: Kernels, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """weight: bfloat16 [outputs, inputs], with inputs a multiple of 32."""
        self._set(
            kernels, weight.shape[0], padded_to(weight), None if bias is None else padded_to(bias), False
        )

    def _set(
        self, kernels: Kernels, outputs: int, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool
    ) -> None:
        self.outputs = outputs
        self._weight = pack(weight)
        self._bias = None if bias is None else bias.float().contiguous()
        self._shape = LinearShape(
            weight.shape[1],
            outputs,
            weight.shape[0] // PAIR,
            gated,
            self._weight.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
        )
        self._pointer = ctypes.byref(self._shape)
        self._call = kernels.library.semipd_linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        out = x.new_empty((rows, self.outputs))
        self._call(self._pointer, x.data_ptr(), x.stride(0), rows, out.data_ptr(), self.outputs)
        return out


class CompiledGated(CompiledLinear):
    """x -> silu(gate(x)) * up(x), with the activation applied while the sums are in cache."""

    def __init__(
        self,
        kernels: Kernels,
        gate: torch.Tensor,
        gate_bias: torch.Tensor | None,
        up: torch.Tensor,
        up_bias: torch.Tensor | None,
    ) -> None:
        bias = None
        if gate_bias is not None and up_bias is not None:
            bias = interleaved(gate_bias, up_bias)
        self._set(kernels, gate.shape[0], interleaved(gate, up), bias, True)


def compiled_kind(kernels: Kernels | None, dtype: torch.dtype, otherwise: Kind) -> Kind:
    """Compiled linears wherever kernels, dtype and shape allow them; `otherwise` elsewhere."""
    if kernels is None or kernels.level < AMX or dtype != torch.bfloat16:
        return otherwise

    def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Compute:
        if weight.shape[1] % DEPTH:
            return otherwise.linear(weight, bias)
        return CompiledLinear(kernels, weight, bias)

    def gated(
        gate: torch.Tensor,
        gate_bias: torch.Tensor | None,
        up: torch.Tensor,
        up_bias: torch.Tensor | None,
    ) -> Compute:
        if gate.shape[1] % DEPTH or (gate_bias is None) != (up_bias is None):
            return otherwise.gated(gate, gate_bias, up, up_bias)
        return CompiledGated(kernels, gate, gate_bias, up, up_bias)

    return Kind("compiled", linear, gated)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """[columns, inputs] -> [columns / 32, inputs / 32, 2 panels, 16 pairs of inputs, 16 columns, 2]."""
    columns, inputs = weight.shape
    tiles = weight.view(columns // PAIR, 2, 16, inputs // DEPTH, 16, 2)
    return tiles.permute(0, 3, 1, 4, 2, 5).contiguous()


def padded_to(x: torch.Tensor, to: int = PAIR) -> torch.Tensor:
    """Zeros after the last row, up to a multiple."""
    missing = -x.shape[0] % to
    return functional.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x


def interleaved(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Sixteen rows of the one, the same sixteen of the other, and so on."""
    gate, up = (padded_to(x, 16).view(-1, 16, *x.shape[1:]) for x in (gate, up))
    return torch.stack((gate, up), dim=1).flatten(0, 2)
