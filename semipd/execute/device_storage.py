"""Token table, block tables and KV pool on a device, and the packing of a batch into one copy to it.

The host keeps a `SlotTable` too: for checks and sampling rules. What changes on the device (a prompt of an
opened slot, new blocks) travels with the first batch that needs it, on that batch's stream, so it cannot
arrive too late, and nothing on the device is written beside a step that reads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from semipd.core.types import Batch, Sampling, Slice
from semipd.execute.backend import Backend
from semipd.execute.storage import SlotTable
from semipd.model.device_model import DeviceModel
from semipd.model.ops import TILE, DeviceStep
from semipd.model.sampler_device import DeviceRules


@dataclass(frozen=True)
class Packed:
    """A checked batch, ready to travel. columns: slots, starts, counts and flags, int64 [slices] each.
    values: everything for the device in one int64 array; sizes: of its parts, see `_PARTS`. opened: (slot,
    tokens) of each prompt at the end of values."""

    slots: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    wanted: np.ndarray
    values: np.ndarray
    sizes: tuple[int, ...]
    opened: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        return self.sizes[0]

    @property
    def updates(self) -> bool:
        """Whether block tables or prompts travel with it."""
        return bool(self.sizes[6] or self.opened)

    @property
    def write(self) -> np.ndarray:
        """Where in the flat token table its ids go."""
        first = sum(self.sizes[:5])
        return self.values[first : first + self.sizes[5]]

    @property
    def decode_only(self) -> bool:
        """Whether every slice is one position with a sampled token: what a captured graph computes."""
        return self.rows == len(self.slots) and bool(self.wanted.all())


_PARTS = ("row_slots", "positions", "tiles", "singles", "sample", "write", "where", "blocks", "prompts")


_NOTHING = np.empty(0, dtype=np.int64)
_NO_TILES = np.empty((0, 4), dtype=np.int64)


def columns_of(slices: Sequence[Slice]) -> np.ndarray:
    """Slots, starts, counts and flags, int64 [4, slices]. Runs for every decode step: much faster than
    `np.array(slices)`."""
    flat = itertools.chain.from_iterable(slices)
    columns = np.fromiter(flat, dtype=np.int64, count=4 * len(slices)).reshape(-1, 4)
    return np.ascontiguousarray(columns.T)


class DeviceStorage:
    """The state of all slots. Slot number `slots` and block number `blocks` are scratch: padding rows of a
    graph read and write there."""

    def __init__(
        self,
        backend: Backend,
        model: DeviceModel,
        slots: int,
        max_length: int,
        blocks: int,
        block_size: int,
    ) -> None:
        nbytes = SlotTable.nbytes(slots, max_length, block_size)
        self.table = SlotTable(bytearray(nbytes), slots, max_length, block_size)
        self.scratch = slots
        self._vocabulary = model.spec.vocabulary
        self._unsent: dict[int, np.ndarray] = {}
        self._broken: dict[int, str] = {}  # slots whose prompt cannot be computed
        device = backend.device
        with torch.inference_mode():
            self.tokens = torch.zeros((slots + 1, max_length + 2), dtype=torch.int32, device=device)
            height = (slots + 1, self.table.blocks.shape[1])
            self.tables = torch.full(height, blocks, dtype=torch.int32, device=device)
            self.kv = torch.zeros(model.kv_shape(blocks + 1, block_size), dtype=model.dtype, device=device)

    @staticmethod
    def table_bytes(slots: int, max_length: int, block_size: int) -> int:
        """Device memory besides the KV pool."""
        return 4 * (slots + 1) * (max_length + 2 + max_length // block_size + 2)

    def open(self, slot: int, tokens: Sequence[int], sampling: Sampling) -> None:
        """Raises ValueError out of range. A token outside the vocabulary fails the batches of this slot."""
        self.table.open(slot, tokens, sampling)
        known = np.asarray(tokens, dtype=np.int64)
        self._broken.pop(slot, None)
        if known.size and not 0 <= known.min() <= known.max() < self._vocabulary:
            self._broken[slot] = f"a token is not in the vocabulary of {self._vocabulary}"
        self._unsent[slot] = known

    def close_slot(self, slot: int) -> None:
        if 0 <= slot < self.table.slots:
            self.table.close(slot)
            self._unsent.pop(slot, None)

    def pack(self, batch: Batch, columns: np.ndarray, most_rows: int) -> Packed:
        """Check a batch, whose `columns_of` are given, and lay it out. Raises ValueError when it cannot
        run."""
        slots, starts, counts, flags = columns
        self._check(slots, starts, counts, most_rows)
        first = np.cumsum(counts) - counts
        rows = int(counts.sum())
        single = counts == 1
        if rows == len(slots):
            row_slots, positions = slots, starts
        else:
            row_slots = np.repeat(slots, counts)
            positions = np.arange(rows) + np.repeat(starts - first, counts)
        wanted = flags.astype(bool)
        stride = self.tokens.shape[1]
        opened = [slot for slot in slots.tolist() if slot in self._unsent] if self._unsent else []
        prompts = [self._unsent.pop(slot) for slot in opened]
        where, blocks = self._appends(batch)
        parts = (
            row_slots,
            positions,
            _tiles(slots, starts, counts, first).reshape(-1),
            first[single],
            (first + counts - 1)[wanted],
            slots[wanted] * stride + (starts + counts)[wanted],
            where,
            blocks,
            np.concatenate(prompts) if prompts else _NOTHING,
        )
        return Packed(
            slots,
            starts,
            counts,
            wanted,
            np.concatenate(parts),
            tuple(len(part) for part in parts),
            tuple((slot, len(prompt)) for slot, prompt in zip(opened, prompts, strict=True)),
        )

    def step(self, packed: Packed, values: torch.Tensor) -> tuple[DeviceStep, torch.Tensor]:
        """Apply what travelled with the batch; the step, and where in the flat token table its ids go."""
        parts = dict(zip(_PARTS, values.split(packed.sizes), strict=True))
        if packed.sizes[6]:
            self.tables.view(-1).index_copy_(0, parts["where"], parts["blocks"].int())
        taken = 0
        for slot, count in packed.opened:
            self.tokens[slot, :count].copy_(parts["prompts"][taken : taken + count])
            taken += count
        whole = packed.decode_only
        step = DeviceStep(
            parts["row_slots"],
            parts["positions"],
            self.tokens,
            self.tables,
            parts["tiles"].view(-1, 4),
            parts["singles"],
            None if whole else parts["sample"],
        )
        return step, parts["write"]

    def put(self, where: torch.Tensor, ids: torch.Tensor) -> None:
        """Write ids to these places of the flat token table; what is no token becomes one that exists."""
        self.tokens.view(-1).index_copy_(0, where, ids.clamp_min(0).int())

    def rules(self, packed: Packed, backend: Backend) -> DeviceRules | None:
        """The sampling rules of the rows to sample, or None when all of them are plainly greedy."""
        table, slots = self.table, packed.slots[packed.wanted]
        produced = (packed.starts + packed.counts)[packed.wanted]
        temperature = table.temperature[slots]
        banning = (produced < table.ban_until[slots]) & (table.ban_count[slots] > 0)
        if not banning.any() and not (temperature > 0).any():
            return None
        top_p, top_k = table.top_p[slots], table.top_k[slots].astype(np.int64)
        floats = backend.upload(np.stack((temperature, top_p, table.min_p[slots])))
        whole = backend.upload(np.stack((top_k, table.seed[slots], produced)))
        width = max(int(table.ban_count[slots].max()), 1) if banning.any() else 1
        banned = table.ban_tokens[slots, :width].astype(np.int64)
        filler = np.arange(width) >= np.maximum(table.ban_count[slots], 1)[:, None]
        banned = np.where(filler, banned[:, :1], banned)
        return DeviceRules(
            temperature=floats[0],
            top_p=floats[1],
            min_p=floats[2],
            top_k=whole[0],
            seed=whole[1],
            position=whole[2],
            banned=backend.upload(banned),
            banning=backend.upload(banning),
            filtered=bool((top_p < 1.0).any() or (top_k > 0).any()),
        )

    def _check(self, slots: np.ndarray, starts: np.ndarray, counts: np.ndarray, most_rows: int) -> None:
        table = self.table
        if not len(slots):
            raise ValueError("a batch without slices")
        if slots.min() < 0 or slots.max() >= table.slots or not table.opened[slots].all():
            raise ValueError("a slice names a slot that is not open")
        if starts.min() < 0 or counts.min() < 1 or (starts + counts).max() > table.max_length:
            raise ValueError(f"a slice does not fit a slot of {table.max_length} tokens")
        if counts.sum() > most_rows:
            raise ValueError(f"a step of {counts.sum()} positions; at most {most_rows} fit")
        if self._broken:
            for slot in slots.tolist():
                if slot in self._broken:
                    raise ValueError(self._broken[slot])

    def _appends(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Flat places in the block tables, and what goes there."""
        if not batch.appends:
            return _NOTHING, _NOTHING
        where: list[int] = []
        blocks: list[int] = []
        width = self.tables.shape[1]
        for slot, first, added in batch.appends:
            at = slot * width + first
            where += range(at, at + len(added))
            blocks += added
        return np.array(where, dtype=np.int64), np.array(blocks, dtype=np.int64)


def _tiles(slots: np.ndarray, starts: np.ndarray, counts: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Runs of at most TILE rows of the slices that have several, those with the longest context first,
    since they take longest: int64 [n, 4]."""
    if counts.max() == 1:
        return _NO_TILES
    tiles = [
        (slot, start + offset, row + offset, min(TILE, count - offset))
        for slot, start, count, row in zip(
            slots.tolist(), starts.tolist(), counts.tolist(), first.tolist(), strict=True
        )
        if count > 1
        for offset in range(0, count, TILE)
    ]
    tiles.sort(key=lambda tile: -tile[1])
    return np.array(tiles, dtype=np.int64).reshape(-1, 4)
