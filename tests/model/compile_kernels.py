"""Compile every kernel for a GPU, which needs none, and print what each takes: one JSON line a kernel.

    python -m tests.model.compile_kernels [--all]     # --all: every kind that checkpoints lead to

Run in a process of its own: the tests' process has Triton in its interpreter.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from semipd.execute.smid import smid_kernel
from semipd.model import attention_triton as attention
from semipd.model import layers_triton as layers
from semipd.model import ops_triton
from semipd.model.ops import TILE

TARGETS = {"hopper": (90, 227 * 1024), "ampere": (80, 163 * 1024)}  # architecture, shared memory
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NUMBERS = {"table_stride": "i32", "block_stride": "i32", "token_stride": "i32", "window": "i32",
           "scale": "fp32", "eps": "fp32"}  # fmt: skip
POINTERS = {
    "tables": "*i32", "tokens": "*i32", "tiles": "*i64", "singles": "*i64", "row_slots": "*i64",
    "positions": "*i64", "sums": "*fp32", "totals": "*fp32", "maxima": "*fp32",
}  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Compiler:
    """Compiles for one kind of GPU and prints what came out."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.architecture, self.shared = TARGETS[name]

    def report(
        self, kernel: Any, dtype: str, constants: dict[str, Any], half: str = "i32", **options: int
    ) -> None:
        """Compile with the alignment that a launch would see; pointers without a type of their own hold
        activations. half: type of the distance from keys to values."""
        names = kernel.arg_names
        types = {
            name: {**NUMBERS, **POINTERS, "half_stride": half}.get(name, f"*{dtype}") for name in names
        }
        signature = {name: "constexpr" if name in constants else types[name] for name in names}
        aligned = {"half_stride", "block_stride", "window"}
        attributes = {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if signature[name].startswith("*") or (name in aligned and name not in constants)
        }
        values = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
        made = triton.compile(source, target=GPUTarget("cuda", self.architecture, 32), options=options)
        ptx = made.asm["ptx"]
        row = {
            "kernel": kernel.__name__,
            "target": self.name,
            "dtype": dtype,
            "constants": constants,
            "shared": made.metadata.shared,
            "most_shared": self.shared,
            "wgmma": ptx.count("wgmma.mma_async"),
            "mma": ptx.count("mma.sync"),
            "asynchronous": ptx.count("cp.async"),
            **resources(made.asm["cubin"]),
        }
        print(json.dumps(row), flush=True)

    def attention(self, dtype: str, query: int, kv: int, dim: int, windowed: bool, splits: int = 4) -> None:
        """Prefill's and decode's kernel as `TritonOps.attend` launches them."""
        width = max(triton.next_power_of_2(dim), 16)
        shape = {"QUERY": query, "KV": kv, "DIM": dim, "DIM_BLOCK": width, "BLOCK_SIZE": 16}
        shape |= {"WINDOWED": windowed, "CAST": False}
        prefill = ops_triton.prefill_tile(dim, DTYPES[dtype], windowed, self.shared)
        tile = {**shape, "BLOCK_M": prefill.rows, "PARTS": TILE // prefill.rows}
        self.tiled(attention.prefill_kernel, dtype, tile, prefill)
        group = max(triton.next_power_of_2(query // kv), 16)
        part = {**shape, "GROUP_BLOCK": group, "SPLITS": splits}
        self.tiled(attention.decode_kernel, dtype, part, ops_triton.decode_tile(dim, DTYPES[dtype]))

    def tiled(self, kernel: Any, dtype: str, constants: dict[str, Any], tile: ops_triton.Tile) -> None:
        block = {**constants, "BLOCK_N": tile.block}
        self.report(kernel, dtype, block, num_warps=tile.warps, num_stages=tile.stages)

    def rest(self, dtype: str, normed: bool, half: str = "i32") -> None:
        """All others, in the shape of an 8B model."""
        reduce = {"QUERY": 32, "DIM": 128, "DIM_BLOCK": 128, "SPLITS": 64}
        self.report(attention.reduce_kernel, dtype, reduce, num_warps=4)
        for add in (False, True):
            norm = {"WIDTH": 4096, "BLOCK": 4096, "ADD": add}
            self.report(layers.norm_kernel, dtype, norm, num_warps=8)
        rotate = {"QUERY": 32, "KV": 8, "DIM": 128, "HALF_BLOCK": 64, "HEADS": 8, "BLOCK_SIZE": 16}
        self.report(layers.rotate_and_store_kernel, dtype, {**rotate, "NORMED": normed}, half)
        self.report(layers.embed_kernel, dtype, {"WIDTH": 4096, "BLOCK": 1024})
        self.report(layers.gated_kernel, dtype, {"WIDTH": 14336, "BLOCK": 1024})


def resources(cubin: bytes) -> dict[str, int]:
    """registers of a thread, bytes of its stack: what did not fit into registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return {"registers": int(found[1]), "stack": int(found[2])}


def every_kind() -> Iterator[tuple[str, int, int, int, bool]]:
    """(dtype, query heads, KV heads, width of a head, sliding window) of what checkpoints have."""
    for dtype in ("bf16", "fp16"):
        for dim in (64, 128):
            for query, kv in ((32, 8), (28, 4), (32, 32), (64, 8)):
                yield from ((dtype, query, kv, dim, windowed) for windowed in (False, True))
    yield from (("bf16", 14, 2, 64, False), ("bf16", 16, 8, 256, False), ("bf16", 32, 8, 80, False))
    yield from (("fp32", 4, 2, 16, False), ("fp32", 4, 2, 16, True), ("fp32", 32, 8, 64, False))
    yield from (("fp32", 32, 8, 128, False), ("fp32", 16, 8, 256, False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    hopper, ampere = Compiler("hopper"), Compiler("ampere")
    hopper.attention("bf16", 32, 8, 128, False)
    hopper.rest("bf16", True)
    hopper.report(smid_kernel, "i32", {"ROUNDS": 4096}, num_warps=4)
    if not options.all:
        return
    for kind in every_kind():
        hopper.attention(*kind)
    for splits in (1, 64):
        hopper.attention("bf16", 32, 8, 128, False, splits)
    for dtype in ("bf16", "fp16", "fp32"):
        hopper.rest(dtype, False, half="i64")
    for windowed in (False, True):
        ampere.attention("bf16", 32, 8, 128, windowed)
    ampere.attention("bf16", 16, 8, 256, False)
    for dim in (64, 128, 256):
        ampere.attention("fp32", 32, 8, dim, False)
    ampere.rest("bf16", True)


if __name__ == "__main__":
    main()
