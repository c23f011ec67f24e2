from __future__ import annotations

import logging

import pytest
import torch

from semipd.model import layers
from semipd.model.layers import PACKED, PLAIN, choose_kind, padded_rows, rms_norm


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if choose_kind(request.param) is not PACKED:
        pytest.skip("this torch has no packed linears")
    return request.param


@pytest.mark.parametrize("biased", [True, False])
def test_packed_linears_agree_with_plain_ones(dtype: torch.dtype, biased: bool) -> None:
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    weight, bias = random(72, 40, dtype=dtype, scale=0.2), random(72, dtype=dtype) if biased else None
    other, second = (
        random(72, 41, dtype=dtype, scale=0.2)[:, :40],
        random(72, dtype=dtype) if biased else None,
    )
    for rows in (1, 4, 33):
        x = random(rows, 40, dtype=dtype)
        torch.testing.assert_close(PACKED.linear(weight, bias)(x), PLAIN.linear(weight, bias)(x), **close)
        torch.testing.assert_close(
            PACKED.gated(weight, bias, other.contiguous(), second)(x),
            PLAIN.gated(weight, bias, other.contiguous(), second)(x),
            **close,
        )


@pytest.mark.parametrize("inputs", [40, 896, 4864])
def test_a_row_has_the_same_bits_whatever_shares_the_call(dtype: torch.dtype, inputs: int) -> None:
    """Rule 3 of DESIGN.md. With AMX, bfloat16 rows may differ between calls of up to 32 rows and longer
    ones, see layers.py; decode steps are the former."""
    outputs = 160
    weight, up = random(outputs, inputs, dtype=dtype, scale=0.05), random(outputs, inputs + 1, dtype=dtype)
    linear = PACKED.linear(weight, None)
    gated = PACKED.gated(weight, None, up[:, :inputs].contiguous(), None)
    most = 200 if dtype == torch.float32 else 32
    x = random(most, inputs, dtype=dtype)
    for compute in (linear, gated):
        whole = compute(x)
        for rows in sorted(
            {padded_rows(n, dtype) for n in (1, 2, 3, 4, 5, 8, 13, 31, 32, 70, 200) if n <= most}
        ):
            if rows <= most:
                assert torch.equal(compute(x[:rows].clone()), whole[:rows]), rows
                shifted = compute(x[most - rows :].clone())
                assert torch.equal(shifted, whole[most - rows :]), rows


def test_threads_do_not_change_bits(dtype: torch.dtype) -> None:
    """A worker is resized between two layers; its tokens must not change."""
    compute = PACKED.linear(random(320, 896, dtype=dtype), None)
    x = random(32, 896, dtype=dtype)
    one = compute(x)
    torch.set_num_threads(2)
    assert torch.equal(compute(x), one)


def test_row_counts_are_few_and_enough() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        padded = [padded_rows(rows, dtype) for rows in range(1, 1025)]
        assert all(have >= rows for rows, have in enumerate(padded, 1))
        assert len(set(padded)) < 80
        assert max(have - rows for rows, have in enumerate(padded, 1)) < 16
    assert padded_rows(1, torch.float32) > 1  # a single float32 row takes another kernel
    assert padded_rows(1, torch.bfloat16) == 1


def test_a_torch_without_the_private_operators_gets_plain_linears(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Gone:
        def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
            raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")

    monkeypatch.setattr(layers, "PackedLinear", Gone)
    with caplog.at_level(logging.INFO):
        assert choose_kind(torch.float32) is PLAIN
    assert "plain" in caplog.text


def test_wrong_results_get_plain_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    """A private operator may change its meaning in a later torch."""

    class Off(layers.PlainLinear):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return super().__call__(x) * 1.01

    monkeypatch.setattr(layers, "PackedLinear", Off)
    assert choose_kind(torch.float32) is PLAIN


def test_the_norm_is_the_usual_one(dtype: torch.dtype) -> None:
    x, weight = random(5, 48, dtype=dtype), random(48, dtype=dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), exact.to(dtype))
