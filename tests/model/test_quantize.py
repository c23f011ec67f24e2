"""Weights in 4 and 8 bits: kernels against their definition, and checkpoints in the formats people have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from safetensors.torch import load_file, save_file

from semipd.core.errors import ConfigError
from semipd.core.types import Slice
from semipd.model.dense import load_model
from semipd.model.kernels import AMX, AVX512_VNNI, Kernels, load_kernels
from semipd.model.layers import PLAIN, PlainGated, PlainLinear
from semipd.model.quantize import (
    Quantized,
    QuantizedGated,
    QuantizedLinear,
    multiply_plainly,
    quantize,
    quantized_kind,
    stack,
)
from tests.checkpoints import make_checkpoint
from tests.model.stepping import Bench

BEST = load_kernels()
kernels_needed = pytest.mark.skipif(
    BEST is None or BEST.level < AVX512_VNNI, reason="needs compiled kernels and AVX512-VNNI"
)


def levels() -> list[Kernels]:
    found = [load_kernels(level) for level in (AVX512_VNNI, AMX)]
    wanted = (AVX512_VNNI, AMX)
    return [k for level, k in zip(wanted, found, strict=True) if k is not None and k.level == level]


def random_matrix(outputs: int, inputs: int, bits: int, group: int, zeros: bool) -> Quantized:
    generator = torch.Generator().manual_seed(outputs + inputs)
    shape = (outputs, inputs // group)
    values = torch.randint(0, 2**bits, (outputs, inputs), generator=generator).to(torch.uint8)
    zero = (
        torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8) if zeros else 2 ** (bits - 1)
    )
    scale = (torch.rand(shape, generator=generator) + 0.1) / (2**bits * inputs**0.5)
    return Quantized(bits, values, scale, zero)


CASES = [  # outputs, inputs, bits, group, zeros
    (64, 128, 4, 32, False),
    (40, 192, 4, 96, True),
    (100, 512, 4, 128, True),
    (33, 320, 8, 320, False),
    (32, 72, 8, 72, False),
    (70, 256, 8, 64, True),
    (5, 1056, 4, 1056, False),
]


@pytest.mark.parametrize("kernels", levels(), ids=lambda kernels: f"level{kernels.level}")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_with_quantised_weights(kernels: Kernels, case: tuple[Any, ...]) -> None:
    gate, up = random_matrix(*case), random_matrix(*case)
    bias = torch.randn(case[0], generator=torch.Generator().manual_seed(0)).bfloat16()
    linear, bare = QuantizedLinear(kernels, gate, bias), QuantizedLinear(kernels, gate, None)
    gated = QuantizedGated(kernels, gate, bias, up, bias)
    for rows in (1, 2, 7, 8, 9, 16, 17, 33, 300):
        x = torch.randn(rows, case[1], generator=torch.Generator().manual_seed(rows)).bfloat16()
        exact, close = multiply_plainly(x, gate, bias), {"rtol": 2**-7, "atol": 0.02}
        torch.testing.assert_close(linear(x).double(), exact, **close)
        torch.testing.assert_close(bare(x).double(), multiply_plainly(x, gate, None), **close)
        product = functional.silu(exact) * multiply_plainly(x, up, bias)
        torch.testing.assert_close(gated(x).double(), product, rtol=2**-6, atol=0.05)


@kernels_needed
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_has_the_same_bits_in_any_company_and_with_or_without_tiles(case: tuple[Any, ...]) -> None:
    layers = [QuantizedLinear(kernels, random_matrix(*case), None) for kernels in levels()]
    x = torch.randn(70, case[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    x[3] = 0.0
    whole = layers[0](x)
    for layer in layers:
        for rows in (1, 8, 9, 32, 33, 70):
            assert torch.equal(layer(x[:rows]), whole[:rows])
    torch.set_num_threads(2)
    assert torch.equal(layers[-1](x), whole)


@pytest.mark.parametrize(("method", "error"), [("int8", 0.012), ("int4", 0.1)])
def test_rounding_a_matrix(method: str, error: float) -> None:
    weight = torch.randn(48, 320, generator=torch.Generator().manual_seed(2))
    weight[5] = 0.0
    rounded = quantize(weight, method)
    assert float((rounded.plain() - weight).norm() / weight.norm()) < error
    assert int(rounded.values.max()) < 2**rounded.bits
    assert torch.equal(rounded.plain()[5], weight[5])
    assert torch.equal(quantize(rounded.plain(), method).plain(), rounded.plain())  # nothing more is lost


def test_matrices_that_are_not_quantised_alike_become_plain() -> None:
    first, second = random_matrix(8, 64, 4, 32, True), random_matrix(8, 64, 4, 32, False)
    together = stack([first, second], torch.float32)
    assert isinstance(together, Quantized)
    assert torch.equal(together.plain(), torch.cat((first.plain(), second.plain())))
    mixed = stack([first, random_matrix(8, 64, 8, 64, False)], torch.float32)
    assert isinstance(mixed, torch.Tensor) and mixed.shape == (16, 64)


def test_without_kernels_the_meant_matrix_is_used() -> None:
    matrix, x = random_matrix(32, 64, 4, 32, True), torch.randn(3, 64)
    for kernels, dtype in ((None, torch.float32), (BEST, torch.float32), (None, torch.bfloat16)):
        kind = quantized_kind(kernels, dtype, "none", PLAIN)
        linear, gated = kind.linear(matrix, None), kind.gated(matrix, None, matrix, None)
        meant = matrix.plain(dtype)
        assert torch.equal(linear(x.to(dtype)), PlainLinear(meant, None)(x.to(dtype)))
        assert torch.equal(gated(x.to(dtype)), PlainGated(meant, None, meant, None)(x.to(dtype)))


# -- checkpoints -----------------------------------------------------------------------------------------


def pack(values: torch.Tensor, bits: int, along: int) -> torch.Tensor:
    """Eight (or four) numbers to an int32, the first in the lowest bits."""
    each = 32 // bits
    parts = values.long().unflatten(along, (-1, each))
    shifts = torch.arange(0, 32, bits)
    shifts = shifts.view(-1, *([1] * (parts.dim() - along - 2)))
    packed = (parts << shifts).sum(along + 1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def gptq(matrix: Quantized, order: torch.Tensor | None = None, version: int = 1) -> dict[str, torch.Tensor]:
    zero = (
        matrix.zero if isinstance(matrix.zero, torch.Tensor) else torch.full_like(matrix.scale, matrix.zero)
    )
    inputs = matrix.shape[1]
    return {
        "qweight": pack(matrix.values.T.contiguous(), matrix.bits, 0),
        "qzeros": pack((zero.T.long() - (1 if version == 1 else 0)) % 2**matrix.bits, matrix.bits, 1),
        "scales": matrix.scale.T.half().contiguous(),
        "g_idx": (torch.arange(inputs) // matrix.group if order is None else order).to(torch.int32),
    }


def awq(matrix: Quantized) -> dict[str, torch.Tensor]:
    def reorder(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (-1, 8))[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1)

    assert isinstance(matrix.zero, torch.Tensor)
    return {
        "qweight": pack(reorder(matrix.values.T), 4, 1),
        "qzeros": pack(reorder(matrix.zero.T), 4, 1),
        "scales": matrix.scale.T.half().contiguous(),
    }


def compressed(matrix: Quantized) -> dict[str, torch.Tensor]:
    if matrix.bits == 8 and isinstance(matrix.zero, int):
        return {
            "weight": (matrix.values.to(torch.int16) - 128).to(torch.int8),
            "weight_scale": matrix.scale.bfloat16(),
        }
    tensors = {
        "weight_packed": pack(matrix.values, matrix.bits, 1),
        "weight_scale": matrix.scale.bfloat16(),
        "weight_shape": torch.tensor(matrix.shape),
    }
    if isinstance(matrix.zero, torch.Tensor):
        tensors["weight_zero_point"] = pack(matrix.zero, matrix.bits, 0)
    return tensors


def compressed_config(bits: int, group: int, symmetric: bool, layout: str) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


FORMATS: dict[str, tuple[Any, int, int, bool, dict[str, Any]]] = {  # writer, bits, group, zeros, config
    "gptq": (gptq, 4, 32, True, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}),
    "gptq-8": (gptq, 8, 0, True, {"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True}),
    "awq": (
        awq,
        4,
        32,
        True,
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    ),
    "compressed-4": (compressed, 4, 32, False, compressed_config(4, 32, True, "pack-quantized")),
    "compressed-4-zeros": (compressed, 4, 32, True, compressed_config(4, 32, False, "pack-quantized")),
    "compressed-8": (compressed, 8, 0, False, compressed_config(8, 0, True, "int-quantized")),
}


def quantised_pair(folder: Path, name: str, **changes: Any) -> tuple[Path, Path]:
    """The same model twice: quantised in this format, and expanded to float32."""
    writer, bits, group, zeros, config = FORMATS[name]
    plain = make_checkpoint(
        folder / "plain", "qwen2", hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16
    )
    packed = make_checkpoint(
        folder / "packed", "qwen2", hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16
    )
    tensors, stored = load_file(plain / "model.safetensors"), {}
    for key, tensor in list(tensors.items()):
        if "_proj.weight" not in key:
            stored[key] = tensor
            continue
        matrix = random_matrix(*tensor.shape, bits, group or tensor.shape[1], zeros)
        scale = (matrix.scale * 4).half().bfloat16().float()  # a number in either 16 bit form
        matrix = Quantized(bits, matrix.values, scale, matrix.zero)
        parts = writer(matrix)
        stored |= {key.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
        tensors[key] = matrix.plain()
        if name == "gptq" and key.endswith("o_proj.weight"):  # a tool that writes biases of zeros
            stored[key.removesuffix("weight") + "bias"] = torch.zeros(tensor.shape[0])
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, packed / "model.safetensors", {"format": "pt"})
    settings = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(settings | {"quantization_config": config | changes}))
    return packed, plain


def logits(folder: Path, **options: Any) -> torch.Tensor:
    bench = Bench(load_model(folder, **options))
    tokens = np.random.default_rng(0).integers(0, 320, 40).tolist()
    rows = []
    for start, count in ((0, 30), (30, 1), (31, 1)):
        bench.open(0, tokens)
        bench.run(Slice(0, start, count))
        rows.append(bench.recorder.logits)
    return torch.cat(rows)


@pytest.mark.parametrize("name", list(FORMATS))
def test_quantised_checkpoints_mean_what_they_say(name: str, tmp_path: Path) -> None:
    packed, plain = quantised_pair(tmp_path, name)
    exact = logits(plain, dtype="float32")
    torch.testing.assert_close(logits(packed, dtype="float32"), exact, rtol=1e-4, atol=1e-4)
    rounded = logits(packed, dtype="bfloat16")
    assert float((rounded - exact).norm() / exact.norm()) < 0.06


def test_the_second_gptq_format_stores_zeros_themselves(tmp_path: Path) -> None:
    packed, plain = quantised_pair(tmp_path, "gptq", checkpoint_format="gptq_v2")
    wrong = logits(packed, dtype="float32") - logits(plain, dtype="float32")
    assert float(wrong.abs().max()) > 0.01  # these were written in the first format


def test_scattered_groups_are_expanded(tmp_path: Path) -> None:
    packed, plain = quantised_pair(tmp_path, "gptq")
    stored, tensors = load_file(packed / "model.safetensors"), load_file(plain / "model.safetensors")
    key = "model.layers.1.mlp.down_proj."
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1)) // 32
    matrix = random_matrix(64, 96, 4, 32, True)
    assert isinstance(matrix.zero, torch.Tensor)
    zero, scale = matrix.zero, matrix.scale.half().float()
    matrix = Quantized(4, matrix.values, scale, zero)
    stored |= {key + part: value for part, value in gptq(matrix, order).items()}
    tensors[key + "weight"] = (matrix.values.float() - zero[:, order].float()) * scale[:, order]
    save_file(stored, packed / "model.safetensors", {"format": "pt"})
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(
        logits(packed, dtype="float32"), logits(plain, dtype="float32"), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gptq", {"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ("gptq", {"bits": 3}, "3 bits"),
        ("gptq", {"group_size": None}, "quantization_config"),
        ("gptq", {"group_size": 48}, "do not divide"),
        ("gptq", {"group_size": 16}, "qzeros"),
        ("awq", {"version": "gemv"}, "gemm"),
        ("compressed-8", {"format": "float-quantized"}, "float-quantized"),
        ("compressed-8", {"config_groups": {}}, "quantization_config"),
    ],
)
def test_what_cannot_be_read_is_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    packed, _ = quantised_pair(tmp_path, name, **changes)
    with pytest.raises(ConfigError, match=message):
        load_model(packed)


def test_a_quantised_checkpoint_is_not_quantised_again(tmp_path: Path) -> None:
    packed, _ = quantised_pair(tmp_path, "awq")
    with pytest.raises(ConfigError, match="already"):
        load_model(packed, quantization="int8")


@pytest.mark.parametrize(("method", "error"), [("int8", 0.05), ("int4", 0.6)])
@pytest.mark.parametrize("head", [False, True])
def test_a_model_rounded_when_loaded(method: str, error: float, head: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3", hidden_size=64, intermediate_size=96)
    exact = logits(folder, dtype="float32")
    for dtype in ("float32", "bfloat16"):
        rounded = logits(folder, dtype=dtype, quantization=method, quantize_head=head)
        assert 0 < float((rounded - exact).norm() / exact.norm()) < error
