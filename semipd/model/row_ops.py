"""What a decoder does to single rows between its linear layers: plain PyTorch, and compiled.

Both have the same methods. A step's rotation (`Rotations`) is worked out once and used by every layer.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Protocol

import torch

from semipd.model.attention import write_kv
from semipd.model.kernels import Kernels, RotationShape
from semipd.model.layers import rms_norm
from semipd.model.rope import rope_tables, rotate


@dataclass(frozen=True)
class Heads:
    """A row of queries, keys and values: `query` heads, `kv` keys and `kv` values, each `dim` wide."""

    query: int
    kv: int
    dim: int
    eps: float


@dataclass(frozen=True)
class Rotations:
    """cosine, sine: of each row's position, in the form that the operations which made them want. where:
    int64, the rows of a layer that keys and values go to (`attention.Pool.rows`)."""

    cosine: torch.Tensor
    sine: torch.Tensor
    where: torch.Tensor


class RowOps(Protocol):
    """Activations are [rows, width], contiguous, in the model's dtype; arithmetic on them is float32."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / rms(x) * weight."""
        ...

    def add_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """hidden += delta, in place and rounded; then its norm."""
        ...

    def rotations(
        self, positions: torch.Tensor, frequencies: torch.Tensor, factor: float, where: torch.Tensor
    ) -> Rotations:
        """For rows at these positions."""
        ...

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        layer: torch.Tensor,
        rotations: Rotations,
        heads: Heads,
        query_norm: torch.Tensor | None,
        key_norm: torch.Tensor | None,
    ) -> None:
        """Norm (where the family has norms) and rotate the queries of qkv [rows, heads + 2 kv, dim] in
        place; write keys, likewise, and values into the layer. The keys in qkv are undefined afterwards."""
        ...


class PlainRowOps:
    """The twin that any torch can run."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return rms_norm(x, weight, eps)

    def add_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return rms_norm(hidden.add_(delta), weight, eps)

    def rotations(
        self, positions: torch.Tensor, frequencies: torch.Tensor, factor: float, where: torch.Tensor
    ) -> Rotations:
        return Rotations(*rope_tables(positions, frequencies, factor, self._dtype), where)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        layer: torch.Tensor,
        rotations: Rotations,
        heads: Heads,
        query_norm: torch.Tensor | None,
        key_norm: torch.Tensor | None,
    ) -> None:
        if query_norm is not None and key_norm is not None:
            query, key = qkv[:, : heads.query], qkv[:, heads.query : heads.query + heads.kv]
            query.copy_(rms_norm(query, query_norm, heads.eps))
            key.copy_(rms_norm(key, key_norm, heads.eps))
        rotate(qkv[:, : heads.query + heads.kv], rotations.cosine, rotations.sine)
        write_kv(qkv[:, heads.query :], layer, rotations.where)


class CompiledRowOps:
    """On the compiled kernels (csrc/rows.c): one call each, and no copies."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype) -> None:
        self._norm = kernels.library.semipd_norm
        self._rotate = kernels.library.semipd_rotate
        self._angles = kernels.library.semipd_angles
        self._level, self._half = kernels.level, int(dtype == torch.bfloat16)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._normed(x, None, weight, eps)

    def add_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return self._normed(hidden, delta.data_ptr(), weight, eps)

    def _normed(self, x: torch.Tensor, delta: int | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = torch.empty_like(x)
        rows, width = x.shape
        self._norm(
            self._level,
            self._half,
            x.data_ptr(),
            delta,
            weight.data_ptr(),
            out.data_ptr(),
            rows,
            width,
            eps,
        )
        return out

    def rotations(
        self, positions: torch.Tensor, frequencies: torch.Tensor, factor: float, where: torch.Tensor
    ) -> Rotations:
        positions = positions.contiguous()
        rows, pairs = positions.shape[0], frequencies.shape[0]
        cosine, sine = torch.empty(2, rows, pairs)
        self._angles(
            positions.data_ptr(),
            rows,
            frequencies.data_ptr(),
            pairs,
            factor,
            cosine.data_ptr(),
            sine.data_ptr(),
        )
        return Rotations(cosine, sine, where)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        layer: torch.Tensor,
        rotations: Rotations,
        heads: Heads,
        query_norm: torch.Tensor | None,
        key_norm: torch.Tensor | None,
    ) -> None:
        shape = RotationShape(
            self._level,
            self._half,
            qkv.shape[0],
            heads.query,
            heads.kv,
            heads.dim,
            rotations.where.data_ptr(),
            rotations.cosine.data_ptr(),
            rotations.sine.data_ptr(),
            None if query_norm is None else query_norm.data_ptr(),
            None if key_norm is None else key_norm.data_ptr(),
            heads.eps,
        )
        self._rotate(ctypes.byref(shape), qkv.data_ptr(), layer.data_ptr())
