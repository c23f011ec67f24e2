"""Linear layers on the compiled kernels: weights packed once, one kernel for any number of rows, so a row's
result has the same bits for any number of rows and threads, which oneDNN's has not.

bfloat16 from AVX2 on: tile registers (AMX), products of pairs (AVX512-BF16), or widened to float32. float32
from AVX-512 on.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as functional

from semipd.model.kernels import AVX2, AVX512, FLOATS, HALVES, Kernels, LinearShape, QuantizedShape
from semipd.model.layers import Compute, Kind
from semipd.model.room import Room

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
    """x -> x W + b, in bfloat16 or in float32. The unpacked weight is not kept."""

    def __init__(self, kernels: Kernels, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """weight: [outputs, inputs]; in bfloat16, inputs are a multiple of 32."""
        padded = padded_to(weight)
        if tiled(weight):
            packed = pack(kernels.room, *padded.view(-1, 2, 16, weight.shape[1]).unbind(1))
        else:
            packed = pack_floats(kernels.room, padded)
        self._set(kernels, weight, packed, None if bias is None else padded_to(bias), False)

    def _set(
        self,
        kernels: Kernels,
        weight: torch.Tensor,
        packed: torch.Tensor,
        bias: torch.Tensor | None,
        gated: bool,
    ) -> None:
        """weight: one matrix as it was, for its size. packed: [columns / 32, ...]."""
        self._weight = packed
        self._bias = None if bias is None else bias.float().contiguous()
        shape = LinearShape(
            HALVES if tiled(weight) else FLOATS,
            kernels.level,
            weight.shape[1],
            weight.shape[0],
            packed.shape[0],
            gated,
            packed.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
        )
        super().__init__(kernels, shape, weight.shape[0])


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
        if tiled(gate):
            packed = pack(kernels.room, *(padded_to(x, 16).view(-1, 16, x.shape[1]) for x in (gate, up)))
        else:
            packed = pack_floats(kernels.room, interleaved(gate, up))
        self._set(kernels, gate, packed, bias, True)


def compiled_kind(kernels: Kernels | None, dtype: torch.dtype, otherwise: Kind) -> Kind:
    """Compiled linears wherever kernels, dtype and shape allow them; `otherwise` elsewhere."""
    depth = DEPTH if dtype == torch.bfloat16 else 1
    if kernels is None or kernels.level < (AVX2 if dtype == torch.bfloat16 else AVX512):
        return otherwise

    def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Compute:
        if weight.shape[1] % depth:
            return otherwise.linear(weight, bias)
        return CompiledLinear(kernels, weight, bias)

    def gated(
        gate: torch.Tensor,
        gate_bias: torch.Tensor | None,
        up: torch.Tensor,
        up_bias: torch.Tensor | None,
    ) -> Compute:
        if gate.shape[1] % depth or (gate_bias is None) != (up_bias is None):
            return otherwise.gated(gate, gate_bias, up, up_bias)
        return CompiledGated(kernels, gate, gate_bias, up, up_bias)

    return Kind("compiled", linear, gated)


def tiled(weight: torch.Tensor) -> bool:
    """Whether it is for tile registers."""
    return weight.dtype == torch.bfloat16


def pack(room: Room, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """bfloat16 [columns / 32, 16, inputs] of each of two panels
    -> [columns / 32, inputs / 32, 2 panels, 16 pairs of inputs, 16 columns, 2]."""
    pairs, inputs = first.shape[0], first.shape[2]
    packed = room.empty((pairs, inputs // DEPTH, 2, 16, 16), torch.int32)
    for panel, rows in enumerate((first, second)):
        words = rows.view(torch.int32)  # pairs of inputs move as one: four times as fast
        packed[:, :, panel].copy_(words.view(pairs, 16, -1, 16).permute(0, 2, 3, 1))
    return packed.view(torch.bfloat16)


def pack_floats(room: Room, weight: torch.Tensor) -> torch.Tensor:
    """[columns, inputs] -> [columns / 32, inputs up to a multiple of 32, 32 columns]."""
    columns, inputs = weight.shape
    padded = functional.pad(weight, (0, -inputs % DEPTH))
    return room.keep(padded.view(columns // PAIR, PAIR, -1).transpose(1, 2))


def padded_to(x: torch.Tensor, to: int = PAIR) -> torch.Tensor:
    """Zeros after the last row, up to a multiple."""
    missing = -x.shape[0] % to
    return functional.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x


def interleaved(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Sixteen rows of the one, the same sixteen of the other, and so on."""
    gate, up = (padded_to(x, 16).view(-1, 16, *x.shape[1:]) for x in (gate, up))
    return torch.stack((gate, up), dim=1).flatten(0, 2)
