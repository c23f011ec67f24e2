"""`semipd profile MODEL`: measure this machine and write a device file that `simulate` and `--split auto`
predict with."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semipd.bench.profile_cpu import (
    BATCHES,
    Bench,
    Slowdown,
    affordable,
    mean_slowdown,
    measure_alone,
    measure_beside,
    measure_host,
    new_pace,
    steps_to_measure,
)
from semipd.bench.profile_gpu import device_entries
from semipd.bench.profile_plots import plot_fitted, plot_measured
from semipd.bench.report import json_line
from semipd.bench.step_fit import Fit, Timing, fit_prices, mean_timings
from semipd.build import Resolved, build_engine, resolve
from semipd.config import from_mapping
from semipd.core.errors import ConfigError
from semipd.core.types import Lane, Work
from semipd.execute.choose import has_gpu
from semipd.execute.step_profile import (
    Beside,
    ProfiledCost,
    StepProfile,
    read_profile,
    shape_of,
    write_profile,
)
from semipd.flags import add_flags, check_fields, from_flags, setting
from semipd.model.folder import model_folder
from semipd.model.spec import load_spec

LONGEST = 4096  # positions of a sequence that profiling needs at most
SHARES = (0.5, 0.35, 0.15)  # of the time: steps alone, beside each other, under the planner


@dataclass(frozen=True)
class ProfileOptions:
    """Profile"""

    device: str = setting(
        "auto",
        "what to measure (auto: the GPU where there is one)",
        "choice",
        choices=("auto", "cpu", "cuda"),
    )
    out: str | None = setting(None, "device file to write (default cpu.json or gpu.json)")
    plot: str | None = setting(None, "folder for pictures of step times over shares", metavar="DIR")
    seconds: float = setting(60.0, "CPU: about how long to measure", "number", low=0.5, high=3600)
    load_format: str = setting("auto", "dummy: random weights", "choice", choices=("auto", "dummy"))
    dtype: str = setting(
        "auto", "auto, bfloat16 or float32", "choice", choices=("auto", "bfloat16", "float32")
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Measured:
    """What one round of measuring found. timings: by units. host: (sequences, seconds that the planner
    adds to a decode step of so many)."""

    resolved: Resolved
    timings: dict[int, list[Timing]]
    slowdowns: list[Slowdown]
    host: list[tuple[int, float]]
    switch_seconds: float


def profile(model: str | None, options: ProfileOptions) -> dict[str, Any]:
    """Measure; the content of a device file. Raises ConfigError for a model that cannot be loaded."""
    return describe([measure(model, options)])


def measure(model: str | None, options: ProfileOptions) -> Measured:
    """One round, on this machine's cores. Raises ConfigError for a model that cannot be loaded."""
    slots = BATCHES[-1]
    settings = {
        "model": model,
        "device": "cpu",
        "dtype": options.dtype,
        "load_format": options.load_format,
        "max_num_seqs": slots,
        "prefix_cache": False,
    }
    longest = min(load_spec(model_folder(model)).max_positions, LONGEST)
    resolved = resolve(from_mapping({**settings, "max_model_len": longest}))
    pace = new_pace()
    engine = build_engine(resolved, [pace])
    try:
        device = engine.executor.device
        pool = engine.kv[Lane.DECODE]
        vocabulary = resolved.spec.vocabulary
        bench = Bench(engine.executor, engine.max_length, slots, pool.total, pool.block_size, vocabulary)
        steps = steps_to_measure(engine.max_length, slots, pool.total * pool.block_size)
        units = some_units(device.units)
        steps = affordable(bench, steps, units, SHARES[0] * options.seconds)
        timings = measure_alone(bench, steps, units, SHARES[0] * options.seconds)
        shares = [*some_splits(device.legal_splits), (device.units, device.units)]
        slowdowns = measure_beside(bench, shares, SHARES[1] * options.seconds, slots, engine.max_length)
        turns = SHARES[2] * options.seconds / 3
        host = [measure_host(engine, pace, bench, count, turns) for count in (1, 8, 32)]
    finally:
        engine.executor.close()
    return Measured(resolved, timings, slowdowns, host, device.switch_seconds)


def some_units(units: int) -> list[int]:
    """Numbers of units to measure on: powers of two and all of them."""
    return sorted({2**power for power in range(units.bit_length()) if 2**power <= units} | {units})


def some_splits(legal: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """The legal splits, or five spread over them when there are more."""
    if len(legal) <= 5:
        return list(legal)
    return [legal[round(index * (len(legal) - 1) / 4)] for index in range(5)]


def describe(rounds: Sequence[Measured]) -> dict[str, Any]:
    """Rounds of the same model on the same machine (at least one) as one device file. Peak and bandwidth
    are what the model's steps achieved."""
    resolved = rounds[0].resolved
    fits = {
        count: fit_prices(mean_timings(found.timings[count] for found in rounds))
        for count in rounds[0].timings
    }
    slowdowns = [mean_slowdown(pair) for pair in zip(*(found.slowdowns for found in rounds), strict=True)]
    itemsize = 4 if resolved.dtype == "float32" else 2
    shape = shape_of(resolved.spec, itemsize)
    units = max(fits)
    beside = [
        entry
        for found in slowdowns
        for entry in (
            Beside(found.prefill, found.decode, True, found.prompt),
            Beside(found.decode, found.prefill, False, found.single),
        )
    ]
    prices = {count: fit.prices for count, fit in fits.items()}
    steps = StepProfile(Path(resolved.name).name, shape, prices, tuple(beside))
    cost = ProfiledCost(steps)
    prompt = Work(tokens=1024, context=1024, square=524288.0, sequences=1, sampled=1)
    single = Work.decode(1, 32)
    step_seconds, sequence_seconds = host_seconds([row for found in rounds for row in found.host])
    flops = shape["linear_flops"] * prompt.tokens / cost.seconds(prompt, units)
    moved = (shape["linear_bytes"] + shape["head_bytes"]) / cost.seconds(single, units)
    return {
        "name": f"cpu-{_slug(Path(resolved.name).name)}",
        "flops_bf16": round(flops),
        "memory_bandwidth": round(moved),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "units": units,
        "unit_kind": "core",
        "depth": 2,
        "switch_seconds": rounds[0].switch_seconds,
        "step_seconds": step_seconds,
        "sequence_seconds": sequence_seconds,
        "source": f"semipd profile on {_cpu_name()}, {_today()}; peak and bandwidth as achieved by steps",
        "steps": write_profile(steps),
        "fit": _fit_entries(fits, slowdowns),
    }


def _fit_entries(fits: dict[int, Fit], slowdowns: list[Slowdown]) -> dict[str, Any]:
    """How far the file is from what was measured."""
    return {
        "error_by_units": {
            str(count): {
                "median": round(fit.median_error, 4),
                "largest": round(fit.largest_error, 4),
                "held_out_median": round(fit.held_out, 4),
            }
            for count, fit in fits.items()
        },
        "slowdown_spread": {f"{s.prefill}:{s.decode}": round(s.spread, 3) for s in slowdowns},
    }


def host_seconds(rows: list[tuple[int, float]]) -> tuple[float, float]:
    """(per step, per sequence) from (sequences, seconds above the executor's own): least squares, neither
    below 0."""
    count = len(rows)
    mean_x, mean_y = sum(x for x, _ in rows) / count, sum(y for _, y in rows) / count
    spread = sum((x - mean_x) ** 2 for x, _ in rows)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in rows) / spread if spread else 0.0
    slope = max(slope, 0.0)
    start = mean_y - slope * mean_x
    if start < 0.0:
        start, slope = 0.0, max(sum(x * y for x, y in rows) / sum(x * x for x, _ in rows), 0.0)
    return start, slope


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `semipd profile`."""
    parser.add_argument("model", nargs="?", help="local folder or hub id (default: the model in the box)")
    add_flags(parser, ProfileOptions)


def run_command(namespace: argparse.Namespace) -> int:
    """Measure, write the file (and pictures), print its fit as one JSON line. Raises ConfigError."""
    options = from_flags(ProfileOptions, namespace)
    on_gpu = options.device == "cuda" or (options.device == "auto" and has_gpu())
    path = Path(options.out or ("gpu.json" if on_gpu else "cpu.json"))
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(f"--out: cannot write {path}")
    pictures = picture_folder(options.plot) if options.plot else None
    if on_gpu:
        raw, found = measure_gpu(namespace.model, options)
        write_device(raw, path.with_suffix(".raw.json"))
    else:
        raw, found = None, profile(namespace.model, options)
    write_device(found, path)
    if pictures is not None:
        if raw is not None:
            plot_measured(pictures, raw)
        else:
            plot_fitted(pictures, read_profile(found["steps"], found["units"], str(path)), "core")
    shown = {key: found.get(key) for key in ("name", "units", "step_seconds", "sequence_seconds", "fit")}
    sys.stdout.write(json_line({**shown, "out": str(path)}) + "\n")
    return 0


def measure_gpu(model: str | None, options: ProfileOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """(measurements, a device file's content) of this machine's GPU. Raises ConfigError."""
    # Here: both bring torch, which a profile of the CPU measures from outside.
    from semipd.execute.cuda_backend import CudaBackend
    from semipd.execute.profile_cuda import profile_gpu

    folder = model_folder(model)
    backend = CudaBackend()
    _, memory = backend.memory()
    raw = profile_gpu(backend, folder, dtype=options.dtype, load_format=options.load_format, say=_say)
    spec = load_spec(folder)
    itemsize = 4 if (spec.dtype if options.dtype == "auto" else options.dtype) == "float32" else 2
    return raw, device_entries(raw, spec, itemsize, memory)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def picture_folder(path: str) -> Path:
    """The folder, made. Raises ConfigError where there can be no pictures: before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--plot: cannot make the folder {path}: {error.strerror}") from None
    return Path(path)


def write_device(found: dict[str, Any], path: Path) -> None:
    """As JSON. Raises ConfigError."""
    try:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") or "model"


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or "a CPU"


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()
