"""Linear layers on the compiled kernels: weights packed once, one kernel for any number of rows, so a row's
result has the same bits for any number of rows and threads, which oneDNN's has not.

bfloat16 only with AMX, where they read weights at memory speed (oneDNN's packed ones reach half of it on
two cores); elsewhere oneDNN's packed linears were measured at memory speed already (layers.py). float32
from AVX-512 on.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as functional

from semipd.model.kernels import AMX, AVX512, FLOATS, TILES, Kernels, LinearShape, QuantizedShape
from semipd.model.layers import Compute, Kind

PAIR, DEPTH = 32, 32  # columns and inputs of a packed tile (csrc/linear.h)


class Native:
    """A linear layer of csrc/linear.h. Subclasses keep alive what its shape points to."""

    def __init__(self, kernels: Kernels, shape: LinearShape | QuantizedShape, outputs: int) -> None:
        self.shape = shape
        self.outputs = outputs
        self._pointer = ctypes.byref(shape)
        self._call = kernels.library.semipd_linear

    def scratch_bytes(self, rows: int, threads: int) -> int:
        """Room that a call needs besides its result."""
        return 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        out = x.new_empty((rows, self.outputs))
        scratch = torch.empty(self.scratch_bytes(rows, torch.get_num_threads()), dtype=torch.uint8)
        self._call(
            self._pointer,
            x.data_ptr(),
            x.stride(0),
            rows,
            out.data_ptr(),
            self.outputs,
            scratch.data_ptr(),
        )
        return out


class CompiledLinear(Native):
    """x -> x W + b, in bfloat16 on tile registers or in float32. The unpacked weight is not kept."""

    def __init__(self, kernels: Kernels, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """weight: [outputs, inputs]; in bfloat16, inputs are a multiple of 32."""
        self._set(
            kernels, weight.shape[0], padded_to(weight), None if bias is None else padded_to(bias), False
        )

    def _set(
        self, kernels: Kernels, outputs: int, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool
    ) -> None:
        tiled = weight.dtype == torch.bfloat16
        self._weight = pack(weight) if tiled else pack_floats(weight)
        self._bias = None if bias is None else bias.float().contiguous()
        shape = LinearShape(
            TILES if tiled else FLOATS,
            kernels.level,
            weight.shape[1],
            outputs,
            weight.shape[0] // PAIR,
            gated,
            self._weight.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
        )
        super().__init__(kernels, shape, outputs)


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
    tiled = dtype == torch.bfloat16
    if kernels is None or kernels.level < (AMX if tiled else AVX512):
        return otherwise

    def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Compute:
        if tiled and weight.shape[1] % DEPTH:
            return otherwise.linear(weight, bias)
        return CompiledLinear(kernels, weight, bias)

    def gated(
        gate: torch.Tensor,
        gate_bias: torch.Tensor | None,
        up: torch.Tensor,
        up_bias: torch.Tensor | None,
    ) -> Compute:
        if (tiled and gate.shape[1] % DEPTH) or (gate_bias is None) != (up_bias is None):
            return otherwise.gated(gate, gate_bias, up, up_bias)
        return CompiledGated(kernels, gate, gate_bias, up, up_bias)

    return Kind("compiled", linear, gated)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """[columns, inputs] -> [columns / 32, inputs / 32, 2 panels, 16 pairs of inputs, 16 columns, 2]."""
    columns, inputs = weight.shape
    tiles = weight.view(columns // PAIR, 2, 16, inputs // DEPTH, 16, 2)
    return tiles.permute(0, 3, 1, 4, 2, 5).contiguous()


def pack_floats(weight: torch.Tensor) -> torch.Tensor:
    """[columns, inputs] -> [columns / 32, inputs up to a multiple of 32, 32 columns]."""
    columns, inputs = weight.shape
    padded = functional.pad(weight, (0, -inputs % DEPTH))
    return padded.view(columns // PAIR, PAIR, -1).transpose(1, 2).contiguous()


def padded_to(x: torch.Tensor, to: int = PAIR) -> torch.Tensor:
    """Zeros after the last row, up to a multiple."""
    missing = -x.shape[0] % to
    return functional.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x


def interleaved(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Sixteen rows of the one, the same sixteen of the other, and so on."""
    gate, up = (padded_to(x, 16).view(-1, 16, *x.shape[1:]) for x in (gate, up))
    return torch.stack((gate, up), dim=1).flatten(0, 2)
