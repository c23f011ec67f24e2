"""From logits to tokens on an asynchronous device: the rule of `sampler`, without a read-back.

Same penalties and filters, same order, same counter-based number per (seed, position), so a step can be run
again. Sums run over other shapes than in numpy: where a drawn number falls within rounding of a boundary,
the two may differ. `torch.where` with a number is avoided: it may copy the number to the device and wait
for it, which a captured graph cannot contain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as functional

from semipd.core.types import NO_TOKEN

INVALID = NO_TOKEN  # the token of a row whose logits have no finite maximum
_BLOCK = 256  # entries whose weights are summed together, as in `sampler.draw`


@dataclass(frozen=True)
class DeviceAdjustments:
    """What changes the logits of m of the rows, on the device; as `sampler.Adjustment`. rows: int64 [m],
    which. seen: int32 [m, longest], of which the first `known` of a row are its tokens so far and those
    from `prompt` on were produced; both int64 [m]. presence, frequency, repetition: float32 [m].
    bias_tokens, bias: int64 and float32 [m, any], filled up with zeros of any token."""

    rows: torch.Tensor
    seen: torch.Tensor
    known: torch.Tensor
    prompt: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    repetition: torch.Tensor
    bias_tokens: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class DeviceMasks:
    """Tokens that may come in m of the rows, on the device. rows: int64 [m]. words: int64 [m, any], bits,
    token 0 the lowest of the first."""

    rows: torch.Tensor
    words: torch.Tensor


@dataclass(frozen=True)
class DeviceRules:
    """The rules of n rows, on the device. temperature, top_p, min_p: float32; top_k, seed, position: int64;
    banned: int64 [n, any], ids that cannot be produced, each row filled up with one of its own; banning:
    bool [n]. filtered: whether any row has a top-k or top-p, which costs a sort."""

    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    seed: torch.Tensor
    position: torch.Tensor
    banned: torch.Tensor
    banning: torch.Tensor
    filtered: bool
    adjustments: DeviceAdjustments | None = None
    masks: DeviceMasks | None = None


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The first best entry of each row [n, vocabulary], or INVALID; int64 [n]. NaN counts as the best."""
    index = logits.argmax(dim=1)
    best = logits.gather(1, index[:, None])[:, 0]
    return index.masked_fill(~best.isfinite(), INVALID)


def sample_on_device(logits: torch.Tensor, rules: DeviceRules) -> torch.Tensor:
    """One token per row of logits [n, vocabulary], int64 [n]; INVALID as for `greedy`. Rows of temperature
    0 are greedy. logits may be overwritten."""
    logits = logits.float()
    if rules.adjustments is not None:
        adjust_on_device(logits, rules.adjustments)
    held = logits.gather(1, rules.banned)
    logits.scatter_(1, rules.banned, held.masked_fill(rules.banning[:, None], float("-inf")))
    if rules.masks is not None:
        mask_on_device(logits, rules.masks)
    best = greedy(logits)
    weights = _filtered_weights(logits, rules)
    drawn = _draw(weights, uniform(rules.seed, rules.position))
    return torch.where((rules.temperature > 0) & (best != INVALID), drawn, best)


def adjust_on_device(logits: torch.Tensor, rule: DeviceAdjustments) -> None:
    """Apply penalties and biases to some rows of logits, float32 [n, vocabulary], in place."""
    values = logits.index_select(0, rule.rows)
    place = torch.arange(rule.seen.shape[1], device=logits.device)
    occurs = place < rule.known[:, None]
    tokens = rule.seen.long() * occurs  # what lies beyond is of another sequence
    counts = torch.zeros(values.shape, dtype=torch.int32, device=logits.device)
    counts.scatter_add_(1, tokens, occurs.int())
    repetition = rule.repetition[:, None]
    changed = torch.where(values > 0.0, values / repetition, values * repetition)
    values = torch.where(counts > 0, changed, values)
    produced = occurs & (place >= rule.prompt[:, None])
    counts.zero_().scatter_add_(1, tokens, produced.int())
    values -= rule.frequency[:, None] * counts + rule.presence[:, None] * (counts > 0)
    values.scatter_add_(1, rule.bias_tokens, rule.bias)
    logits.index_copy_(0, rule.rows, values)


def mask_on_device(logits: torch.Tensor, masks: DeviceMasks) -> None:
    """Rule out tokens in some rows of logits, float32 [n, vocabulary], in place."""
    bits = torch.arange(8, dtype=torch.uint8, device=logits.device)
    octets = masks.words.view(torch.uint8)[:, :, None]
    ruled_out = (octets.bitwise_right_shift(bits).bitwise_and_(1) == 0).flatten(1)[:, : logits.shape[1]]
    values = logits.index_select(0, masks.rows).masked_fill_(ruled_out, float("-inf"))
    logits.index_copy_(0, masks.rows, values)


def chances_on_device(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """As `logprobs.chances`, with `count` of the best for every row: float64 [n, 1 + 2 * count], the log
    probability of each row's token, those of the best, and their ids. tokens: int64 [n]; INVALID counts
    as 0. NaN where a row has no finite maximum."""
    values = logits.float()
    best = values.topk(min(count, values.shape[1]), dim=1)
    chosen = torch.cat((values.gather(1, tokens.clamp_min(0)[:, None]), best.values), dim=1)
    chosen = chosen - values.logsumexp(dim=1, keepdim=True)
    return torch.cat((chosen.double(), best.indices.double()), dim=1)


def uniform(seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """float64 [n] in [0, 1) from int64 [n]: as `sampler.uniform`, in wrapping 64-bit arithmetic."""
    bits = _mix(seed + _signed(0x9E3779B97F4A7C15))
    bits = _mix((bits ^ position) + _signed(0x9E3779B97F4A7C15))
    return _shifted(bits, 11).double() * 2.0**-53


def _filtered_weights(logits: torch.Tensor, rules: DeviceRules) -> torch.Tensor:
    """Unnormalised probabilities of what the filters leave; the best entry has 1."""
    cold = rules.temperature.clamp_min(1e-20)[:, None]
    weights = ((logits - logits.amax(dim=1, keepdim=True)) / cold).exp_()
    weights.nan_to_num_(nan=0.0)  # an index computed from NaN would be out of range, and end the context
    cut = rules.min_p
    if rules.filtered:
        cut = torch.maximum(cut, _cuts(weights, rules))
    return weights * (weights >= cut[:, None])


def _cuts(weights: torch.Tensor, rules: DeviceRules) -> torch.Tensor:
    """The smallest weight that top-k and top-p leave in each row; 0 where neither is set."""
    ordered = weights.sort(dim=1, descending=True).values
    size = ordered.shape[1]
    unlimited = (rules.top_k < 1) | (rules.top_k >= size)
    limit = rules.top_k.masked_fill(unlimited, size)
    cut = ordered.gather(1, (limit - 1)[:, None])[:, 0].masked_fill(unlimited, 0.0)
    among = ordered * (ordered >= cut[:, None])
    cumulative = among.double().cumsum(dim=1)
    wanted = rules.top_p.double()[:, None] * cumulative[:, -1:]
    kept = torch.searchsorted(cumulative, wanted, right=False)
    kept = torch.minimum(kept[:, 0], (among > 0).sum(dim=1) - 1)[:, None]
    nucleus = among.gather(1, kept.clamp_min(0))[:, 0].masked_fill(rules.top_p >= 1.0, 0.0)
    return torch.maximum(cut, nucleus)


def _draw(weights: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """The index whose share of each row's cumulative weights contains its number; int64 [n]."""
    rows, size = weights.shape
    blocks = functional.pad(weights, (0, -size % _BLOCK)).view(rows, -1, _BLOCK)
    totals = blocks.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    target = number[:, None] * totals[:, -1:]
    block = _first_above(totals, target)
    before = totals.gather(1, (block - 1).clamp_min(0)).masked_fill(block == 0, 0.0)
    chosen = blocks.gather(1, block[:, :, None].expand(rows, 1, _BLOCK))[:, 0]
    within = _first_above(chosen.double().cumsum(dim=1), target - before)
    return (block * _BLOCK + within)[:, 0]


def _first_above(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first index of each row whose value exceeds its target; rounding aside, the last that adds."""
    above = torch.searchsorted(cumulative, target, right=True)
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous(), right=False)
    return torch.minimum(above, last)


def _mix(value: torch.Tensor) -> torch.Tensor:
    value = (value ^ _shifted(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shifted(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shifted(value, 31)


def _shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right, zeros coming in."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
