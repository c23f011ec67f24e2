"""A step on the compiled kernels in one call (csrc/step.c), where a model's layers allow it. The kernels
are those of the way layer by layer, so both give the same bits; this one saves what lies between them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch

from semipd.model.compiled import Native
from semipd.model.kernels import LANES, TILE_ROWS, Kernels, can_tile
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


class _Slots(ctypes.Structure):
    _fields_ = (
        *((name, _LONG) for name in ("slots", "max_length", "token_stride", "table_stride")),
        *((name, _POINTER) for name in ("tokens", "tables", "ban_until", "prompt_logprobs")),
        *((name, _POINTER) for name in ("opened", "special")),
    )


class _Size(ctypes.Structure):
    _fields_ = tuple((name, _LONG) for name in ("rows", "sampled", "items", "packed"))


class _Step(ctypes.Structure):
    _fields_ = (
        ("count", _LONG),
        ("slices", _POINTER),
        ("slots", _POINTER),
        *((name, _LONG) for name in ("longer", "broken", "other_count")),
        *((name, _Size) for name in ("need", "room")),
        *(
            (name, _POINTER)
            for name in ("hidden", "normed", "delta", "qkv", "mixed", "activated", "logits")
        ),
        *((name, _POINTER) for name in ("quantized", "packed", "positions", "where", "cosine", "sine")),
        *((name, _POINTER) for name in ("items", "attention", "best", "others", "value")),
    )


# How a step ends that does not just finish (csrc/step.c).
_REFUSED, _NO_ROOM, _BROKEN, _OTHERS = -1, -2, -3, -4
_SLICE_BYTES = 32  # a packed slice: slot, first position, how many, whether a token is wanted; 64 bits each
_ASK = None, 0  # the boundary before every large operation


class Slots(Protocol):
    """What a step reads of the slot table, and `tokens`, which it also writes. One row or value a slot;
    int32 but for opened and special, which are bool (see `execute.storage`)."""

    max_length: int
    tokens: np.ndarray
    blocks: np.ndarray
    ban_until: np.ndarray
    prompt_logprobs: np.ndarray
    opened: np.ndarray
    special: np.ndarray


class Chosen(NamedTuple):
    """The best token of each slice that wants one, in order. others: which of these are not what their
    slots want, and not in the table yet."""

    tokens: list[int]
    others: list[int]


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

    def __init__(self, kernels: Kernels, parts: Parts, kv: torch.Tensor, table: Slots) -> None:
        """kv: [layers, 2, blocks, kv_heads, block_size, head_dim], contiguous."""
        assert kv.is_contiguous()
        self._parts, self._kv, self._table = parts, kv, table
        self._natives = [linear for linear in parts.linears() if isinstance(linear, Native)]
        self._layers = (_Layer * len(parts.layers))(*map(_layer, parts.layers))
        self._model = self._describe(kernels)
        self._buffers: dict[str, torch.Tensor] = {}
        self._slots = _slots(table)
        self._step = _Step(slots=ctypes.addressof(self._slots))
        self._step.longer = can_tile(kernels, kv.shape[-1], parts.dtype)
        self._best = self._others = (ctypes.c_int64 * 0)()
        self._need = self._step.need
        pointers = ctypes.addressof(self._model), ctypes.addressof(self._step)
        self._call = partial(kernels.library.semipd_step, *pointers)

    def run(self, slices: bytes, boundary: Boundary) -> Chosen | None:
        """Compute packed slices, at least one: write their keys and values, and, for each that wants a
        token, the first largest entry of its logits to the table, where its slot wants no more. `boundary`
        is called before every large operation, unless what it watches shows that there is no need.

        None for slices that the other way must take, which also tells what is wrong with them if anything
        is. Raises FloatingPointError when the largest logit of a row is not finite."""
        call, count = self._call, len(slices) // _SLICE_BYTES
        watch = boundary() or _ASK
        stage = call(slices, count, 0, *watch)
        if stage == _NO_ROOM:
            self._make_room(self._need)
            stage = call(slices, count, 0, *watch)
        while stage > 0:
            stage = call(slices, count, stage, *(boundary() or _ASK))
        if stage == _REFUSED:
            return None
        if stage == _BROKEN:
            row = self._step.broken
            value = self._buffers["value"][row].item()
            raise FloatingPointError(f"the logits of row {row} have no finite maximum: {value}")
        others = self._others[: self._step.other_count] if stage == _OTHERS else []
        return Chosen(self._best[: self._need.sampled], others)

    def logits(self, rows: Sequence[int]) -> torch.Tensor:
        """Logits of these results of the last step, float32 [n, vocabulary]."""
        found = self._buffers["logits"][: self._need.sampled]
        if len(rows) < len(found):
            found = found[torch.tensor(rows, dtype=torch.int64)]
        return found.to(torch.float32, copy=True)

    def _describe(self, kernels: Kernels) -> _Model:
        parts, spec = self._parts, self._parts.spec
        _, _, blocks, kv_heads, block_size, head_dim = self._kv.shape
        return _Model(
            *(kernels.level, parts.dtype == torch.bfloat16, len(parts.layers)),
            *(spec.vocabulary, spec.hidden, spec.intermediate, spec.heads),
            *(kv_heads, head_dim, blocks, block_size),
            ctypes.addressof(self._layers),
            _address(parts.head),
            *(tensor.data_ptr() for tensor in (parts.embedding, parts.norm, parts.frequencies, self._kv)),
            *(parts.rope_factor, spec.norm_eps, head_dim**-0.5),
        )

    def _make_room(self, need: _Size) -> None:
        """Buffers for such a step. Memory is taken when it is written."""
        model, room = self._model, self._step.room
        if need.rows > room.rows:
            room.rows = _room_for(need.rows)
            self._make_rows(room.rows)
        if need.sampled > room.sampled:
            room.sampled = _room_for(need.sampled)
            self._make_results(room.sampled)
        if need.items > room.items:
            room.items = _room_for(need.items)
            padded = -(-model.head_dim // LANES) * LANES
            each = model.heads // model.kv_heads * (padded + 2)
            cuts = torch.empty(room.items, 6, dtype=torch.int64)
            self._keep(items=cuts, attention=torch.empty(room.items * each))
        if need.packed > room.packed:
            room.packed = _room_for(need.packed + TILE_ROWS)
            shape = (model.kv_heads, 2, room.packed, model.head_dim)
            self._keep(packed=torch.empty(shape, dtype=torch.bfloat16))

    def _make_results(self, count: int) -> None:
        logits = torch.empty(count, self._model.vocabulary, dtype=self._parts.dtype)
        self._keep(logits=logits, value=torch.empty(count))
        self._best, self._others = (ctypes.c_int64 * count)(), (ctypes.c_int64 * count)()
        self._step.best, self._step.others = map(ctypes.addressof, (self._best, self._others))

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


def _slots(table: Slots) -> _Slots:
    tokens, blocks = table.tokens, table.blocks
    assert tokens.strides[1] == blocks.strides[1] == table.ban_until.strides[0] == 4
    assert table.prompt_logprobs.strides[0] == 4 and table.opened.itemsize == table.special.itemsize == 1
    arrays = tokens, blocks, table.ban_until, table.prompt_logprobs, table.opened, table.special
    strides = tokens.strides[0] // 4, blocks.strides[0] // 4
    return _Slots(len(tokens), table.max_length, *strides, *(array.ctypes.data for array in arrays))


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
