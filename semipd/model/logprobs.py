"""How likely a model held a token, and which it held likeliest: log-softmax of raw logits, row by row.

A row's numbers depend on that row alone, so they survive another batch and a step that runs again. The
token's and those of the best come out of one array: the best token's is the largest bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_BLOCK = 256  # entries of which the largest is found first

Chances = tuple[float, tuple[int, ...], tuple[float, ...]]


def chances(logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[Chances]:
    """For each row of logits, float32 [n, vocabulary]: the log probability of its token, and ids and log
    probabilities of its `counts[i]` best, best first (no more than the vocabulary has). Natural logarithms,
    float32.

    Raises FloatingPointError when a row holds NaN, or no finite maximum."""
    return [_row(row, *rest) for row, *rest in zip(logits, tokens, counts, strict=True)]


def _row(logits: torch.Tensor, token: int, count: int) -> Chances:
    values = logits.numpy()
    most = values.max()
    if not np.isfinite(most):
        raise FloatingPointError(f"the logits have no finite maximum: {most}")
    whole = most + np.log(np.exp(values - most).sum())
    best = _best(values, count)
    chosen = (values[np.append(best, token)] - whole).tolist()
    return chosen[-1], tuple(best.tolist()), tuple(chosen[:-1])


def _best(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest, largest first, the first of equals first."""
    blocks = values.size // _BLOCK
    if not count:
        return np.empty(0, np.int64)
    candidates = np.arange(values.size)
    if count <= blocks:  # so many blocks have an entry of at least this, so no smaller one counts
        tops = torch.from_numpy(values[: blocks * _BLOCK]).view(blocks, _BLOCK).amax(dim=1).numpy()
        candidates = np.flatnonzero(values >= np.partition(tops, blocks - count)[blocks - count])
    return candidates[np.argsort(-values[candidates], kind="stable")[:count]]
