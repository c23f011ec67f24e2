"""A step of one-token slices on the compiled kernels in a few calls (csrc/step.c), where a model's layers
allow it. The kernels are those of the way layer by layer, so both give the same bits; this one saves the
host's work between them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from semipd.model.compiled import Native
from semipd.model.kernels import LANES, PART, Kernels
from semipd.model.layers import Compute, Layer
from semipd.model.spec import ModelSpec

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64

# Called between large operations. May return the address of a 64-bit word and its value now: as long as the
# word holds it, there is no need to call again.
Boundary = Callable[[], tuple[int, int] | None]


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("qkv", "output", "gate_up", "down")),
        *((name, _POINTER) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        ("window", _LONG),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, _LONG) for name in ("level", "half", "layers", "vocabulary", "hidden", "intermediate")),
        *((name, _LONG) for name in ("heads", "kv_heads", "head_dim", "blocks", "block_size")),
        *((name, _POINTER) for name in ("layer", "head", "embedding", "norm", "frequencies", "pool")),
        ("rope_factor", ctypes.c_double),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("rows", _LONG),
        *((name, _POINTER) for name in ("slots", "positions", "tokens", "tables")),
        ("token_stride", _LONG),
        ("table_stride", _LONG),
        *(
            (name, _POINTER)
            for name in ("hidden", "normed", "delta", "qkv", "mixed", "activated", "logits")
        ),
        *((name, _POINTER) for name in ("quantized", "where", "cosine", "sine", "items", "attention")),
        *((name, _POINTER) for name in ("best", "value")),
    )


@dataclass(frozen=True)
class Parts:
    """A model's parameters in compute form. frequencies, rope_factor: see `rope.rope_frequencies`."""

    spec: ModelSpec
    dtype: torch.dtype
    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: Compute
    frequencies: torch.Tensor
    rope_factor: float

    def linears(self) -> list[Compute]:
        each = [(layer.qkv, layer.output, layer.gate_up, layer.down) for layer in self.layers]
        return [linear for four in each for linear in four] + [self.head]


def can_step(kernels: Kernels | None, parts: Parts) -> bool:
    """Whether `DecodeStep` takes this model: every linear layer is a compiled one."""
    return kernels is not None and all(isinstance(linear, Native) for linear in parts.linears())


class DecodeStep:
    """Runs steps over one KV pool and one slot table. One step at a time."""

    def __init__(
        self, kernels: Kernels, parts: Parts, kv: torch.Tensor, tokens: np.ndarray, tables: np.ndarray
    ) -> None:
        """kv: [layers, 2, blocks, kv_heads, block_size, head_dim], contiguous. tokens, tables: int32
        [slots, any], read at every step."""
        assert kv.is_contiguous() and tokens.strides[1] == tables.strides[1] == 4
        self._library = kernels.library
        self._parts, self._kv, self._tables = parts, kv, (tokens, tables)
        self._natives = [linear for linear in parts.linears() if isinstance(linear, Native)]
        self._layers = (_Layer * len(parts.layers))(*map(_layer, parts.layers))
        self._model = self._describe(kernels)
        self._rows = self._items = 0
        self._step = _Step()
        self._pointers = ctypes.byref(self._model), ctypes.byref(self._step)

    def run(
        self, slots: np.ndarray, positions: np.ndarray, boundary: Boundary
    ) -> tuple[np.ndarray, np.ndarray]:
        """Compute position i of slot i for each pair, write keys and values, and return the first largest
        entry of each row's logits (int64) and its value; both stay valid until the next step. `boundary` is
        called before every layer, unless what it watches shows that there is no need, and before the head.

        Raises ValueError for a token that is not in the vocabulary."""
        rows = slots.shape[0]
        self._make_room(rows, int(positions.max()))
        self._slots[:rows], self._positions[:rows] = slots, positions
        self._step.rows = rows
        model, step = self._pointers
        if self._library.semipd_step_begin(model, step) >= 0:
            raise ValueError(f"a token is not in the vocabulary of {self._parts.spec.vocabulary}")
        index = 0
        while index < len(self._layers):
            watch = boundary() or (None, 0)
            index = self._library.semipd_step_layers(model, step, index, *watch)
        boundary()
        self._library.semipd_step_end(model, step)
        return self._best[:rows], self._value[:rows]

    def logits(self, rows: np.ndarray) -> torch.Tensor:
        """Logits of these rows of the last step, float32 [n, vocabulary]."""
        return self._logits[torch.from_numpy(rows)].float()

    def _describe(self, kernels: Kernels) -> _Model:
        parts, spec = self._parts, self._parts.spec
        _, _, blocks, kv_heads, block_size, head_dim = self._kv.shape
        return _Model(
            *(
                kernels.level,
                parts.dtype == torch.bfloat16,
                len(parts.layers),
                spec.vocabulary,
                spec.hidden,
            ),
            *(spec.intermediate, spec.heads, kv_heads, head_dim, blocks, block_size),
            ctypes.addressof(self._layers),
            _address(parts.head),
            *(tensor.data_ptr() for tensor in (parts.embedding, parts.norm, parts.frequencies, self._kv)),
            *(parts.rope_factor, spec.norm_eps, head_dim**-0.5),
        )

    def _make_room(self, rows: int, last: int) -> None:
        """Buffers for so many rows with positions up to `last`. Memory is taken when it is written."""
        if rows > self._rows:
            self._rows = max(8, 1 << (rows - 1).bit_length())
            self._make_buffers(self._rows)
        items = rows * self._model.kv_heads * (last // PART + 1)
        if items > self._items:
            self._items = 1 << (items - 1).bit_length()
            each = (
                self._model.heads // self._model.kv_heads * (-(-self._model.head_dim // LANES) * LANES + 2)
            )
            self._cuts = torch.empty(self._items, 6, dtype=torch.int64)
            self._attention = torch.empty(self._items * each)
            self._step.items, self._step.attention = self._cuts.data_ptr(), self._attention.data_ptr()

    def _make_buffers(self, rows: int) -> None:
        spec, model = self._parts.spec, self._model
        queries, both = model.heads * model.head_dim, 2 * model.kv_heads * model.head_dim
        widths = (spec.hidden,) * 3 + (queries + both, queries, spec.intermediate, spec.vocabulary)
        self._rooms = [torch.empty(rows, width, dtype=self._parts.dtype) for width in widths]
        self._logits = self._rooms[-1]
        scratch = max(native.scratch_bytes(rows, os.cpu_count() or 1) for native in self._natives)
        self._scratch = torch.empty(scratch, dtype=torch.uint8)
        self._where = torch.empty(rows, 2 * model.kv_heads, dtype=torch.int64)
        self._turns = torch.empty(2, rows, model.head_dim // 2)
        self._slots, self._positions, self._best = np.empty((3, rows), np.int64)
        self._value = np.empty(rows, np.float32)
        tokens, tables = self._tables
        self._fill(
            *(array.ctypes.data for array in (self._slots, self._positions, tokens, tables)),
            *(tokens.strides[0] // 4, tables.strides[0] // 4),
            *(room.data_ptr() for room in (*self._rooms, self._scratch, self._where, *self._turns)),
        )
        self._step.best, self._step.value = self._best.ctypes.data, self._value.ctypes.data

    def _fill(self, *values: int) -> None:
        """The fields after `rows`, in order."""
        names: Sequence[Any] = _Step._fields_[1 : 1 + len(values)]
        for (name, _), value in zip(names, values, strict=True):
            setattr(self._step, name, value)


def _layer(layer: Layer) -> _Layer:
    norms = (layer.attention_norm, layer.mlp_norm, layer.query_norm, layer.key_norm)
    return _Layer(
        *map(_address, (layer.qkv, layer.output, layer.gate_up, layer.down)),
        *(None if norm is None else norm.data_ptr() for norm in norms),
        layer.window or 0,
    )


def _address(linear: Compute) -> int:
    assert isinstance(linear, Native)
    return ctypes.addressof(linear.shape)
