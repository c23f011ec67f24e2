"""Checkpoints whose matrices are stored in 4 or 8 bits: GPTQ, AWQ and compressed-tensors.

All store `scale * (u - zero)` for unsigned u. They differ in which way eight 4-bit numbers share an int32:

    GPTQ                  qweight [inputs / 8, outputs], packed along inputs; qzeros [groups, outputs / 8],
                          holding zero - 1 in the first format; scales [groups, outputs]; g_idx [inputs]
    AWQ                   qweight [inputs, outputs / 8] and qzeros [groups, outputs / 8], packed along
                          outputs in the order 0 2 4 6 1 3 5 7; scales [groups, outputs]
    compressed-tensors    weight_packed [outputs, inputs / 8], weight_zero_point [outputs / 8, groups] (none
                          where symmetric, which means the middle), weight_scale [outputs, groups]; or
                          weight int8 [outputs, inputs]
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from semipd.core.errors import ConfigError
from semipd.model.quantize import Matrix, Quantized
from semipd.model.weights import SafetensorsWeights

logger = logging.getLogger(__name__)

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which of eight packed numbers belongs to each of eight outputs


@dataclass(frozen=True)
class Format:
    """What `quantization_config` says. group: inputs that share a scale, 0 for all of an output's."""

    method: str
    bits: int
    group: int
    symmetric: bool
    zero_offset: int = 0  # what to add to stored zeros


def read_format(config: Mapping[str, Any]) -> Format:
    """Raises ConfigError for what cannot be loaded."""
    method = str(config.get("quant_method", "")).lower()
    try:
        match method:
            case "gptq":
                kept = config.get("checkpoint_format", "gptq") == "gptq_v2"
                group, symmetric = int(config["group_size"]), bool(config.get("sym", False))
                form = Format(method, int(config["bits"]), max(group, 0), symmetric, 0 if kept else 1)
            case "awq":
                if str(config.get("version", "gemm")).lower() != "gemm":
                    raise ConfigError("AWQ checkpoints are read in the version gemm only")
                form = Format(method, int(config["bits"]), max(int(config["group_size"]), 0), False)
            case "compressed-tensors":
                form = _compressed(config)
            case _:
                raise ConfigError(
                    f"quantised checkpoints of the method {method!r} are not supported, only gptq, awq and "
                    "compressed-tensors"
                )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"quantization_config cannot be read: {type(error).__name__} {error}") from None
    allowed = (4,) if method == "awq" else (4, 8)
    if form.bits not in allowed:
        raise ConfigError(f"{method} checkpoints with {form.bits} bits are not supported")
    return form


def _compressed(config: Mapping[str, Any]) -> Format:
    groups = list(config["config_groups"].values())
    weights = groups[0]["weights"]
    if any(other["weights"] != weights for other in groups[1:]):
        raise ConfigError("a compressed-tensors checkpoint with several weight schemes is not supported")
    layout = str(config.get("format", ""))
    known = layout in ("pack-quantized", "int-quantized", "naive-quantized")
    strategy = weights.get("strategy")
    if not known or weights.get("type", "int") != "int" or strategy not in ("channel", "group"):
        raise ConfigError(
            f"a compressed-tensors checkpoint in the format {layout!r} is not supported: weights must be "
            "integers with a scale per channel or group"
        )
    group = int(weights["group_size"]) if strategy == "group" else 0
    return Format(
        "compressed-tensors", int(weights["num_bits"]), group, bool(weights.get("symmetric", True))
    )


class QuantizedWeights:
    """Tensors of a quantised checkpoint. What is stored plainly is given plainly."""

    def __init__(self, stored: SafetensorsWeights, form: Format) -> None:
        self._stored = stored
        self._form = form
        self.dtype = stored.dtype

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._stored.take(name, shape)

    def matrix(self, name: str, shape: tuple[int, int]) -> Matrix:
        """The matrix `....weight` of this shape, quantised where the checkpoint has it so."""
        stem = name.removesuffix("weight")
        form = self._form
        group = form.group or shape[1]
        if shape[1] % group:
            raise ConfigError(f"{name}: groups of {group} do not divide {shape[1]} inputs")
        if form.method == "compressed-tensors":
            if self._stored.holds(f"{stem}weight_scale"):
                return self._compressed(stem, shape, group)
        elif self._stored.holds(f"{stem}qweight"):
            return self._columns(stem, shape, group)
        return self._stored.matrix(name, shape)

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """Biases of nothing but zeros, which some tools write everywhere, may be left."""
        left = [name for name in self._stored.left() if name.endswith(".bias")]
        empty = [name for name in left if not self._stored.raw(name).any()]
        self._stored.finish([*ignored, *empty])

    def _columns(self, stem: str, shape: tuple[int, int], group: int) -> Matrix:
        """GPTQ and AWQ, which store [inputs, outputs]."""
        form, (outputs, inputs) = self._form, shape
        each, groups = 32 // form.bits, inputs // group
        awq = form.method == "awq"
        packed = (inputs, outputs // each) if awq else (inputs // each, outputs)
        values = self._packed(f"{stem}qweight", packed, 1 if awq else 0)
        zeros = self._packed(f"{stem}qzeros", (groups, outputs // each), 1)
        if awq:
            values, zeros = _awq_outputs(values), _awq_outputs(zeros)
        scale = self._scale(f"{stem}scales", (groups, outputs)).T.contiguous()
        zero = ((zeros.long() + form.zero_offset) % 2**form.bits).to(torch.uint8).T.contiguous()
        order = self._stored.raw(f"{stem}g_idx").long() if self._stored.holds(f"{stem}g_idx") else None
        return self._matrix(values.T.contiguous(), scale, zero, order)

    def _compressed(self, stem: str, shape: tuple[int, int], group: int) -> Matrix:
        form, (outputs, inputs) = self._form, shape
        each, groups, middle = 32 // form.bits, inputs // group, 2 ** (form.bits - 1)
        if self._stored.holds(f"{stem}weight_packed"):
            values = self._packed(f"{stem}weight_packed", (outputs, -(-inputs // each)), 1)[:, :inputs]
        else:
            whole = self._checked(f"{stem}weight", shape, torch.int8)
            values = (whole.to(torch.int16) + middle).to(torch.uint8)
        scale = self._scale(f"{stem}weight_scale", (outputs, groups))
        zero = torch.full((outputs, groups), middle, dtype=torch.uint8)
        if self._stored.holds(f"{stem}weight_zero_point"):
            zero = self._zero_point(f"{stem}weight_zero_point", (outputs, groups), middle)
        if self._stored.holds(f"{stem}weight_shape"):
            self._stored.raw(f"{stem}weight_shape")
        order = None
        if self._stored.holds(f"{stem}weight_g_idx"):
            order = self._stored.raw(f"{stem}weight_g_idx").long()
        return self._matrix(values.contiguous(), scale, zero, order)

    def _zero_point(self, name: str, shape: tuple[int, int], middle: int) -> torch.Tensor:
        """Packed along outputs, or plain signed numbers."""
        stored = self._stored.raw(name)
        if stored.dtype == torch.int32:
            each = 32 // self._form.bits
            zeros = self._packed(name, (-(-shape[0] // each), shape[1]), 0)
            return zeros[: shape[0]].contiguous()
        if tuple(stored.shape) != shape:
            raise ConfigError(f"{name} has shape {list(stored.shape)}, not {list(shape)}")
        return (stored.to(torch.int16) + middle).to(torch.uint8)

    def _matrix(
        self, values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, order: torch.Tensor | None
    ) -> Matrix:
        """order: the group of each input. Where groups are not runs of neighbours the matrix becomes
        plain."""
        inputs = values.shape[1]
        alike = int(zero[0, 0]) if bool((zero == zero[0, 0]).all()) else zero
        if order is None or torch.equal(order, torch.arange(inputs) // (inputs // scale.shape[1])):
            return Quantized(self._form.bits, values, scale, alike)
        if order.shape != (inputs,) or int(order.min()) < 0 or int(order.max()) >= scale.shape[1]:
            raise ConfigError("a g_idx of the checkpoint does not fit its matrix")
        logger.info("groups are scattered (desc_act): such matrices are expanded to %s", self.dtype)
        return ((values.float() - zero[:, order].float()) * scale[:, order]).to(self.dtype)

    def _packed(self, name: str, shape: tuple[int, int], along: int) -> torch.Tensor:
        """Unpack int32 numbers of `shape` along a dimension, the lowest bits first: uint8."""
        stored = self._checked(name, shape, torch.int32)
        bits = self._form.bits
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        parts: torch.Tensor = (
            stored.unsqueeze(along + 1) >> (shifts if along == 1 else shifts[:, None])
        ) & (2**bits - 1)
        return parts.to(torch.uint8).flatten(along, along + 1)

    def _scale(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        stored = self._stored.raw(name)
        if not stored.is_floating_point() or stored.numel() != shape[0] * shape[1]:
            raise ConfigError(f"{name} is {stored.dtype} {list(stored.shape)}, not numbers {list(shape)}")
        return stored.float().view(shape)

    def _checked(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        stored = self._stored.raw(name)
        if tuple(stored.shape) != shape or stored.dtype != dtype:
            raise ConfigError(f"{name} is {stored.dtype} {list(stored.shape)}, not {dtype} {list(shape)}")
        return stored


def _awq_outputs(packed: torch.Tensor) -> torch.Tensor:
    """[any, outputs] in AWQ's order of eight -> in the outputs' own order."""
    rows, outputs = packed.shape
    return packed.view(rows, outputs // 8, 8)[:, :, list(_AWQ_ORDER)].view(rows, outputs)
