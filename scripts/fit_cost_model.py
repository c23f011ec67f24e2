"""Fit a device file's kernels to a folder of measured kernel times, and say how well they are predicted.

    python scripts/fit_cost_model.py --profiles DIR --device-spec FILE [--out FILE] [--json]

DIR holds Parquet tables of kernel latencies in milliseconds, one per operator (docs/cost-model.md names
the columns). FILE is a device file, or just its head: name, flops_bf16, memory_bandwidth, memory_bytes,
units, unit_kind. Errors are on configurations that the fit has not seen: a third of them, whole. The
coefficients that --out writes then use every row. The last line is one JSON object. Bad input: one line
on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from kernel_tables import Array, Group, Rows, held_out, read_tables
from summed_steps import Lookup, summed_steps
from surface_fit import Shape, fit_kernel, predict

from semipd.core.errors import ConfigError
from semipd.execute.cost_surface import Demand, Kernel, Surface
from semipd.execute.device_file import DeviceFile, parse_json, read_device

# Features per operator: see the tuples in semipd/execute/cost_operators.py.
SHAPES: Mapping[str, tuple[Shape, ...]] = {
    "gemm": (Shape((0, 1, 2), (16, 7, 7)),),
    "context_attention": (Shape((0, 1, 2), (15, 13, 5)), Shape((0, 1, 3), (8, 8, 4))),
    "generation_attention": (Shape((0, 1, 2), (12, 10, 5)), Shape((0, 1, 3), (9, 9, 4))),
    "moe": (
        Shape((0, 1, 2), (14, 6, 6)),
        Shape((0, 1, 4), (10, 5, 5)),
        Shape((0, 3), (14, 3)),
        # What only some models have, such as a tuned kernel: believed as far as their rows insist.
        Shape((0, 3, 2), (6, 10, 9), pull=0.5),
    ),
    "mla_context": (Shape((0, 1, 2), (9, 9, 8)),),
    "mla_generation": (Shape((0, 1, 2), (9, 9, 8)),),
    "allreduce": (Shape((0, 1), (16, 3)),),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profiles", required=True, type=Path, metavar="DIR")
    parser.add_argument("--device-spec", required=True, type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the device file here")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    options = parser.parse_args(arguments)
    try:
        values, device = read_spec(options.device_spec)
        groups, skipped, left_out = read_tables(options.profiles)
        report = evaluate(device, groups) | {"skipped": skipped, "left_out": left_out}
        if options.out:
            write_device(options.out, values, fit_all(device, groups), report)
    except ConfigError as error:
        print(f"fit_cost_model: {error}", file=sys.stderr)
        return 2
    if not options.json:
        print_report(report)
    print(json.dumps(report))
    return 0


def read_spec(path: Path) -> tuple[dict[str, Any], DeviceFile]:
    """(the device file's entries that a fit keeps, the device without kernels). Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    values = parse_json(text, str(path))
    values = {key: value for key, value in values.items() if key not in ("kernels", "fit", "scaled_from")}
    return values, read_device(values, str(path))


def evaluate(device: DeviceFile, groups: Mapping[str, Sequence[Group]]) -> dict[str, Any]:
    """Errors on configurations that a fit to the other two thirds has not seen."""
    lookup = Lookup()
    errors: dict[str, list[Array]] = {}
    precisions: dict[str, dict[str, Any]] = {}
    for operator, members in groups.items():
        for group in members:
            held = held_out(group)
            kernel = _fit(device, group, ~held)
            predicted = predict(kernel, group.demand, device.flops_bf16, device.memory_bandwidth)
            error = np.abs(predicted / group.seconds - 1.0)
            lookup.add(group, predicted, held)
            errors.setdefault(operator, []).append(error[held])
            precisions.setdefault(operator, {})[group.precision] = _spread(error[held])
    pooled = {operator: _spread(np.concatenate(parts)) for operator, parts in errors.items()}
    return {
        "device": device.name,
        "held_out_median_error": {name: entry["median"] for name, entry in pooled.items()},
        "held_out_p90_error": {name: entry["p90"] for name, entry in pooled.items()},
        "held_out_rows": {name: entry["rows"] for name, entry in pooled.items()},
        "by_precision": precisions,
        "summed_steps": _step_errors(lookup),
    }


def fit_all(device: DeviceFile, groups: Mapping[str, Sequence[Group]]) -> dict[str, dict[str, Kernel]]:
    """Kernels fitted to every row, by operator and precision."""
    return {
        operator: {
            group.precision: _fit(device, group, np.ones(len(group.seconds), bool)) for group in members
        }
        for operator, members in groups.items()
    }


def _fit(device: DeviceFile, group: Group, rows: Rows) -> Kernel:
    peak, bandwidth = device.flops_bf16, device.memory_bandwidth
    demand, seconds = _rows(group, rows)
    shapes = SHAPES[group.operator]
    return fit_kernel(demand, seconds, group.at_floor[rows], shapes, peak, bandwidth, group.scope)


def _rows(group: Group, rows: Rows) -> tuple[Demand, Array]:
    parts = [np.broadcast_to(part, rows.shape)[rows] for part in group.demand[:3]]
    features = tuple(np.broadcast_to(line, rows.shape)[rows] for line in group.demand.features)
    return Demand(*parts, features), group.seconds[rows]


def _spread(error: Array) -> dict[str, Any]:
    return {
        "median": round(float(np.median(error)), 4),
        "p90": round(float(np.quantile(error, 0.9)), 4),
        "rows": len(error),
    }


def _step_errors(lookup: Lookup) -> dict[str, Any]:
    """Errors of summed steps by model and for all of those with a held-out kernel in them."""
    result: dict[str, Any] = {}
    everything: list[float] = []
    for name, rows in summed_steps(lookup).items():
        errors = np.array([abs(predicted / measured - 1.0) for measured, predicted, _ in rows])
        held = np.array([row[2] for row in rows])
        everything += errors[held].tolist()
        result[name] = _spread(errors)
    if not result:
        return {}
    return {"held_out": _spread(np.array(everything)) if everything else None, "by_model": result}


def write_device(
    path: Path,
    values: Mapping[str, Any],
    kernels: Mapping[str, Mapping[str, Kernel]],
    report: Mapping[str, Any],
) -> None:
    """The device file: one line per surface, so that a new fit is a readable change."""
    fit = {key: value for key, value in report.items() if key != "device"}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in values.items()]
    lines.append(f'  "fit": {json.dumps(fit)},')
    operators = []
    for operator, group in kernels.items():
        entries = [f"      {json.dumps(name)}: {_kernel_json(kernel)}" for name, kernel in group.items()]
        operators.append(f"    {json.dumps(operator)}: {{\n" + ",\n".join(entries) + "\n    }")
    lines.append('  "kernels": {\n' + ",\n".join(operators) + "\n  }")
    text = "{\n" + "\n".join(lines) + "\n}\n"
    read_device(json.loads(text), str(path))
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error}") from None


def _kernel_json(kernel: Kernel) -> str:
    value: dict[str, Any] = {
        "overhead": kernel.overhead,
        "compute_share": kernel.compute_share,
        "memory_share": kernel.memory_share,
    }
    if kernel.scope != "kernel":
        value["scope"] = kernel.scope
    if kernel.host:
        value["host"] = [_surface_json(surface) for surface in kernel.host]
    value["surfaces"] = [_surface_json(surface) for surface in kernel.surfaces]
    return json.dumps(value, separators=(",", ":"))


def _surface_json(surface: Surface) -> dict[str, Any]:
    return {"axes": surface.axes, "knots": surface.knots, "values": surface.values}


def print_report(report: Mapping[str, Any]) -> None:
    """The table for people."""
    print(f"{report['device']}: relative error on held-out configurations")
    print(f"{'operator':<22} {'precision':<34} {'rows':>6} {'median':>8} {'p90':>8}")
    lines = [
        (operator, name, entry)
        for operator, group in report["by_precision"].items()
        for name, entry in group.items()
    ]
    steps = report["summed_steps"]
    lines += [("summed steps", name, entry) for name, entry in steps.get("by_model", {}).items()]
    for kind, name, entry in lines:
        median, p90 = entry["median"], entry["p90"]
        print(f"{kind:<22} {name:<34} {entry['rows']:>6} {median:>8.1%} {p90:>8.1%}")
    for operator in report["skipped"]:
        print(f"skipped: {operator} has no table")
    for note in report["left_out"]:
        print(f"left out: {note}")


if __name__ == "__main__":
    sys.exit(main())
