"""FlashInfer's attention behind our protocol, against the plain twin, on a module that checks its calls."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import tests.model.fake_flashinfer as fake
from semipd.core.errors import ConfigError
from semipd.core.types import Lane, Slice
from semipd.execute.cuda_start import Shape, start_cuda
from semipd.model.attention_flashinfer import FlashInferOps, load_flashinfer
from semipd.model.device_model import DeviceModel
from semipd.model.ops import DeviceStep, Heads, Ops, Outline, PlainOps
from tests.checkpoints import VOCABULARY, make_checkpoint
from tests.execute.conformance import Driver
from tests.execute.fake_cuda import FakeBackend, SpendingOps

CPU = torch.device("cpu")
SIZE = 4


def flashinfer_ops(heads: Heads, windows: tuple[int | None, ...], dtype: torch.dtype) -> FlashInferOps:
    return FlashInferOps(
        PlainOps(), fake, heads, windows, dtype, CPU, torch.from_numpy, lambda: lambda: None
    )


def step_of(slices: list[tuple[int, int, int]], tables: torch.Tensor) -> DeviceStep:
    row_slots: list[int] = []
    positions: list[int] = []
    tiles: list[tuple[int, int, int, int]] = []
    singles: list[int] = []
    for slot, start, count in slices:
        if count == 1:
            singles.append(len(positions))
        else:
            tiles.append((slot, start, len(positions), count))
        row_slots += [slot] * count
        positions += range(start, start + count)
    whole = [torch.tensor(part, dtype=torch.int64) for part in (row_slots, positions, tiles, singles)]
    tokens = torch.zeros((1, 1), dtype=torch.int32)
    return DeviceStep(whole[0], whole[1], tokens, tables, whole[2].view(-1, 4), whole[3], None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "slices",
    [
        [(0, 0, 1), (3, 7, 1), (1, 22, 1)],
        [(2, 0, 13)],
        [(1, 5, 9), (0, 11, 1), (3, 0, 4), (2, 12, 8)],
    ],
    ids=["decode", "prefill", "mixed"],
)
def test_every_kind_of_step_is_the_twin_s(slices: list[tuple[int, int, int]], dtype: torch.dtype) -> None:
    """Over both windows that a model may have in its layers, from one plan."""
    generator = torch.Generator().manual_seed(1)
    heads = Heads(6, 2, 64, 1e-5)
    tables = torch.randperm(4 * 7, generator=generator).int().view(4, 7)
    layer = torch.randn((2, 28, 2, SIZE, 64), generator=generator).to(dtype)
    step = step_of(slices, tables)
    qkv = torch.randn((step.rows, 10 * 64), generator=generator).to(dtype)
    columns = np.array(slices, dtype=np.int64).T
    ops = flashinfer_ops(heads, (None, 5, None), dtype)
    ops.plan(Outline(columns[0], columns[1], columns[2], tables, SIZE))
    for window in (None, 5):
        expected, found = (torch.zeros((step.rows, 6 * 64), dtype=dtype) for _ in range(2))
        PlainOps().attend(qkv, layer, step, heads, window, 8, expected)
        ops.attend(qkv, layer, step, heads, window, 8, found)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


class FlashInferBackend(FakeBackend):
    """A fake device whose lanes attend by the fake library."""

    made: list[FlashInferOps]

    def ops(self, model: DeviceModel, rows: int) -> Ops:
        def mark() -> Any:
            assert self.current is not None
            event = self.record(self.current)

            def passed() -> None:
                self.time = max(self.time, event.time)

            return passed

        windows = [layer.window for layer in model.layers]
        ops = FlashInferOps(
            SpendingOps(self), fake, model.heads, windows, model.dtype, CPU, self.upload, mark
        )
        self.made = [*getattr(self, "made", []), ops]
        return ops


@pytest.mark.parametrize("graph_sides", [0, 2])
def test_a_whole_engine_gives_the_same_tokens(tmp_path: Path, graph_sides: int) -> None:
    """Prompts in chunks, steps ahead of the host, new blocks, padded graphs, a sliding window."""
    folder = make_checkpoint(tmp_path, "mistral", sliding_window=24)
    prompt = [(7 * i + 3) % VOCABULARY for i in range(40)]
    found = []
    for backend in (FakeBackend(step=40), FlashInferBackend(step=40)):
        shape = Shape(slots=4, max_length=64, block_size=SIZE, blocks=64, most_rows=64)
        executor = start_cuda(backend, folder, shape, dtype="float32", graph_sides=graph_sides).executor
        driver = Driver(executor, SIZE)
        tokens: list[int] = []
        for slot in range(3):
            driver.open(slot, prompt[slot:])
            driver.run(Lane.PREFILL, Slice(slot, 0, 17, False))
            tokens += driver.run(Lane.PREFILL, Slice(slot, 17, 23 - slot)).tokens
        for position in range(40, 52, 2):
            for ahead in range(2):
                at = position + ahead
                slices = (Slice(slot, at - slot, 1) for slot in range(3))
                executor.submit(Lane.DECODE, driver.batch(*slices))
            tokens += [token for result in driver.collect(2) for token in result.tokens]
        found.append(tokens)
        assert bool(backend.replays) is bool(graph_sides)
        executor.close()
    assert found[0] == found[1] and len(found[0]) == 3 + 36


def test_a_captured_step_plans_into_buffers_that_stay(tmp_path: Path) -> None:
    backend = FlashInferBackend(step=40)
    shape = Shape(slots=4, max_length=64, block_size=SIZE, blocks=64, most_rows=64)
    folder = make_checkpoint(tmp_path, "llama")
    executor = start_cuda(backend, folder, shape, dtype="float32", graph_sides=1).executor
    decode = [ops for ops in backend.made if any(rows for _, rows, _ in ops._wrappers)]
    assert len(decode) == 1, "each lane has its own, and only decode is captured"
    wrapper = decode[0]._wrappers["decode", 4, None]
    before = [buffer.data_ptr() for buffer in wrapper.fixed]
    planned = wrapper.plans
    driver = Driver(executor, SIZE)
    for slot in range(3):
        driver.open(slot, [1, 2, 3])
        driver.run(Lane.PREFILL, Slice(slot, 0, 3))
    driver.run(Lane.DECODE, *(Slice(slot, 3, 1) for slot in range(3)))
    assert wrapper.plans == planned + 1, "planned again for the replay"
    assert [buffer.data_ptr() for buffer in wrapper.fixed] == before
    executor.close()


def test_what_cannot_serve_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ConfigError, match=r"cannot be imported.*flashinfer-python 0\.7"):
        load_flashinfer(torch.bfloat16, 128)
    module = ModuleType("flashinfer")
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    module.__dict__["__version__"] = "0.2.5"
    with pytest.raises(ConfigError, match=r"version 0\.7 is supported, not 0\.2\.5"):
        load_flashinfer(torch.bfloat16, 128)
    module.__dict__["__version__"] = fake.__version__
    for dtype, dim in ((torch.float32, 128), (torch.bfloat16, 80)):
        with pytest.raises(ConfigError, match=f"no kernels for .* heads of {dim}"):
            load_flashinfer(dtype, dim)
    assert load_flashinfer(torch.bfloat16, 128) is module
