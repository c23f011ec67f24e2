"""The decoder for asynchronous devices against the CPU's own, on the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from semipd.model.attention import Pool, Ragged
from semipd.model.dense import StepInputs, load_model
from semipd.model.device_model import load_device_model
from semipd.model.ops import TILE, DeviceStep, Ops, PlainOps
from tests.checkpoints import VOCABULARY, make_checkpoint
from tests.model.conftest import one_thread  # noqa: F401  (a fixture)

SLOTS, LENGTH, SIZE = 4, 180, 8
BLOCKS = SLOTS * (LENGTH // SIZE + 1)


def logits_of(folder: Path, slices: list[tuple[int, int, int, bool]], ops: Ops | None) -> torch.Tensor:
    """Logits of the sampled slices on the device model (or, without ops, on the CPU's) over one content."""
    rng = np.random.default_rng(0)
    tables = rng.permutation(BLOCKS).reshape(SLOTS, -1)
    tokens = rng.integers(0, VOCABULARY, (SLOTS, LENGTH + 1))
    columns = np.array(slices, dtype=np.int64)
    slots, starts, counts = columns[:, 0], columns[:, 1], columns[:, 2]
    first = np.cumsum(counts) - counts
    positions = np.arange(counts.sum()) + np.repeat(starts - first, counts)
    row_slots = np.repeat(slots, counts)
    sample = (first + counts - 1)[columns[:, 3] == 1]
    shape = (3, 2, BLOCKS, 2, SIZE, 16)
    kv = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    if ops is None:
        rows = Pool.of(kv).rows(tables[row_slots, positions // SIZE], positions % SIZE)
        inputs = StepInputs(
            torch.from_numpy(tokens[row_slots, positions]),
            torch.from_numpy(positions),
            Ragged(starts, counts, tables[slots]),
            rows,
            torch.from_numpy(sample),
        )
        return load_model(folder, pack=False, kernels=False).forward(inputs, kv, lambda: None)
    tiles = [
        (slot, start + offset, row + offset, min(TILE, count - offset))
        for slot, start, count, row in zip(slots, starts, counts, first, strict=True)
        for offset in range(0, count if count > 1 else 0, TILE)
    ]
    step = DeviceStep(
        torch.from_numpy(row_slots),
        torch.from_numpy(positions),
        torch.from_numpy(tokens).int(),
        torch.from_numpy(tables).int(),
        torch.tensor(tiles, dtype=torch.int64).reshape(-1, 4),
        torch.from_numpy(first[counts == 1]),
        torch.from_numpy(sample),
    )
    model = load_device_model(folder, "cpu", positions=LENGTH)
    with torch.inference_mode():
        buffers = model.buffers(step.rows, SLOTS)
        pauses = sum(1 for _ in model.launch(step, buffers, kv, ops, lambda: 4))
    assert pauses == 2, "a lane can look around between any two of the three layers"
    return buffers.logits[: sample.size].float()


SLICES = [(2, 0, 150, True), (0, 30, 1, True), (3, 100, 20, False), (1, 0, 1, True)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_logits_are_those_of_the_cpu(family: str, tmp_path: Path) -> None:
    extra = {"sliding_window": 24} if family == "mistral" else {}
    folder = make_checkpoint(tmp_path, family, tied=family == "qwen2", **extra)
    expected = logits_of(folder, SLICES, None)
    torch.testing.assert_close(logits_of(folder, SLICES, PlainOps()), expected, rtol=1e-4, atol=1e-4)


def test_the_kernels_run_the_whole_model(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is not used where there is a GPU")
    from semipd.model.ops_triton import TritonOps

    folder = make_checkpoint(tmp_path, "qwen3")
    model = load_device_model(folder, "cpu", positions=LENGTH)
    slices = [(2, 0, 20, True), (0, 30, 1, True)]
    expected = logits_of(folder, slices, None)
    ops = TritonOps(torch.device("cpu"), 4, model.heads, 1)
    torch.testing.assert_close(logits_of(folder, slices, ops), expected, rtol=1e-4, atol=1e-4)


def test_a_chunk_without_samples_skips_the_head(tmp_path: Path) -> None:
    assert logits_of(make_checkpoint(tmp_path, "llama"), [(1, 3, 9, False)], PlainOps()).shape[0] == 0
