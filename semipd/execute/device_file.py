"""Device files: what the simulator knows about a device, read from JSON and checked.

The head (name, peak, bandwidth, memory, units) comes from a data sheet; kernels, ceilings and curves are
measured. The files of this package are in `semipd/devices`; docs/cost-model.md says where each number
comes from.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from semipd.core.errors import ConfigError
from semipd.core.types import Device
from semipd.execute import cost_operators
from semipd.execute.cost_surface import Kernel, Surface
from semipd.execute.step_profile import StepProfile, read_profile

FEATURES: Mapping[str, tuple[str, ...]] = {
    "gemm": cost_operators.GEMM,
    "context_attention": cost_operators.CONTEXT_ATTENTION,
    "generation_attention": cost_operators.GENERATION_ATTENTION,
    "moe": cost_operators.MOE,
    "mla_context": cost_operators.MLA,
    "mla_generation": cost_operators.MLA,
    "allreduce": cost_operators.ALLREDUCE,
}
HEAD = ("name", "flops_bf16", "memory_bandwidth", "memory_bytes", "units", "unit_kind")
_MOST_VALUES = 2**20
_MOST_BYTES = 2**26

Kernels = Mapping[str, Mapping[str, Kernel]]


@dataclass(frozen=True)
class Curve:
    """How much slower work gets on fewer units: (units, slowdown) points, units rising, the last one the
    whole device at 1. Between points both are interpolated by their logs; below the first, time is
    proportional to 1 / units."""

    points: tuple[tuple[float, float], ...]

    def slowdown(self, units: float) -> float:
        """Seconds on `units` over seconds on all of them, at least 1."""
        points = self.points
        if units >= points[-1][0]:
            return 1.0
        if units <= points[0][0]:
            return points[0][1] * points[0][0] / units
        index = bisect_left(points, (units, 0.0))
        (low, slow), (high, fast) = points[index - 1], points[index]
        share = math.log(units / low) / math.log(high / low)
        return float(slow * (fast / slow) ** share)

    def stretched(self, knee: float) -> Curve:
        """The curve of a device that saturates at `knee` times as many units."""
        whole = self.points[-1][0]
        rest = self.slowdown(whole / knee)
        points = [(units, max(self.slowdown(units / knee) / rest, 1.0)) for units, _ in self.points]
        return Curve((*points[:-1], (whole, 1.0)))


@dataclass(frozen=True)
class DeviceFile:
    """One device. FLOP/s, bytes/s and bytes; times in seconds.

    unit_step: a partition is a multiple of this. sustained_flops, sustained_bandwidth: what no step can
    exceed. compute, memory: slowdown on fewer units of work bound by either. contention: most by which
    memory-bound work slows beside another phase before bandwidth runs out, reached when that phase asks
    for `contention_share` of the bandwidth. step_seconds, sequence_seconds: host time per step and per
    sequence in it; small_kernel_seconds: per kernel between the fitted ones. kernels: by operator and
    precision. scaled_from: the device whose kernels these are, when not its own. steps: whole steps of one
    model as measured by `semipd profile`, instead of kernels.
    """

    name: str
    flops_bf16: float
    memory_bandwidth: float
    memory_bytes: float
    units: int
    unit_kind: str
    unit_step: int = 1
    depth: int = 2
    switch_seconds: float = 0.0
    sustained_flops: float = 0.0
    sustained_bandwidth: float = 0.0
    compute: Curve = Curve(((1.0, 1.0),))
    memory: Curve = Curve(((1.0, 1.0),))
    contention: float = 0.0
    contention_share: float = 0.2
    step_seconds: float = 0.0
    sequence_seconds: float = 0.0
    small_kernel_seconds: float = 0.0
    scaled_from: str | None = None
    source: str = ""
    kernels: Kernels = field(default_factory=dict)
    steps: StepProfile | None = None
    fit: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ceiling_flops(self) -> float:
        """bf16 FLOP/s that no step exceeds."""
        return self.sustained_flops or self.flops_bf16

    @property
    def ceiling_bandwidth(self) -> float:
        """Bytes/s that no step, nor two together, exceed."""
        return self.sustained_bandwidth or self.memory_bandwidth

    def kernel(self, operator: str, precision: str) -> Kernel:
        """Raises ConfigError when the device has no fit for it."""
        found = self.kernels.get(operator, {})
        if precision not in found:
            known = f"it has {', '.join(found)}" if found else "no table was fitted for it"
            raise ConfigError(f"device {self.name}: no kernel {operator} in {precision} ({known})")
        return found[precision]

    def device(self) -> Device:
        """What a policy may know. Decode sides are multiples of `unit_step`; what is left over, and the
        odd units of a device that is no multiple, go to prefill."""
        step = self.unit_step
        sides = range(step, self.units - step + 1, step)
        splits = tuple((self.units - decode, decode) for decode in reversed(sides))
        return Device(self.name, self.units, self.unit_kind, splits, self.depth, self.switch_seconds)

    def varied(
        self,
        contention: float | None = None,
        switch_seconds: float | None = None,
        knee: float = 1.0,
        slower: float = 1.0,
    ) -> DeviceFile:
        """This device with other assumptions, for sensitivity studies. slower: every time, times this."""
        return replace(
            self,
            contention=self.contention if contention is None else contention,
            switch_seconds=self.switch_seconds if switch_seconds is None else switch_seconds,
            compute=self.compute.stretched(knee),
            memory=self.memory.stretched(knee),
            flops_bf16=self.flops_bf16 / slower,
            memory_bandwidth=self.memory_bandwidth / slower,
            sustained_flops=self.ceiling_flops / slower,
            sustained_bandwidth=self.ceiling_bandwidth / slower,
            step_seconds=self.step_seconds * slower,
            sequence_seconds=self.sequence_seconds * slower,
            small_kernel_seconds=self.small_kernel_seconds * slower,
            steps=self.steps.slower(slower) if self.steps else None,
            kernels={
                operator: {name: replace(kernel, overhead=kernel.overhead * slower)
                           for name, kernel in group.items()}
                for operator, group in self.kernels.items()
            },
        )  # fmt: skip


def device_names() -> list[str]:
    """Devices that come with the package."""
    folder = resources.files("semipd").joinpath("devices")
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".json"))


def load_device(name: str) -> DeviceFile:
    """A device of the package by name, or any other by the path of its file. Raises ConfigError."""
    names = device_names()
    if name in names:
        text = resources.files("semipd").joinpath("devices", f"{name}.json").read_text(encoding="utf-8")
        return read_device(parse_json(text, f"device {name}"), f"device {name}")
    path = Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}, or a device file's path"
        raise ConfigError(f"no device {name!r}; {hint}")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"device file {name}: {path.stat().st_size} bytes are no device file")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"device file {name}: {error}") from None
    return read_device(parse_json(text, f"device file {name}"), f"device file {name}")


def parse_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object. Raises ConfigError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: not a JSON object")
    return value


def read_device(values: Mapping[str, Any], where: str) -> DeviceFile:
    """Check a device file's content. Raises ConfigError, one line that names the entry."""
    known = {entry.name for entry in dataclasses.fields(DeviceFile)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigError(
                f"{where}: unknown entry {key!r}" + (f"; did you mean {near[0]}?" if near else "")
            )
    for key in HEAD:
        if key not in values:
            raise ConfigError(f"{where}: {key} is missing")
    units = _number(values["units"], f"{where}: units", 1, 100_000, whole=True)
    read: dict[str, Any] = {"units": units}
    for key, (low, high) in _BOUNDS.items():
        if key in values:
            read[key] = _number(values[key], f"{where}: {key}", low, high)
    for key, high in (("unit_step", units), ("depth", 16)):
        if key in values:
            read[key] = _number(values[key], f"{where}: {key}", 1, high, whole=True)
    for key in ("name", "unit_kind", "source", "scaled_from"):
        if values.get(key) is not None:
            if not isinstance(values[key], str) or (not values[key] and key in HEAD):
                raise ConfigError(f"{where}: {key} is not text")
            read[key] = values[key]
    for key in ("compute", "memory"):
        read[key] = _curve(values.get(key), units, f"{where}: {key}")
    read["kernels"] = _kernels(values, where)
    if "steps" in values:
        read["steps"] = read_profile(values["steps"], units, f"{where}: steps")
    fit = values.get("fit", {})
    if not isinstance(fit, dict):
        raise ConfigError(f"{where}: fit is not an object")
    return DeviceFile(**read, fit=fit)


_BOUNDS = {
    "flops_bf16": (1e6, 1e19),
    "memory_bandwidth": (1e6, 1e16),
    "memory_bytes": (1e6, 1e16),
    "sustained_flops": (1e6, 1e19),
    "sustained_bandwidth": (1e6, 1e16),
    "switch_seconds": (0.0, 60.0),
    "contention": (0.0, 10.0),
    "contention_share": (0.001, 1.0),
    "step_seconds": (0.0, 60.0),
    "sequence_seconds": (0.0, 1.0),
    "small_kernel_seconds": (0.0, 1.0),
}


def _number(value: Any, where: str, low: float, high: float, whole: bool = False) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{where}: {value!r} is not a number")
    if not (low <= value <= high) or (whole and value != int(value)):
        kind = "whole number" if whole else "number"
        raise ConfigError(f"{where}: {value!r} is not a {kind} between {low:g} and {high:g}")
    return int(value) if whole else float(value)


def _numbers(value: Any, where: str, low: float = -1e9, high: float = 1e9) -> tuple[float, ...]:
    if not isinstance(value, list) or not value or len(value) > _MOST_VALUES:
        raise ConfigError(f"{where}: not a list of numbers")
    return tuple(_number(entry, where, low, high) for entry in value)


def _curve(value: Any, units: int, where: str) -> Curve:
    """Points (units, slowdown); without any, work is proportional to 1 / units."""
    if value is None:
        return Curve(((float(units), 1.0),))
    if not isinstance(value, list):
        raise ConfigError(f"{where}: not a list of [units, slowdown]")
    points = [_numbers(point, where, 1e-9) for point in value]
    if any(len(point) != 2 for point in points):
        raise ConfigError(f"{where}: not a list of [units, slowdown]")
    if not points or points[-1] != (float(units), 1.0):
        points.append((float(units), 1.0))
    for (low, slow), (high, fast) in pairwise(points):
        if low >= high or slow < fast:
            raise ConfigError(f"{where}: units must rise to {units} and slowdowns fall to 1")
    return Curve(tuple((point[0], point[1]) for point in points))


def _kernels(values: Mapping[str, Any], where: str) -> Kernels:
    source = values.get("scaled_from")
    if source is not None and "kernels" not in values:
        if source == values["name"] or source not in device_names():
            raise ConfigError(f"{where}: scaled_from: {source!r} is not another device of this package")
        return load_device(source).kernels
    found = values.get("kernels", {})
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: kernels is not an object")
    result: dict[str, dict[str, Kernel]] = {}
    for operator, group in found.items():
        if operator not in FEATURES:
            raise ConfigError(f"{where}: unknown operator {operator!r} (known: {', '.join(FEATURES)})")
        if not isinstance(group, dict):
            raise ConfigError(f"{where}: {operator} is not an object")
        result[operator] = {
            precision: _kernel(entry, len(FEATURES[operator]), f"{where}: {operator} {precision}")
            for precision, entry in group.items()
        }
    return result


def _kernel(value: Any, features: int, where: str) -> Kernel:
    if not isinstance(value, dict) or not isinstance(value.get("surfaces"), list):
        raise ConfigError(f"{where}: not an object with a list of surfaces")
    if not isinstance(value.get("host", []), list):
        raise ConfigError(f"{where}: host is not a list of surfaces")
    unknown = set(value) - {"overhead", "surfaces", "compute_share", "memory_share", "host", "scope"}
    if unknown:
        raise ConfigError(f"{where}: unknown entry {min(unknown)!r}")
    if value.get("scope", "kernel") not in ("kernel", "module"):
        raise ConfigError(f"{where}: scope is not kernel or module")
    return Kernel(
        overhead=_number(value.get("overhead", 0.0), f"{where}: overhead", 0.0, 60.0),
        surfaces=tuple(_surface(entry, features, where) for entry in value["surfaces"]),
        compute_share=_number(value.get("compute_share", 1.0), f"{where}: compute_share", 1e-6, 1.0),
        memory_share=_number(value.get("memory_share", 1.0), f"{where}: memory_share", 1e-6, 1.0),
        host=tuple(_surface(entry, features, where) for entry in value.get("host", [])),
        scope=value.get("scope", "kernel"),
    )


def _surface(value: Any, features: int, where: str) -> Surface:
    if not isinstance(value, dict) or set(value) != {"axes", "knots", "values"}:
        raise ConfigError(f"{where}: a surface is axes, knots and values")
    axes = tuple(
        _number(axis, f"{where}: axes", 0, features - 1, whole=True)
        for axis in _numbers(value["axes"], f"{where}: axes")
    )
    if len(set(axes)) < len(axes):
        raise ConfigError(f"{where}: an axis is named twice")
    if not isinstance(value["knots"], list) or len(value["knots"]) != len(axes):
        raise ConfigError(f"{where}: one list of knots for each axis")
    knots = tuple(_numbers(line, f"{where}: knots", -64, 64) for line in value["knots"])
    if any(low >= high for line in knots for low, high in pairwise(line)):
        raise ConfigError(f"{where}: knots must rise")
    numbers = _numbers(value["values"], f"{where}: values", -20, 20)
    if len(numbers) != math.prod(len(line) for line in knots):
        raise ConfigError(
            f"{where}: {len(numbers)} values for {'x'.join(str(len(line)) for line in knots)} knots"
        )
    return Surface(axes, knots, numbers)
