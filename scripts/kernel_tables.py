"""Read folders of measured kernel times (Parquet, latency in milliseconds) into what the fit needs."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from semipd.core.errors import ConfigError
from semipd.execute import cost_operators as operators
from semipd.execute.cost_surface import Demand
from semipd.model.catalogue import CATALOGUE
from semipd.model.spec import MlaSpec

Array = NDArray[np.float64]
Rows = NDArray[np.bool_]

OPERATORS = (
    "gemm",
    "context_attention",
    "generation_attention",
    "moe",
    "mla_context",
    "mla_generation",
    "allreduce",
)
# The MLA tables name a model and a number of heads but no sizes: all of them measure DeepSeek-V3's.
MEASURED_MLA_MODEL = "deepseek-v3"


@dataclass(frozen=True)
class Group:
    """The rows of one operator at one precision, one per distinct shape and size (the fastest kernel).

    precision: key of the device file's kernels. shape: one configuration per row, which is held out whole
    or not at all. sizes: the columns that say how much work a row is. at_floor: rows that took as long as
    the host needs to launch them, so that the device may have been faster.
    """

    operator: str
    precision: str
    scope: str
    demand: Demand
    seconds: Array
    shape: NDArray[np.int64]
    sizes: NDArray[np.int64]
    at_floor: Rows


@dataclass(frozen=True)
class Layout:
    """The columns of one operator's table and how a group of its rows becomes a demand.

    slowest_start: seconds that no device needs to start this operator: measurements that rest above that,
    however small the work, were made without a captured graph and show their host.
    """

    precision: tuple[str, ...]
    optional: tuple[str, ...]
    shape: tuple[str, ...]
    sizes: tuple[str, ...]
    demand: Callable[[dict[str, Array], tuple[str, ...], str], Demand]
    slowest_start: float = 100e-6


def read_tables(folder: Path) -> tuple[dict[str, list[Group]], list[str], list[str]]:
    """(groups by operator, operators without a usable table, notes on rows that were left out).

    Raises ConfigError for a table that cannot be read."""
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}")
    groups: dict[str, list[Group]] = {}
    skipped: list[str] = []
    left_out: list[str] = []
    for operator in OPERATORS:
        path = folder / f"{operator}.parquet"
        if not path.exists():
            skipped.append(operator)
            continue
        found, notes = _read_table(path, operator)
        left_out += notes
        if found:
            groups[operator] = found
        else:
            skipped.append(operator)
    if not groups:
        raise ConfigError(f"{folder} holds no table that can be fitted ({', '.join(OPERATORS)}.parquet)")
    return groups, skipped, left_out


def held_out(group: Group) -> Rows:
    """Rows of every third configuration in the order of their hashes: the same ones at every precision,
    on every machine."""
    distinct, inverse = np.unique(group.shape, axis=0, return_inverse=True)
    names = [f"{group.operator}|{'|'.join(str(value) for value in row)}" for row in distinct.tolist()]
    order = sorted(range(len(names)), key=lambda at: hashlib.sha256(names[at].encode()).hexdigest())
    chosen = np.zeros(len(names), bool)
    chosen[order[::3]] = True
    return chosen[inverse.reshape(-1)]


def _read_table(path: Path, operator: str) -> tuple[list[Group], list[str]]:
    layout = LAYOUTS[operator]
    columns = _columns(path)
    rows = len(next(iter(columns.values()))) if columns else 0
    if rows == 0:
        raise ConfigError(f"{path}: no rows")
    keys = (*layout.shape, *layout.sizes)
    numbers = {name: _whole(columns, name, path) for name in keys}
    seconds = _seconds(columns, path)
    names = (*layout.precision, *(name for name in layout.optional if name in columns))
    labels = [_text(columns, name, path) for name in names]
    keep = np.ones(rows, bool)
    notes: Counter[str] = Counter()
    if "window_size" in columns:
        windowed = _whole(columns, "window_size", path) > 0
        keep &= ~windowed
        notes["with a sliding window"] += int(windowed.sum())
    if "backend" in columns:
        backends = _text(columns, "backend", path)
        graphs = np.asarray(["graph" in str(name) for name in backends])
        if graphs.any():  # launched one by one, a collective shows its host
            notes["not from a captured graph"] += int((keep & ~graphs).sum())
            keep &= graphs
    scope = "kernel"
    if "op_name" in columns and all("module" in str(name) for name in columns["op_name"]):
        scope = "module"
    sources = _text(columns, "kernel_source", path) if "kernel_source" in columns else np.full(rows, "")
    groups = []
    for label in sorted(set(zip(*labels, strict=True))):
        chosen = keep.copy()
        for line, value in zip(labels, label, strict=True):
            chosen &= line == value
        dtypes = [word for name, word in zip(names, label, strict=True) if name != "distribution"]
        unknown = [word for word in dtypes if word not in operators.BYTES]
        if unknown:
            notes[f"of {unknown[0]}"] += int(chosen.sum())
            continue
        if not chosen.any():
            continue
        times = seconds[chosen]
        waits = np.zeros(len(times), bool)
        if scope == "kernel":
            waits = _host_bound(times, sources[chosen], layout.slowest_start)
        cut = {name: line[chosen] for name, line in numbers.items()}
        group = _group(operator, layout, label, scope, cut, times, waits)
        if len(np.unique(group.shape, axis=0)) < 3:
            notes[f"of {group.precision}, with fewer than three configurations"] += int(chosen.sum())
            continue
        groups.append(group)
    return groups, [f"{operator}: {count} rows {what}" for what, count in notes.items() if count]


def _group(
    operator: str,
    layout: Layout,
    label: tuple[str, ...],
    scope: str,
    numbers: dict[str, NDArray[np.int64]],
    seconds: Array,
    waits: Rows,
) -> Group:
    """One row per distinct shape and size: engines run the fastest kernel they have."""
    table = np.stack([numbers[name] for name in (*layout.shape, *layout.sizes)], axis=1)
    order = np.argsort(seconds, kind="stable")
    distinct, first = np.unique(table[order], axis=0, return_index=True)
    best = order[first]
    names = (*layout.shape, *layout.sizes)
    values = {name: distinct[:, at].astype(float) for at, name in enumerate(names)}
    demand = layout.demand(values, label, scope)
    shape = distinct[:, : len(layout.shape)]
    sizes = distinct[:, len(layout.shape) :]
    return Group(operator, "/".join(label), scope, demand, seconds[best], shape, sizes, waits[best])


def _host_bound(seconds: Array, sources: NDArray[Any], slowest_start: float) -> Rows:
    """Rows near the least time of their implementation, where that is more than any device's start."""
    result = np.zeros(len(seconds), bool)
    for source in sorted(set(sources)):
        rows = sources == source
        least = float(np.quantile(seconds[rows], 0.01))
        if least >= slowest_start:
            result |= rows & (seconds < 1.3 * least)
    return result


def _columns(path: Path) -> dict[str, Any]:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}


def _column(columns: dict[str, Any], name: str, path: Path) -> Any:
    if name not in columns:
        raise ConfigError(f"{path}: column {name} is missing")
    return columns[name]


def _whole(columns: dict[str, Any], name: str, path: Path) -> NDArray[np.int64]:
    values = _numeric(columns, name, path)
    low = 0 if name in ("step", "window_size") else 1
    bad = ~((values >= low) & (values <= 2**53) & (values == np.floor(values)))
    if bad.any():
        row = int(np.argmax(bad))
        raise ConfigError(
            f"{path}: row {row + 1}: {name} {values[row]:g} is not a whole number of at least {low}"
        )
    return values.astype(np.int64)


def _seconds(columns: dict[str, Any], path: Path) -> Array:
    values = _numeric(columns, "latency", path)
    bad = ~((values > 0) & np.isfinite(values))
    if bad.any():
        row = int(np.argmax(bad))
        raise ConfigError(f"{path}: row {row + 1}: latency {values[row]:g} is not above 0")
    return values / 1e3


def _numeric(columns: dict[str, Any], name: str, path: Path) -> Array:
    column = _column(columns, name, path)
    try:
        return np.asarray(column, float)
    except (TypeError, ValueError):
        raise ConfigError(f"{path}: column {name} does not hold numbers") from None


def _text(columns: dict[str, Any], name: str, path: Path) -> NDArray[Any]:
    return np.asarray([str(value) for value in _column(columns, name, path)], object)


def _gemm(v: dict[str, Array], label: tuple[str, ...], scope: str) -> Demand:
    return operators.gemm(v["m"], v["n"], v["k"], label[0])


def _context_attention(v: dict[str, Array], label: tuple[str, ...], scope: str) -> Demand:
    tokens = v["batch_size"] * v["isl"]
    pairs = tokens * v["isl"] / 2.0
    heads, kv_heads, dim = v["num_heads"], v["num_key_value_heads"], v["head_dim"]
    wide, narrow = operators.BYTES[label[0]], operators.BYTES[label[1]]
    return operators.context_attention(tokens, pairs, tokens, heads, kv_heads, dim, narrow, wide)


def _generation_attention(v: dict[str, Array], label: tuple[str, ...], scope: str) -> Demand:
    context = v["batch_size"] * (v["isl"] + v["step"])
    heads, kv_heads, dim = v["num_heads"], v["num_key_value_heads"], v["head_dim"]
    wide, narrow = operators.BYTES[label[0]], operators.BYTES[label[1]]
    return operators.generation_attention(v["batch_size"], context, heads, kv_heads, dim, narrow, wide)


def _moe(v: dict[str, Array], label: tuple[str, ...], scope: str) -> Demand:
    return operators.moe(
        v["num_tokens"],
        v["hidden_size"],
        v["inter_size"],
        v["topk"],
        v["num_experts"],
        v["moe_tp_size"],
        v["moe_ep_size"],
        label[0],
    )


def _mla_shape() -> tuple[MlaSpec, int]:
    spec = CATALOGUE[MEASURED_MLA_MODEL]
    assert spec.mla is not None
    return spec.mla, spec.hidden


def _module(label: tuple[str, ...], scope: str) -> tuple[int, str] | None:
    weights = label[2] if len(label) > 2 else label[0]
    return (_mla_shape()[1], weights) if scope == "module" else None


def _mla_context(v: dict[str, Array], label: tuple[str, ...], scope: str) -> Demand:
    tokens = v["batch_size"] * v["isl"]
    context = tokens + v["batch_size"] * v["step"]
    pairs = tokens * (v["step"] + v["isl"] / 2.0)
    narrow = operators.BYTES[label[1]]
    mla = _mla_shape()[0]
    return operators.mla_context(tokens, pairs, context, v["num_heads"], mla, narrow, _module(label, scope))


def _mla_generation(v: dict[str, Array], label: tuple[str, ...], scope: str) -> Demand:
    context = v["batch_size"] * (v["isl"] + v["step"])
    narrow, mla = operators.BYTES[label[1]], _mla_shape()[0]
    heads = v["num_heads"]
    return operators.mla_generation(v["batch_size"], context, heads, mla, narrow, _module(label, scope))


def _allreduce(v: dict[str, Array], label: tuple[str, ...], scope: str) -> Demand:
    return operators.allreduce(v["message_size"], v["num_gpus"])


_HEADS = ("num_heads", "num_key_value_heads", "head_dim")
_EXPERTS = ("hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
_ATTENTION = ("attn_dtype", "kv_cache_dtype")
_LATENT = ("mla_dtype", "kv_cache_dtype")
LAYOUTS = {
    "gemm": Layout(("gemm_dtype",), (), ("n", "k"), ("m",), _gemm, 30e-6),
    "context_attention": Layout(_ATTENTION, (), _HEADS, ("batch_size", "isl"), _context_attention),
    "generation_attention": Layout(
        _ATTENTION, (), _HEADS, ("batch_size", "isl", "step"), _generation_attention
    ),
    "moe": Layout(("moe_dtype",), ("distribution",), _EXPERTS, ("num_tokens",), _moe, 200e-6),
    "mla_context": Layout(
        _LATENT, ("gemm_type",), ("num_heads",), ("batch_size", "isl", "step"), _mla_context
    ),
    "mla_generation": Layout(
        _LATENT, ("gemm_type",), ("num_heads",), ("batch_size", "isl", "step"), _mla_generation
    ),
    "allreduce": Layout(("allreduce_dtype",), (), ("message_size",), ("num_gpus",), _allreduce),
}
