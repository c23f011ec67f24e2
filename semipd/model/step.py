"""A step on the compiled kernels in a few calls (csrc/step.c), where a model's layers allow it. The kernels
are those of the way layer by layer, so both give the same bits; this one saves what lies between them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from semipd.model.compiled import Native
from semipd.model.kernels import LANES, PART, TILE_ROWS, Kernels, can_tile
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
        *((name, _LONG) for name in ("rows", "sampled", "count")),
        *((name, _POINTER) for name in ("slices", "tokens", "tables")),
        *((name, _LONG) for name in ("token_stride", "table_stride")),
        *(
            (name, _POINTER)
            for name in ("hidden", "normed", "delta", "qkv", "mixed", "activated", "logits")
        ),
        *((name, _POINTER) for name in ("quantized", "packed", "positions", "where", "cosine", "sine")),
        *((name, _POINTER) for name in ("items", "attention", "best", "value")),
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
    """Whether `FusedStep` takes this model: every linear layer is a compiled one."""
    return kernels is not None and all(isinstance(linear, Native) for linear in parts.linears())


class FusedStep:
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
        self._tiled = can_tile(kernels, kv.shape[-1], parts.dtype)
        self._rows = self._sampled = self._items = self._packed = 0
        self._buffers: dict[str, torch.Tensor] = {}
        self._step = _Step(tokens=tokens.ctypes.data, tables=tables.ctypes.data)
        self._step.token_stride, self._step.table_stride = tokens.strides[0] // 4, tables.strides[0] // 4
        self._pointers = ctypes.byref(self._model), ctypes.byref(self._step)

    def takes(self, counts: np.ndarray) -> bool:
        """Whether slices of so many positions are for `run`: other than single ones are on tile registers
        only."""
        return self._tiled or int(counts.max()) == 1

    def run(self, slices: np.ndarray, boundary: Boundary) -> tuple[np.ndarray, np.ndarray]:
        """Compute slices, int64 [n, 4]: slot, first position, how many, and whether a token is wanted then.
        Writes their keys and values, and returns the first largest entry of the logits of each that wants a
        token (int64) and its value; both stay valid until the next step. `boundary` is called before every
        large operation, unless what it watches shows that there is no need, and before the head.

        Raises ValueError for a token that is not in the vocabulary."""
        slices = np.ascontiguousarray(slices)
        rows, sampled = slices[:, 2:].sum(axis=0).tolist()
        self._make_room(rows, sampled, slices)
        self._step.rows, self._step.sampled, self._step.count = rows, sampled, len(slices)
        self._step.slices = slices.ctypes.data
        model, step = self._pointers
        if not self._library.semipd_step_begin(model, step):
            raise ValueError(f"a token is not in the vocabulary of {self._parts.spec.vocabulary}")
        stage = -1
        while stage:
            watch = boundary() or (None, 0)
            stage = self._library.semipd_step_layers(model, step, max(stage, 0), *watch)
        if sampled:
            boundary()
            self._library.semipd_step_end(model, step)
        return self._best[:sampled], self._value[:sampled]

    def logits(self, rows: np.ndarray) -> torch.Tensor:
        """Logits of these results of the last step, float32 [n, vocabulary]."""
        return self._buffers["logits"][torch.from_numpy(rows)].float()

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

    def _make_room(self, rows: int, sampled: int, slices: np.ndarray) -> None:
        """Buffers for such a step. Memory is taken when it is written."""
        model, last = self._model, int((slices[:, 1] + slices[:, 2]).max())
        if rows > self._rows:
            self._rows = _room_for(rows)
            self._make_rows(self._rows)
        if sampled > self._sampled or not self._sampled:
            self._sampled = _room_for(sampled)
            logits = torch.empty(self._sampled, model.vocabulary, dtype=self._parts.dtype)
            best, value = torch.empty(self._sampled, dtype=torch.int64), torch.empty(self._sampled)
            self._keep(logits=logits, best=best, value=value)
            self._best, self._value = best.numpy(), value.numpy()
        items = len(slices) * model.kv_heads * (last // PART + 1)
        if items > self._items:
            self._items = _room_for(items)
            padded = -(-model.head_dim // LANES) * LANES
            each = model.heads // model.kv_heads * (padded + 2)
            cuts = torch.empty(self._items, 6, dtype=torch.int64)
            self._keep(items=cuts, attention=torch.empty(self._items * each))
        if rows > len(slices) and last > self._packed:
            self._packed = _room_for(last + TILE_ROWS)
            shape = (model.kv_heads, 2, self._packed, model.head_dim)
            self._keep(packed=torch.empty(shape, dtype=torch.bfloat16))

    def _make_rows(self, rows: int) -> None:
        spec, model = self._parts.spec, self._model
        queries, both = model.heads * model.head_dim, 2 * model.kv_heads * model.head_dim
        widths = dict.fromkeys(("hidden", "normed", "delta"), spec.hidden)
        widths |= {"qkv": queries + both, "mixed": queries, "activated": spec.intermediate}
        scratch = max(native.scratch_bytes(rows, os.cpu_count() or 1) for native in self._natives)
        cosine, sine = torch.empty(2, rows, model.head_dim // 2)
        self._keep(
            **{name: torch.empty(rows, width, dtype=self._parts.dtype) for name, width in widths.items()},
            quantized=torch.empty(scratch, dtype=torch.uint8),
            positions=torch.empty(rows, dtype=torch.int64),
            where=torch.empty(rows, 2 * model.kv_heads, dtype=torch.int64),
            cosine=cosine,
            sine=sine,
        )

    def _keep(self, **buffers: torch.Tensor) -> None:
        """Fields of the step."""
        self._buffers |= buffers
        for name, buffer in buffers.items():
            setattr(self._step, name, buffer.data_ptr())


def _room_for(count: int) -> int:
    """Rounded up, so that growing ends soon."""
    return max(8, 1 << (count - 1).bit_length())


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
