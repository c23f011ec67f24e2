"""Captured decode steps: one graph per (side, number of rows rounded up), replayed with new inputs.

A graph keeps the SMs of the stream that it was captured on, so every partition needs its own set. All
intermediates are the decode lane's buffers, so what a graph adds is small; it is measured all the same, and
a budget bounds it. Sides that were not captured at start run eagerly until the device is idle for a moment:
capturing blocks the launching thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from semipd.execute.backend import Backend, Side
from semipd.execute.device_storage import DeviceStorage, Packed
from semipd.model.device_model import Buffers, DeviceModel
from semipd.model.ops import DeviceStep, Ops
from semipd.model.sampler_device import greedy

SIDES_AT_START = 6
_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)

log = logging.getLogger("semipd")


def buckets(batch: int) -> tuple[int, ...]:
    """Numbers of rows to capture for batches of up to `batch`: at most a quarter is padding."""
    enough = next((index for index, count in enumerate(_BUCKETS) if count >= batch), len(_BUCKETS) - 1)
    return _BUCKETS[: enough + 1]


@dataclass(frozen=True)
class Graph:
    """A captured step of `rows` rows. inputs: int64 on the device; padding: int64 [5, rows or one more],
    what goes there for rows that compute nothing of use: slots, positions, where the ids go in the flat
    token table, places in the flat block tables, and the blocks that go there. write: the third of these on
    the device; ids: int64 [rows]."""

    rows: int
    inputs: torch.Tensor
    padding: np.ndarray
    write: torch.Tensor
    ids: torch.Tensor
    replay: Callable[[], None]


class DecodeGraphs:
    """The graphs of the decode lane, which owns `buffers` and `ops`."""

    def __init__(
        self,
        backend: Backend,
        model: DeviceModel,
        storage: DeviceStorage,
        buffers: Buffers,
        ops: Ops,
        batch: int,
        budget: int,
        enabled: bool = True,
    ) -> None:
        """batch: most rows of a step; budget: bytes that all graphs may take. enabled: False for none."""
        self._backend, self._model, self._storage = backend, model, storage
        self._buffers, self._ops = buffers, ops
        self._sizes = tuple(size for size in buckets(batch) if size <= buffers.logits.shape[0])
        self._budget = budget
        self._enabled = enabled
        self._graphs: dict[Side, dict[int, Graph]] = {}
        self._wanted: list[tuple[Side, int]] = []
        self.nbytes = 0
        with torch.inference_mode():
            device = backend.device
            self._inputs = torch.zeros(5 * (max(self._sizes) + 1), dtype=torch.int64, device=device)
            self._ids = torch.zeros(max(self._sizes), dtype=torch.int64, device=device)
            self._singles = torch.arange(max(self._sizes), device=device)
            self._no_tiles = torch.zeros((0, 4), dtype=torch.int64, device=device)

    def find(self, side: Side, rows: int) -> Graph | None:
        """The smallest graph that holds `rows` on this side; None (and a wish) when there is none."""
        sizes = self._graphs.get(side)
        if sizes is None:
            self.wish(side)
            return None
        size = min((size for size in sizes if size >= rows), default=None)
        return None if size is None else sizes[size]

    def wish(self, side: Side) -> None:
        """Capture this side when the device is idle, after those wished for before."""
        if self._enabled and side not in self._graphs:
            self._graphs[side] = {}
            # Largest first: smaller ones then fit into the memory that it took.
            self._wanted += [(side, size) for size in sorted(self._sizes, reverse=True)]

    def capture_all(self, sides: Sequence[Side]) -> None:
        """Capture these sides, in order, until the budget is used up. The device must be idle."""
        for side in sides:
            self.wish(side)
        while self.capture_next():
            pass

    def capture_next(self) -> bool:
        """Capture one more graph of those that are wanted; whether there was one. Blocks for a while. A
        side on which it fails goes on without; raises what the device did not survive."""
        if not self._wanted or self.nbytes >= self._budget:
            return False
        side, rows = self._wanted.pop(0)
        before, _ = self._backend.memory()
        try:
            self._graphs[side][rows] = self._capture(side, rows)
        except Exception as error:
            if self._backend.lost(error) is not None:
                raise
            self._wanted = [wanted for wanted in self._wanted if wanted[0] is not side]
            why = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("no graph of %d rows on %d SMs, such steps run without: %s", rows, side.units, why)
            return True
        after, _ = self._backend.memory()
        self.nbytes += max(before - after, 0)
        log.debug("graph of %d rows on %d SMs: %.1f MiB", rows, side.units, (before - after) / 2**20)
        return True

    def clear(self) -> None:
        """Forget all graphs; nothing of them may run."""
        self._graphs.clear()
        self._wanted.clear()

    def replay(self, graph: Graph, packed: Packed) -> None:
        """Launch the step on the current stream: one copy, one launch. Padding rows go to the scratch slot.
        New blocks travel in the graph's own inputs, prompts (and more blocks than rows) before it."""
        values = graph.padding.copy()
        rows, added = packed.rows, len(packed.where)
        if packed.opened or added > graph.rows or (added and self._ops.plans):
            self._storage.update(packed, self._backend)
            added = 0
        values[0, :rows] = packed.slots
        values[1, :rows] = packed.starts
        values[2, :rows] = packed.write
        if added:
            values[3, :added] = packed.where
            values[4, :added] = packed.blocks
        self._plan(values[:, : graph.rows])
        self._backend.upload_into(graph.inputs, values.reshape(-1))
        graph.replay()

    def _plan(self, values: np.ndarray) -> None:
        """values: as `Graph.padding`, without what only fills up."""
        if self._ops.plans:
            slots, starts = values[:2]
            self._ops.plan(self._storage.outline(slots, starts, np.ones_like(slots), graph=True))

    def _padding(self, rows: int) -> np.ndarray:
        """`Graph.padding`. Each of the five begins at a multiple of 16 bytes, so that kernels compiled for
        such pointers serve here, too."""
        storage = self._storage
        slot, width, length = storage.scratch, storage.tables.shape[1], storage.tokens.shape[1]
        column = [slot, 0, slot * length + 1, slot * width + width - 1, storage.scratch_block]
        return np.repeat(np.array(column, dtype=np.int64)[:, None], rows + rows % 2, axis=1)

    def _capture(self, side: Side, rows: int) -> Graph:
        padding, ids = self._padding(rows), self._ids[:rows]
        inputs = self._inputs[: padding.size]
        slots, positions, write, where, blocks = inputs.view(5, -1)[:, :rows]
        storage = self._storage
        step = DeviceStep(
            slots, positions, storage.tokens, storage.tables, self._no_tiles, self._singles[:rows], None
        )

        def launch() -> None:
            with torch.inference_mode():
                model, units = self._model, lambda: side.units
                storage.append(where, blocks)
                for _ in model.launch(step, self._buffers, storage.kv, self._ops, units):
                    pass
                ids.copy_(greedy(self._buffers.logits[:rows]))
                storage.put(write, ids)

        with torch.inference_mode(), self._backend.on(side):
            self._plan(padding[:, :rows])
            self._backend.upload_into(inputs, padding.reshape(-1))
            launch()  # compiles kernels and makes cuBLAS take its workspace outside the graph
        return Graph(rows, inputs, padding, write, ids, self._backend.capture(side, launch))
