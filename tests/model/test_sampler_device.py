"""The device's sampler against the CPU's: one rule, two implementations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from semipd.model.sampler import SamplingRows, sample, uniform
from semipd.model.sampler_device import INVALID, DeviceMasks, DeviceRules, greedy, sample_on_device
from semipd.model.sampler_device import uniform as device_uniform
from tests.model.conftest import one_thread  # noqa: F401  (a fixture)


def rules(rows: int, **given: Any) -> tuple[SamplingRows, DeviceRules]:
    """The same rules for both; `given` overrides fields for all rows."""
    values: dict[str, Any] = {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "ban_until": 0, "banned": (), **given
    }  # fmt: skip
    banned = np.zeros((rows, 8), np.int64)
    banned[:, : len(values["banned"])] = values["banned"]
    if values["banned"]:
        banned[:, len(values["banned"]) :] = values["banned"][0]
    seed = np.arange(rows, dtype=np.int64) * 7919 - 3
    position = np.arange(rows, dtype=np.int64) + 11
    one = SamplingRows(
        temperature=np.full(rows, values["temperature"], np.float32),
        top_p=np.full(rows, values["top_p"], np.float32),
        top_k=np.full(rows, values["top_k"], np.int32),
        min_p=np.full(rows, values["min_p"], np.float32),
        seed=seed,
        position=position,
        ban_until=np.full(rows, values["ban_until"]),
        ban_count=np.full(rows, len(values["banned"])),
        ban_tokens=banned,
    )
    other = DeviceRules(
        *(torch.from_numpy(array) for array in (one.temperature, one.top_p, one.min_p)),
        torch.from_numpy(one.top_k.astype(np.int64)),
        torch.from_numpy(seed),
        torch.from_numpy(position),
        torch.from_numpy(banned),
        torch.from_numpy((one.position < one.ban_until) & (one.ban_count > 0)),
        filtered=values["top_p"] < 1 or values["top_k"] > 0,
    )
    return one, other


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 5},
        {"top_p": 0.5},
        {"top_p": 1e-6},
        {"min_p": 0.3},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
        {"banned": (3, 7, 100), "ban_until": 10**6, "temperature": 0.0},
        {"banned": (3, 7, 100), "ban_until": 14},
    ],
    ids=str,
)
def test_both_samplers_choose_the_same_tokens(given: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(64, 1000, generator=generator) * 3
    logits[:, 3] += 8  # what is banned would win
    one, other = rules(64, **given)
    assert sample_on_device(logits.clone(), other).tolist() == sample(logits.clone(), one)


@pytest.mark.parametrize("vocabulary", [1000, 1024, 1025])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_both_samplers_apply_the_same_masks(vocabulary: int, temperature: float) -> None:
    """Bits that do not fill the last word, whole words ruled out, and a row that has nothing left."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(16, vocabulary, generator=generator) * 3
    chosen = (2, 3, 5, 15)
    bits = (torch.rand(4, vocabulary, generator=generator) < 0.2).numpy()
    bits[1, 64:], bits[2] = False, False
    words = np.zeros((4, -(-vocabulary // 64) * 8), np.uint8)
    packed = np.packbits(bits, axis=1, bitorder="little")
    words[:, : packed.shape[1]] = packed
    one, other = rules(16, temperature=temperature)
    masks = DeviceMasks(torch.tensor(chosen), torch.from_numpy(words.view(np.int64)))
    found = sample_on_device(logits.clone(), replace(other, masks=masks)).tolist()
    assert found == sample(logits.clone(), replace(one, masks=dict(zip(chosen, bits, strict=True))))
    assert found[5] == INVALID and found[3] < 64 and bits[0, found[2]]


def test_the_number_of_a_seed_and_position_is_the_same() -> None:
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)])
    positions = torch.tensor([0, 5, 131071, 1, 2])
    expected = [uniform(int(seed), int(at)) for seed, at in zip(seeds, positions, strict=True)]
    assert device_uniform(seeds, positions).tolist() == expected


def test_rows_without_a_finite_best_are_invalid() -> None:
    """The host sees it and fails the batch; nothing on the device asserts."""
    logits = torch.zeros(4, 10)
    logits[1, 4] = float("nan")
    logits[2] = float("-inf")
    logits[3, 2] = float("inf")
    assert greedy(logits).tolist() == [0, INVALID, INVALID, INVALID]
    _, device = rules(4)
    assert [token == INVALID for token in sample_on_device(logits, device).tolist()] == [
        False,
        True,
        True,
        True,
    ]
