"""Compile every kernel for Hopper, which needs no GPU, and print what each takes: one JSON line a kernel.

Run in a process of its own: the tests' process has Triton in its interpreter.
"""

from __future__ import annotations

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from semipd.execute.smid import smid_kernel
from semipd.model import attention_triton as attention
from semipd.model import layers_triton as layers

HOPPER = GPUTarget("cuda", 90, 32)
WHOLE = {"table_stride": "i32", "half_stride": "i64", "block_stride": "i32", "token_stride": "i32"}
POINTERS = {
    "tables": "*i32", "tokens": "*i32", "tiles": "*i64", "singles": "*i64", "row_slots": "*i64",
    "positions": "*i64", "sums": "*fp32", "totals": "*fp32", "maxima": "*fp32",
}  # fmt: skip
TYPES = {**WHOLE, **POINTERS, "scale": "fp32", "eps": "fp32", "window": "i32"}
SHAPE = {"QUERY": 32, "KV": 8, "DIM": 128, "DIM_BLOCK": 128, "BLOCK_SIZE": 16, "CAST": False}


def compile_one(kernel: Any, dtype: str, constants: dict[str, Any], **options: int) -> dict[str, Any]:
    """Compile with the alignment that a launch would see; pointers without a type of their own hold
    activations."""
    names = kernel.arg_names
    types = {name: TYPES.get(name, f"*{dtype}") for name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {"half_stride", "block_stride"}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in aligned
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    made = triton.compile(source, target=HOPPER, options=options)
    return {
        "kernel": kernel.__name__,
        "shared": made.metadata.shared,
        "wgmma": "wgmma.mma_async" in made.asm["ptx"],
        "tensor_cores": "mma" in made.asm["ptx"],
        "asynchronous": "cp.async" in made.asm["ptx"],
    }


def main() -> None:
    tile = {**SHAPE, "BLOCK_M": 128, "BLOCK_N": 64, "WINDOWED": False}
    report(compile_one(attention.prefill_kernel, "bf16", tile, num_warps=8, num_stages=2))
    part = {**SHAPE, "GROUP_BLOCK": 16, "BLOCK_N": 64, "SPLITS": 4, "WINDOWED": True}
    report(compile_one(attention.decode_kernel, "bf16", part, num_warps=4, num_stages=3))
    reduce = {"QUERY": 32, "DIM": 128, "DIM_BLOCK": 128, "SPLITS": 8}
    report(compile_one(attention.reduce_kernel, "bf16", reduce, num_warps=4))
    for add in (False, True):
        norm = {"WIDTH": 4096, "BLOCK": 4096, "ADD": add}
        report(compile_one(layers.norm_kernel, "bf16", norm, num_warps=8))
    rotate = {"QUERY": 32, "KV": 8, "DIM": 128, "HALF_BLOCK": 64, "HEADS": 8, "BLOCK_SIZE": 16}
    report(compile_one(layers.rotate_and_store_kernel, "bf16", {**rotate, "NORMED": True}))
    report(compile_one(layers.embed_kernel, "bf16", {"WIDTH": 4096, "BLOCK": 1024}))
    report(compile_one(layers.gated_kernel, "bf16", {"WIDTH": 14336, "BLOCK": 1024}))
    report(compile_one(smid_kernel, "i32", {"ROUNDS": 64}))


def report(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
