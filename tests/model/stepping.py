"""Drive a Runner over one model, the way an executor would, and keep the logits it sampled from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from semipd.core.types import BlockAppend, Sampling, Score, Slice
from semipd.execute.runner import Runner
from semipd.execute.storage import SlotTable
from semipd.model.dense import DenseModel, StepInputs
from semipd.model.step import Chosen, FusedStep


class Recorder:
    """A model whose forward also keeps its last logits."""

    def __init__(self, model: DenseModel) -> None:
        self.model = model
        self.spec, self.kernels = model.spec, model.kernels
        self.logits = torch.empty(0)

    def forward(self, inputs: StepInputs, kv: torch.Tensor, boundary: Callable[[], None]) -> torch.Tensor:
        self.logits = self.model.forward(inputs, kv, boundary)
        return self.logits.clone()  # the sampler may overwrite what it is given

    def hidden(self, inputs: StepInputs, kv: torch.Tensor, boundary: Callable[[], None]) -> torch.Tensor:
        return self.model.hidden(inputs, kv, boundary)

    def logits_of(self, normed: torch.Tensor) -> torch.Tensor:
        self.logits = self.model.logits_of(normed)
        return self.logits.clone()

    def fused_step(self, kv: torch.Tensor, table: SlotTable) -> Any:
        step = self.model.fused_step(kv, table)
        return None if step is None else _RecordedStep(self, step)


class _RecordedStep:
    """A `FusedStep` that hands its logits to a recorder."""

    def __init__(self, recorder: Recorder, step: FusedStep) -> None:
        self._recorder, self._step = recorder, step
        self.logits = step.logits

    def run(self, *arguments: Any) -> Chosen | None:
        result = self._step.run(*arguments)
        if result is not None and result.tokens:
            self._recorder.logits = self.logits(range(len(result.tokens)))
        return result


class Bench:
    """A runner with storage of its own. Block tables are scattered, and the pool starts out full of a value
    that would show if it were read."""

    def __init__(
        self,
        model: DenseModel,
        slots: int = 4,
        length: int = 400,
        block_size: int = 8,
        seed: int = 0,
        fused: bool = True,
    ) -> None:
        self.recorder = Recorder(model)
        self.table = SlotTable(
            bytearray(SlotTable.nbytes(slots, length, block_size)), slots, length, block_size
        )
        each = self.table.blocks.shape[1]
        self.kv = torch.full(model.kv_shape(slots * each, block_size), 7.0, dtype=model.dtype)
        self.order = np.random.default_rng(seed).permutation(slots * each).reshape(slots, each)
        self.scores: tuple[Score, ...] = ()  # of the last step
        self.runner = Runner(self.recorder, self.table, self.kv, fused)  # type: ignore[arg-type]

    def open(self, slot: int, tokens: Sequence[int], **sampling: Any) -> None:
        self.table.open(slot, tokens, Sampling(**sampling))
        self.table.append([BlockAppend(slot, 0, tuple(self.order[slot].tolist()))])

    def run(self, *slices: Slice) -> list[int]:
        tokens, self.scores = self.runner.run(slices, lambda: None)
        return tokens

    def generate(self, slot: int, prompt: Sequence[int], count: int, chunk: int = 2**20) -> list[int]:
        """Prefill in chunks, then decode, `count` tokens in all."""
        for start in range(0, len(prompt), chunk):
            end = min(start + chunk, len(prompt))
            tokens = self.run(Slice(slot, start, end - start, end == len(prompt)))
        for position in range(len(prompt), len(prompt) + count - 1):
            tokens += self.run(Slice(slot, position, 1))
        return tokens
