"""From logits to tokens: a pure function of (logits row, rule, seed, position), one row at a time.

Nothing here depends on the batch, on earlier draws or on the number of threads, so a step can be run again,
or in other company, and gives the same tokens. Filters come in the order that the field uses: temperature,
top-k, top-p, min-p.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

_MASK = 2**64 - 1
_HEAD_WIDTH = 12.0  # natural-log units below the best logit in which to look for top-k and top-p cuts first


@dataclass(frozen=True)
class SamplingRows:
    """The rule of each row, arrays of length n. position: of the token being produced.

    ban_tokens: int [n, any], of which the first `ban_count` of a row cannot be produced while
    `position < ban_until`."""

    temperature: np.ndarray
    top_p: np.ndarray
    top_k: np.ndarray
    min_p: np.ndarray
    seed: np.ndarray
    position: np.ndarray
    ban_until: np.ndarray
    ban_count: np.ndarray
    ban_tokens: np.ndarray


def sample(logits: torch.Tensor, rows: SamplingRows) -> list[int]:
    """One token per row of logits, float32 [n, vocabulary], which is overwritten where tokens are banned.

    Raises FloatingPointError when a row holds NaN, or nothing finite to choose from."""
    banning = (rows.position < rows.ban_until) & (rows.ban_count > 0)
    for row in np.flatnonzero(banning).tolist():
        banned = rows.ban_tokens[row, : rows.ban_count[row]].astype(np.int64)
        logits[row, torch.from_numpy(banned)] = float("-inf")
    best, tokens = logits.max(dim=-1)  # NaN counts as the largest of all
    bad = np.flatnonzero(~np.isfinite(best.numpy()))
    if bad.size:
        raise FloatingPointError(
            f"the logits of row {bad[0]} have no finite maximum: {float(best[bad[0]])}"
        )
    chosen: list[int] = tokens.tolist()
    for row in np.flatnonzero(rows.temperature > 0).tolist():
        kept, weights = filtered(
            logits[row].numpy(),
            float(best[row]),
            float(rows.temperature[row]),
            int(rows.top_k[row]),
            float(rows.top_p[row]),
            float(rows.min_p[row]),
        )
        chosen[row] = int(kept[_draw(weights, uniform(int(rows.seed[row]), int(rows.position[row])))])
    return chosen


def filtered(
    logits: np.ndarray, best: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, ascending; their weights, float64, the largest 1) that the filters leave. best: max of logits.

    Every filter is a cut-off value, so equal logits stay or go together."""
    scaled = (logits - np.float32(best)) / np.float32(max(temperature, 1e-20))
    cut = np.float32(-np.inf)
    if 0 < top_k < scaled.size:
        cut = _top_k_cut(scaled, top_k)
    if top_p < 1.0:
        cut = max(cut, _top_p_cut(scaled, cut, top_p))
    if min_p > 0.0:
        cut = max(cut, np.float32(np.log(min_p)))
    kept = np.flatnonzero(scaled >= cut) if cut > -np.inf else np.flatnonzero(scaled > -np.inf)
    return kept, np.exp(scaled[kept].astype(np.float64))


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


def _draw(weights: np.ndarray, number: float) -> int:
    """The index whose share of the cumulative weights contains `number`."""
    cumulative = np.cumsum(weights)
    return min(int(np.searchsorted(cumulative, number * cumulative[-1], side="right")), weights.size - 1)


def _top_k_cut(scaled: np.ndarray, top_k: int) -> np.float32:
    """The value of the k-th largest entry."""
    head = scaled[scaled >= -_HEAD_WIDTH]
    if head.size < top_k:
        head = scaled
    return np.float32(np.partition(head, head.size - top_k)[head.size - top_k])


def _top_p_cut(scaled: np.ndarray, cut: np.float32, top_p: float) -> np.float32:
    """The smallest value kept by top-p among the entries >= cut: an entry stays while those above it hold
    less than `top_p` of the mass. The largest always stays."""
    among = scaled[scaled >= cut] if cut > -np.inf else scaled
    total = float(np.exp(among).sum(dtype=np.float64))
    for width in (_HEAD_WIDTH, np.inf):
        head = np.sort(among[among >= -width])[::-1]
        above = np.cumsum(np.exp(head.astype(np.float64)))
        kept = int(np.searchsorted(above, top_p * total, side="left")) + 1
        if kept <= head.size:
            break
    return np.float32(head[max(1, min(kept, head.size)) - 1])
