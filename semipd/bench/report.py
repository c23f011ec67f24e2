"""How results are shown: latency tables, one line of JSON, and pictures.

Tables need rich, pictures need matplotlib; both are imported by the function that uses them, so that
simulating and measuring work without.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from semipd.core.errors import ConfigError

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
Curve = tuple[str, Sequence[float], Sequence[float]]  # label, x, y


def quantiles(values: Sequence[float]) -> dict[str, float | None]:
    """mean, p50, p90, p99 and max of the values; all None when there are none."""
    names = ("mean", *QUANTILES, "max")
    if not len(values):
        return dict.fromkeys(names)
    data = np.asarray(values, dtype=np.float64)
    levels = np.quantile(data, list(QUANTILES.values()))
    return dict(zip(names, (float(data.mean()), *levels.tolist(), float(data.max())), strict=True))


def json_line(result: Mapping[str, Any]) -> str:
    """One line of strict JSON. Numbers that JSON cannot hold (NaN, infinity) become null."""
    return json.dumps(_plain(result), allow_nan=False)


def _plain(value: Any) -> Any:
    match value:
        case bool() | None:
            return value
        case float() | np.floating():
            return float(value) if math.isfinite(value) else None
        case np.integer():
            return int(value)
        case Mapping():
            return {str(key): _plain(entry) for key, entry in value.items()}
        case list() | tuple() | np.ndarray():
            return [_plain(entry) for entry in value]
        case _:
            return value


def latency_table(
    title: str,
    latencies: Mapping[str, Mapping[str, float | None]],
    facts: Iterable[tuple[str, str]] = (),
    file: TextIO | None = None,
) -> None:
    """Print facts (name, value), then one row of milliseconds per latency (as `quantiles` makes them)."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    file = sys.stdout if file is None else file
    console = Console(file=file, width=None if file.isatty() else 100, highlight=False, markup=False)
    console.rule(title, style="none")
    grid = Table.grid(padding=(0, 2))
    for name, value in facts:
        grid.add_row(name, value)
    console.print(grid)
    columns = ("mean", *QUANTILES, "max")
    table = Table(box=SIMPLE_HEAD)
    table.add_column("milliseconds")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in latencies.items():
        table.add_row(name, *(milliseconds(row.get(column)) for column in columns))
    console.print(table)


def milliseconds(seconds: float | None) -> str:
    """Four digits or so: 0.123, 12.3, 1,234."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    value = seconds * 1000
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 1000 else 0
    return f"{value:,.{digits}f}"


# Pictures


def plot_curves(
    path: Path,
    curves: Iterable[Curve],
    *,
    title: str,
    x: str,
    y: str,
    targets: Mapping[str, float] | None = None,
    log_y: bool = False,
    steps: bool = False,
) -> None:
    """Lines with markers, such as latency against rate; or steps, such as a split over time.

    targets: horizontal dashed lines by label. Raises ConfigError when matplotlib is not there."""
    axes, save = _figure(title, x, y)
    for label, across, up in curves:
        if steps:
            axes.step(across, up, where="post", label=label)
        else:
            axes.plot(across, up, marker="o", markersize=3.5, label=label)
    for label, level in (targets or {}).items():
        axes.axhline(level, linestyle="--", linewidth=1, color="0.4", label=label)
    if log_y:
        axes.set_yscale("log")
    save(path)


def plot_distributions(
    path: Path, samples: Mapping[str, Sequence[float]], *, title: str, x: str, log_x: bool = False
) -> None:
    """The share of values at or below x, one curve per sample. Raises ConfigError without matplotlib."""
    axes, save = _figure(title, x, "share of values")
    for label, values in samples.items():
        data = np.sort(np.asarray(values, dtype=np.float64))
        if len(data):
            axes.step(data, np.arange(1, len(data) + 1) / len(data), where="post", label=label)
    if log_x:
        axes.set_xscale("log")
    save(path)


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    """Axes on a figure of their own, and the function that writes it. pyplot's global state is not used."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)

    def save(path: Path) -> None:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
        try:
            figure.savefig(path, dpi=130)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from None

    return axes, save
