"""Rotary position embeddings: frequencies of each kind, tables for a step, rotation in place."""

from __future__ import annotations

import math

import torch

from semipd.model.spec import ModelSpec, RopeScaling


def rope_frequencies(spec: ModelSpec) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair, float32 [head_dim / 2], and what cos and sin are multiplied by."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    plain = 1.0 / (spec.rope_theta**exponents)
    scaling = spec.rope_scaling
    match scaling.kind:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / scaling.factor, 1.0
        case "llama3":
            return _llama3(plain, scaling), 1.0
        case "yarn":
            return _yarn(plain, scaling, spec.rope_theta), _yarn_attention_factor(scaling)
        case kind:
            raise ValueError(f"unknown rope kind {kind!r}")


def rope_tables(
    positions: torch.Tensor, frequencies: torch.Tensor, factor: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, signed sin) for positions [T], each [T, 1, head_dim] in `dtype`, for `rotate`.

    Angles are float32 products, as the field's checkpoints were trained with. Their cosines are taken in
    float64: a vectorised float32 cosine differs in its last bit between a vector's lanes and its tail, so a
    row's table would depend on the row's place in the batch.
    """
    angles = (positions[:, None].float() * frequencies).double()
    cosine, sine = angles.cos().mul_(factor), angles.sin().mul_(factor)
    cosine = torch.cat((cosine, cosine), dim=-1)
    sine = torch.cat((-sine, sine), dim=-1)
    return cosine.to(dtype)[:, None], sine.to(dtype)[:, None]


def rotate(x: torch.Tensor, cosine: torch.Tensor, signed_sine: torch.Tensor) -> None:
    """Turn each pair (i, i + head_dim / 2) of x [T, heads, head_dim] by its position's angle, in place."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    x.mul_(cosine).addcmul_(swapped, signed_sine)


def _llama3(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, those between interpolated."""
    turns = scaling.original_positions * plain / (2 * math.pi)  # full turns over the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return kept * plain + (1.0 - kept) * plain / scaling.factor


def _yarn(plain: torch.Tensor, scaling: RopeScaling, theta: float) -> torch.Tensor:
    """YaRN (Peng et al. 2023), "NTK by parts": as above, with the ramp over the index of the pair."""
    pairs = plain.numel()

    def index(turns: float) -> float:
        """The (fractional) pair that makes this many turns over the original context."""
        return pairs * math.log(scaling.original_positions / (turns * 2 * math.pi)) / math.log(theta)

    low, high = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    if low == high:
        high += 0.001
    stretched = ((torch.arange(pairs, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return stretched * plain / scaling.factor + (1.0 - stretched) * plain


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def magnitude(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)
