# mypy: ignore-errors
"""On which SMs a stream's kernels run, measured: a kernel whose programs write down where they are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROUNDS = 4096  # keeps every program busy long enough that the next ones go to other SMs


@triton.jit
def smid_kernel(out, ROUNDS: tl.constexpr):
    """out[program] = number of its SM."""
    program = tl.program_id(0)
    thread = tl.arange(0, 128)
    number = tl.inline_asm_elementwise(
        "mov.u32 $0, %smid;", "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1
    )
    value = program
    for _ in range(ROUNDS):
        value = value * 1664525 + 1013904223
    # Stored, so that the compiler keeps the loop.
    tl.store(out + program, tl.max(number, axis=0))  # all threads of a program share an SM
    tl.store(out + tl.num_programs(0) + program, value)


def launch_smid(out: torch.Tensor) -> None:
    """Fill the first half of out (int32, on the GPU) with SM numbers, on the current stream; the second
    half is scratch."""
    smid_kernel[(out.shape[0] // 2,)](out, ROUNDS=_ROUNDS, num_warps=4)
