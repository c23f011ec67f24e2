"""Whole steps out of measured kernels: does the model's sum match the sum of the measurements?

A step is every kernel of one layer at the same batch: the projections, attention, and for a mixture of
experts its router, shared and routed experts. Only steps whose kernels are all in the tables count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

import numpy as np
from kernel_tables import Array, Group, Rows

from semipd.model.catalogue import CATALOGUE
from semipd.model.spec import ModelSpec

RANKS = (1, 2, 4, 8)
Row = tuple[float, float, bool]  # measured seconds, predicted seconds, was the shape held out
Key = tuple[str, str, tuple[int, ...]]


class Lookup:
    """Every measured row of every group, by operator, precision and numbers."""

    def __init__(self) -> None:
        self._rows: dict[Key, Row] = {}
        self.sizes: dict[tuple[str, str], list[tuple[int, ...]]] = {}

    def add(self, group: Group, predicted: Array, held: Rows) -> None:
        numbers = np.concatenate([group.shape, group.sizes], axis=1).tolist()
        for key, *row in zip(numbers, group.seconds, predicted, held, strict=True):
            self._rows[group.operator, group.precision, tuple(key)] = (row[0], row[1], bool(row[2]))
        distinct = np.unique(group.sizes, axis=0).tolist()
        self.sizes[group.operator, group.precision] = [tuple(row) for row in distinct]

    def get(self, operator: str, precision: str, *numbers: int) -> Row | None:
        return self._rows.get((operator, precision, numbers))

    def precisions(self, operator: str) -> list[str]:
        return sorted(precision for name, precision in self.sizes if name == operator)


def summed_steps(lookup: Lookup) -> Mapping[str, list[Row]]:
    """Sums by model, for each of our models, at 1 to 8 ranks, that the tables can tell. A step counts as
    held out when at least one of its kernels was."""
    result: dict[str, list[Row]] = {}
    for (name, spec), ranks in product(CATALOGUE.items(), RANKS):
        if spec.heads % ranks or spec.kv_heads % min(ranks, spec.kv_heads):
            continue
        sums = [row for row in (_sum(parts) for parts in _steps(lookup, spec, ranks)) if row]
        if sums:
            result[f"{name} on {ranks}"] = sums
    return result


def _sum(parts: list[Row | None]) -> Row | None:
    found = [row for row in parts if row is not None]
    if not found or len(found) < len(parts):
        return None
    return (
        sum(row[0] for row in found),
        sum(row[1] for row in found),
        any(row[2] for row in found),
    )


def _steps(lookup: Lookup, spec: ModelSpec, ranks: int) -> Iterator[list[Row | None]]:
    heads: tuple[int, ...]
    if spec.mla is None:
        heads = (spec.heads // ranks, max(spec.kv_heads // ranks, 1), spec.head_dim)
        operators = ("context_attention", "generation_attention")
        precision = "bfloat16/bfloat16"
    else:
        heads, operators = (spec.heads // ranks,), ("mla_context", "mla_generation")
        wanted = (f"bfloat16/bfloat16/{spec.dtype}", "bfloat16/bfloat16")
        precision = next((p for p in wanted if (operators[0], p) in lookup.sizes), wanted[0])
        if precision == wanted[1]:
            return  # only the bare kernel was measured, and its projections have shapes of their own
    for operator in operators:
        for sizes in lookup.sizes.get((operator, precision), []):
            tokens = sizes[0] * sizes[1] if operator == operators[0] else sizes[0]
            attention = lookup.get(operator, precision, *heads, *sizes)
            yield [attention, *_linears(lookup, spec, ranks, tokens)]


def _linears(lookup: Lookup, spec: ModelSpec, ranks: int, tokens: int) -> list[Row | None]:
    """The projections of attention (unless measured with it) and the feed-forward part of a layer."""
    dtype = spec.dtype

    def gemm(rows: int, columns: int, precision: str = dtype) -> Row | None:
        return lookup.get("gemm", precision, rows, columns, tokens)

    def gated(width: int) -> list[Row | None]:
        both = gemm(2 * width // ranks, spec.hidden)
        halves = [gemm(width // ranks, spec.hidden)] * 2
        return [*([both] if both else halves), gemm(spec.hidden, width // ranks)]

    if spec.moe is None:
        kv_rows = 2 * max(spec.kv_heads // ranks, 1) * spec.head_dim
        query_rows = spec.heads * spec.head_dim // ranks
        return [
            gemm(query_rows + kv_rows, spec.hidden),
            gemm(spec.hidden, query_rows),
            *gated(spec.intermediate),
        ]
    moe = spec.moe
    routed: Row | None = None
    for precision in lookup.precisions("moe"):
        if routed is None and precision.split("/")[0] == dtype:
            shape = (spec.hidden, moe.width, moe.chosen, moe.experts, ranks, 1)
            routed = lookup.get("moe", precision, *shape, tokens)
    shared = gated(moe.shared * moe.width) if moe.shared else []
    return [routed, gemm(moe.experts, spec.hidden, "bfloat16"), *shared]
