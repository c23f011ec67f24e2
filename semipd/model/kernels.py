"""The compiled kernels (csrc/), if they were built, called on raw pointers through ctypes.

The library knows neither Python nor torch. Its OpenMP symbols are left open and resolve to the runtime that
torch has loaded, so `torch.set_num_threads` rules its regions too; with one thread, no pool is started.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from semipd.model.room import Room

logger = logging.getLogger(__name__)

PART = 256  # positions at a time (csrc/kernels.h, csrc/prefill_attention.c)
MOST_GROUP = 64  # query heads per KV head
MOST_HEAD_DIM = 256
LANES = 16
TILE_ROWS = 32  # keys of a prompt are packed by so many
BASELINE, AVX2, AVX512, AVX512_VNNI, AVX512_BF16, AMX = range(6)

SOURCES = Path(__file__).parents[1] / "csrc"

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64


@dataclass(frozen=True)
class Kernels:
    """The library, the instructions that it may use (one of the levels above), and room for weights."""

    library: ctypes.CDLL
    level: int
    room: Room = field(default_factory=Room, compare=False)


def load_kernels(most: int = AMX) -> Kernels | None:
    """The kernels for this processor, using nothing above `most`; None, with a log line, where they were
    not built or cannot be loaded."""
    found = importlib.util.find_spec("semipd.model._kernels")
    if found is None or found.origin is None:
        logger.info("no compiled kernels here, using torch alone")
        return None
    if _is_older(Path(found.origin), SOURCES):
        logger.warning(
            "the compiled kernels are older than their sources (make install), using torch alone"
        )
        return None
    try:
        library = _open(Path(found.origin))
    except (OSError, AttributeError) as error:  # AttributeError: built from another version of the sources
        logger.warning("the compiled kernels cannot be loaded, using torch alone: %s", error)
        return None
    return Kernels(library, min(most, library.semipd_level()))


def tie_threads(kernels: Kernels, cores: Sequence[int]) -> None:
    """Tie one thread of this thread's team, as large as there are cores, to each; this one to the first."""
    numbers = np.array(cores, np.int32)
    kernels.library.semipd_tie(numbers.ctypes.data, len(numbers))


def _is_older(library: Path, sources: Path) -> bool:
    """Whether a source was changed after the library was built: it may not know its callers any more. False
    where there are no sources."""
    built = library.stat().st_mtime
    return any(source.stat().st_mtime > built for source in sources.glob("*"))


def _open(path: Path) -> ctypes.CDLL:
    runtime = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if runtime.exists():  # already loaded by torch; this makes its symbols visible to the next line
        ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(path))
    library.semipd_level.restype = ctypes.c_int
    library.semipd_tie.argtypes = [_POINTER, _LONG]
    library.semipd_tie.restype = None
    library.semipd_decode_attention.argtypes = [_POINTER] * 4
    library.semipd_decode_attention.restype = None
    library.semipd_prefill_attention.argtypes = [_POINTER] * 4
    library.semipd_prefill_attention.restype = None
    library.semipd_norm.argtypes = [ctypes.c_int] * 2 + [_POINTER] * 4 + [_LONG] * 2 + [ctypes.c_float]
    library.semipd_norm.restype = None
    library.semipd_rotate.argtypes = [_POINTER] * 3
    library.semipd_rotate.restype = None
    library.semipd_angles.argtypes = [_POINTER, _LONG, _POINTER, _LONG, ctypes.c_double, _POINTER, _POINTER]
    library.semipd_angles.restype = None
    library.semipd_linear.argtypes = [_POINTER, _POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER]
    library.semipd_linear.restype = None
    library.semipd_draw.argtypes = [ctypes.c_int, _POINTER, _LONG, _LONG, _POINTER, _LONG, *[_POINTER] * 3]
    library.semipd_draw.restype = None
    library.semipd_step.argtypes = [_POINTER, _POINTER, _POINTER, _LONG, _LONG, _POINTER, ctypes.c_uint64]
    library.semipd_step.restype = _LONG
    return library


HALVES, FLOATS, QUANTIZED = range(3)  # kinds of linear layers (csrc/linear.h)
_LINEAR: tuple[tuple[str, Any], ...] = (
    *((name, _LONG) for name in ("kind", "level", "inputs", "outputs", "pairs", "gated")),
    ("weight", _POINTER),
    ("bias", _POINTER),
)


class LinearShape(ctypes.Structure):
    """`Linear` of csrc/linear.h."""

    _fields_ = _LINEAR


class QuantizedShape(ctypes.Structure):
    """`Quantized` of csrc/quantized.h, which begins with a `Linear`."""

    _fields_ = (
        *((f"outline_{name}", kind) for name, kind in _LINEAR),
        *((name, _LONG) for name in ("bits", "inputs", "group", "zero")),
        ("weight", _POINTER),
        ("scale", _POINTER),
        ("zeros", _POINTER),
    )


class RotationShape(ctypes.Structure):
    """`Rotation` of csrc/kernels.h."""

    _fields_ = (
        *((name, _LONG) for name in ("level", "half", "rows", "heads", "kv_heads", "dim")),
        *((name, _POINTER) for name in ("where", "cosine", "sine", "query_norm", "key_norm")),
        ("eps", ctypes.c_float),
    )


class _DecodePlan(ctypes.Structure):
    _fields_ = (
        *((name, _LONG) for name in ("level", "half", "kv_heads", "group", "heads", "head_dim")),
        *((name, _LONG) for name in ("block_size", "value_offset", "query_stride")),
        ("tables", _POINTER),
        ("table_stride", _LONG),
        ("items", _POINTER),
        ("count", _LONG),
        ("scratch", _POINTER),
        ("scale", ctypes.c_float),
    )


class _PrefillPlan(ctypes.Structure):
    _fields_ = (
        *((name, _LONG) for name in ("kv_heads", "heads", "head_dim", "block_size", "value_offset")),
        *((name, _LONG) for name in ("query_stride", "row", "first_position", "count", "window", "base")),
        ("padded", _LONG),
        ("table", _POINTER),
        ("packed", _POINTER),
        ("scale", ctypes.c_float),
    )


class PrefillTiles:
    """A longer slice of a step on tile registers: what every layer's call needs."""

    def __init__(
        self, kernels: Kernels, row: int, start: int, count: int, table: np.ndarray, window: int | None
    ) -> None:
        """row: the first query's; start: its position; table: the sequence's blocks."""
        self._call = kernels.library.semipd_prefill_attention
        self._row, self._start, self._count, self._window = row, start, count, window or 0
        self._table = np.ascontiguousarray(table, np.int32)
        self._plan: _PrefillPlan | None = None

    def attend(self, query: torch.Tensor, layer: torch.Tensor, out: torch.Tensor) -> None:
        """As `DecodeParts.attend`, for this slice's rows."""
        plan = self._plan or self._prepare(query, layer)
        self._call(ctypes.byref(plan), query.data_ptr(), layer.data_ptr(), out.data_ptr())

    def _prepare(self, query: torch.Tensor, layer: torch.Tensor) -> _PrefillPlan:
        _, blocks, kv_heads, block_size, head_dim = layer.shape
        low = max(0, self._start - self._window + 1) if self._window else 0
        base = low // PART * PART
        padded = -(-(self._start + self._count - base) // 32) * 32
        self._packed = torch.empty(kv_heads * 2 * padded * head_dim, dtype=torch.bfloat16)
        self._plan = _PrefillPlan(
            *(kv_heads, query.shape[1], head_dim, block_size, blocks * kv_heads * block_size * head_dim),
            *(query.stride(0), self._row, self._start, self._count, self._window, base, padded),
            self._table.ctypes.data,
            self._packed.data_ptr(),
            head_dim**-0.5,
        )
        return self._plan


def can_tile(kernels: Kernels | None, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether `PrefillTiles` takes this shape."""
    fits = head_dim % 32 == 0 and head_dim <= MOST_HEAD_DIM and dtype == torch.bfloat16
    return kernels is not None and kernels.level >= AMX and fits


class DecodeParts:
    """One-token slices of a step, cut into work items: what every layer's call needs."""

    def __init__(
        self,
        kernels: Kernels,
        rows: np.ndarray,
        positions: np.ndarray,
        tables: np.ndarray,
        window: int | None,
    ) -> None:
        """One entry a slice of each: rows of the queries, positions of the tokens, block tables."""
        self._call = kernels.library.semipd_decode_attention
        self._level = kernels.level
        self._rows, self._window = rows, window
        self._first = np.zeros_like(positions) if window is None else np.maximum(0, positions - window + 1)
        self._last = positions + 1
        self._tables = np.ascontiguousarray(tables, np.int32)
        self._plan: _DecodePlan | None = None

    def attend(self, query: torch.Tensor, layer: torch.Tensor, out: torch.Tensor) -> None:
        """query [T, heads, head_dim], of which a row's elements lie side by side, against one layer of the
        pool; writes the slices' rows of out [T, heads, head_dim], contiguous."""
        plan = self._plan or self._prepare(query, layer)
        self._call(ctypes.byref(plan), query.data_ptr(), layer.data_ptr(), out.data_ptr())

    def _prepare(self, query: torch.Tensor, layer: torch.Tensor) -> _DecodePlan:
        _, blocks, kv_heads, block_size, head_dim = layer.shape
        heads = query.shape[1]
        self._items = self._cut(kv_heads)
        count, padded = len(self._items), -(-head_dim // LANES) * LANES
        self._scratch = torch.empty(count * (heads // kv_heads) * (padded + 2), dtype=torch.float32)
        self._plan = _DecodePlan(
            self._level,
            layer.dtype == torch.bfloat16,
            kv_heads,
            heads // kv_heads,
            heads,
            head_dim,
            block_size,
            blocks * kv_heads * block_size * head_dim,
            query.stride(0),
            self._tables.ctypes.data,
            self._tables.shape[1],
            self._items.ctypes.data,
            count,
            self._scratch.data_ptr(),
            head_dim**-0.5,
        )
        return self._plan

    def _cut(self, kv_heads: int) -> np.ndarray:
        """Items int64 [n, 6]: row, sequence, head, first, last, part."""
        before = self._first // PART
        parts = -(-self._last // PART) - before
        sequence = np.repeat(np.arange(len(parts)), parts * kv_heads)
        within = np.arange(len(sequence)) - np.repeat(
            np.cumsum(parts * kv_heads) - parts * kv_heads, parts * kv_heads
        )
        head, part = np.divmod(within, parts[sequence])
        begin = (before[sequence] + part) * PART
        first = np.maximum(begin, self._first[sequence])
        last = np.minimum(begin + PART, self._last[sequence])
        return np.stack((self._rows[sequence], sequence, head, first, last, part), axis=1)


def can_attend(
    kernels: Kernels | None, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> bool:
    """Whether `DecodeParts` takes this shape."""
    return (
        kernels is not None
        and dtype in (torch.float32, torch.bfloat16)
        and heads // kv_heads <= MOST_GROUP
        and head_dim <= MOST_HEAD_DIM
    )
