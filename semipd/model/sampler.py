"""From logits to tokens: a pure function of (logits row, rule, tokens so far, seed, position), one row at a
time.

Nothing here depends on the batch, on earlier draws or on the number of threads, so a step can be run again,
or in other company, and gives the same tokens. The order is the field's: repetition penalty, frequency and
presence penalties, biases, bans, masks; then temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from semipd.core.types import NO_TOKEN
from semipd.model.kernels import LANES, Kernels

_MASK = 2**64 - 1
_HEAD = np.float32(1e-5)  # weights from here up (the best has 1) are searched first for a cut
_RULE = np.dtype(
    [("number", "f8"), ("temperature", "f4"), ("top_p", "f4"), ("min_p", "f4"), ("top_k", "i4")]
)  # `DrawRule` of csrc/kernels.h
_BLOCK = 256  # entries whose weights are summed together, so that a draw scans the vocabulary only once


@dataclass(frozen=True)
class Adjustment:
    """What changes the logits of one row; see `core.types.Sampling`.

    seen: int [any], the tokens so far; those from `prompt_length` on were produced. bias_tokens: int [any],
    distinct; bias: float32, what is added to each."""

    seen: np.ndarray
    prompt_length: int
    presence: np.float32
    frequency: np.float32
    repetition: np.float32
    bias_tokens: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class SamplingRows:
    """The rule of each row, arrays of length n. position: of the token being produced.

    ban_tokens: int [n, any], of which the first `ban_count` of a row cannot be produced while
    `position < ban_until`. adjustments: by row, for the rows that have one. masks: by row, bool
    [vocabulary], false where a token may not come, for the rows that are constrained."""

    temperature: np.ndarray
    top_p: np.ndarray
    top_k: np.ndarray
    min_p: np.ndarray
    seed: np.ndarray
    position: np.ndarray
    ban_until: np.ndarray
    ban_count: np.ndarray
    ban_tokens: np.ndarray
    adjustments: Mapping[int, Adjustment] = field(default_factory=dict)
    masks: Mapping[int, np.ndarray] = field(default_factory=dict)


def sample(logits: torch.Tensor, rows: SamplingRows, kernels: Kernels | None = None) -> list[int]:
    """One token per row of logits, float32 [n, vocabulary], which is overwritten where a rule changes it.
    NO_TOKEN for a row whose mask leaves none. With kernels, weights may differ in their last bits, and a
    token where one of them decides.

    Raises FloatingPointError when a row holds NaN, or nothing finite to choose from."""
    values = logits.numpy()
    for row, adjustment in rows.adjustments.items():
        adjust(values[row], adjustment)
    banning = (rows.position < rows.ban_until) & (rows.ban_count > 0)
    for row in np.flatnonzero(banning).tolist():
        values[row, rows.ban_tokens[row, : rows.ban_count[row]]] = -np.inf
    for row, allowed in rows.masks.items():
        np.copyto(values[row], -np.inf, where=~allowed)
    tokens, best = _choose(values, rows) if kernels is None else draw_compiled(kernels, values, rows)
    if rows.masks:
        empty = [row for row in rows.masks if best[row] == -np.inf]
        tokens[empty], best[empty] = NO_TOKEN, 0.0
    bad = np.flatnonzero(~np.isfinite(best))
    if bad.size:
        raise FloatingPointError(
            f"the logits of row {bad[0]} have no finite maximum: {float(best[bad[0]])}"
        )
    chosen: list[int] = tokens.tolist()
    return chosen


def _choose(values: np.ndarray, rows: SamplingRows) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, int64 [n], and the largest value of each row; rows whose largest is not finite get any."""
    tokens = values.argmax(axis=1)  # the first of equals; NaN counts as the largest of all
    best = values[np.arange(len(tokens)), tokens]
    for row in np.flatnonzero((rows.temperature > 0) & np.isfinite(best)).tolist():
        weights = filtered_weights(
            values[row],
            float(rows.temperature[row]),
            int(rows.top_k[row]),
            float(rows.top_p[row]),
            float(rows.min_p[row]),
        )
        tokens[row] = draw(weights, uniform(int(rows.seed[row]), int(rows.position[row])))
    return tokens, best


def draw_compiled(
    kernels: Kernels, values: np.ndarray, rows: SamplingRows
) -> tuple[np.ndarray, np.ndarray]:
    """As `_choose`, a row on each thread (csrc/draw.c)."""
    count, vocabulary = values.shape
    rules = np.zeros(count, _RULE)
    for name in ("temperature", "top_p", "min_p", "top_k"):
        rules[name] = getattr(rows, name)
    numbers = zip(rows.seed.tolist(), rows.position.tolist(), strict=True)
    rules["number"] = [uniform(seed, position) for seed, position in numbers]
    threads = min(torch.get_num_threads(), count)
    scratch = np.empty((threads, -(-vocabulary // LANES) * LANES), np.float32)
    tokens, best = np.empty(count, np.int64), np.empty(count, np.float32)
    pointers = [array.ctypes.data for array in (scratch, tokens, best)]
    size = values.ctypes.data, count, vocabulary
    kernels.library.semipd_draw(kernels.level, *size, rules.ctypes.data, threads, *pointers)
    return tokens, best


def adjust(logits: np.ndarray, rule: Adjustment) -> None:
    """Apply penalties and biases to one row, float32 [vocabulary], in place. Touches the sequence's own
    tokens and the biased ones alone."""
    if rule.repetition != 1.0:
        values = logits[rule.seen]  # a token's every occurrence gets the same value: no need to sort them
        logits[rule.seen] = np.where(values > 0.0, values / rule.repetition, values * rule.repetition)
    if rule.presence or rule.frequency:
        tokens, counts = np.unique(rule.seen[rule.prompt_length :], return_counts=True)
        logits[tokens] -= rule.frequency * counts.astype(np.float32) + rule.presence
    logits[rule.bias_tokens] += rule.bias


def filtered_weights(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> np.ndarray:
    """Unnormalised probabilities of the entries that the filters leave, 0 elsewhere; the best has 1.

    Every filter is a cut-off value, so equal logits stay or go together."""
    weights: np.ndarray = logits - logits.max()
    with np.errstate(over="ignore"):
        weights /= np.float32(max(temperature, 1e-20))
    np.exp(weights, out=weights)
    cut = np.float32(0.0)
    if 0 < top_k < weights.size:
        cut = _top_k_cut(weights, top_k)
    if top_p < 1.0:
        cut = max(cut, _top_p_cut(weights, cut, top_p))
    cut = max(cut, np.float32(min_p))
    if cut > 0.0:
        weights *= weights >= cut
    return weights


def draw(weights: np.ndarray, number: float) -> int:
    """The index whose share of the cumulative weights contains `number`, from [0, 1). Sums are float64."""
    blocks = np.zeros((-(-weights.size // _BLOCK), _BLOCK), np.float32)
    blocks.reshape(-1)[: weights.size] = weights
    totals = np.cumsum(blocks.sum(axis=1, dtype=np.float64))
    target = number * totals[-1]
    block = _first_above(totals, target)
    within = np.cumsum(blocks[block], dtype=np.float64)
    return block * _BLOCK + _first_above(within, target - (totals[block - 1] if block else 0.0))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that (seed, position) alone decides: splitmix64's finaliser, applied to each."""
    bits = _mix((seed & _MASK) + 0x9E3779B97F4A7C15)
    bits = _mix((bits ^ (position & _MASK)) + 0x9E3779B97F4A7C15)
    return (bits >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _first_above(cumulative: np.ndarray, target: float) -> int:
    """The first index whose cumulative value exceeds `target`; rounding aside, else the last that adds."""
    index = int(np.searchsorted(cumulative, target, side="right"))
    return index if index < cumulative.size else int(np.searchsorted(cumulative, cumulative[-1]))


def _top_k_cut(weights: np.ndarray, top_k: int) -> np.float32:
    """The k-th largest weight."""
    head = weights[weights >= _HEAD]
    if head.size < top_k:
        head = weights
    return np.float32(np.partition(head, head.size - top_k)[head.size - top_k])


def _top_p_cut(weights: np.ndarray, cut: np.float32, top_p: float) -> np.float32:
    """The smallest weight kept by top-p among those >= cut: an entry stays while those above it hold less
    than `top_p` of the mass. The largest always stays."""
    among = weights[weights >= cut] if cut > 0.0 else weights
    wanted = top_p * float(among.sum(dtype=np.float64))
    for least in (_HEAD, np.float32(0.0)):
        head = np.sort(among[among >= least])[::-1]
        kept = int(np.searchsorted(np.cumsum(head, dtype=np.float64), wanted, side="left")) + 1
        if kept <= head.size:
            break
    return np.float32(head[min(kept, head.size) - 1])
