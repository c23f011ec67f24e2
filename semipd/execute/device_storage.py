"""Token table, block tables and KV pool on a device, and the packing of a batch into one copy to it.

The host keeps a `SlotTable` too: for checks and sampling rules. What changes on the device (a prompt of an
opened slot, new blocks) travels with the first batch that needs it, on that batch's stream, so it cannot
arrive too late, and nothing on the device is written beside a step that reads it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from semipd.core.types import Batch, Sampling, Slice
from semipd.execute.backend import Backend
from semipd.execute.constraints import Constraints
from semipd.execute.device_scores import Wanted, wanted_of_produced, wanted_of_prompts
from semipd.execute.storage import SlotTable
from semipd.model.device_model import DeviceModel
from semipd.model.ops import TILE, DeviceStep, Outline
from semipd.model.sampler_device import INVALID, DeviceAdjustments, DeviceMasks, DeviceRules


@dataclass(frozen=True)
class Packed:
    """A checked batch, still on the host. slots, starts, counts: int64 [slices]; wanted: bool [slices],
    those with a sampled token. write: int64, where in the flat token table the sampled ids go. where and
    blocks: int64, places in the flat block tables and what goes there. opened: (slot, tokens) of each
    prompt that travels with it; prompts: their tokens, one after another. decode_only: every slice is one
    position with a sampled token, which is what a captured graph computes."""

    slots: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    wanted: np.ndarray
    rows: int
    decode_only: bool
    write: np.ndarray
    where: np.ndarray
    blocks: np.ndarray
    opened: tuple[tuple[int, int], ...]
    prompts: np.ndarray


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
        folder: str | os.PathLike[str] = "",
    ) -> None:
        """folder: with the tokenizer, for slots under a grammar."""
        nbytes = SlotTable.nbytes(slots, max_length, block_size)
        memory = np.zeros(nbytes, np.uint8)  # pages that nobody has written take none
        self.table = SlotTable(memory.data, slots, max_length, block_size)
        self.scratch = slots
        self.scratch_block = blocks
        self._vocabulary = model.spec.vocabulary
        self._unsent: dict[int, np.ndarray] = {}
        self._broken: dict[int, str] = {}  # slots whose prompt cannot be computed
        self._ruled: set[int] = set()  # open slots whose tokens may not be the best ones
        self._scored: set[int] = set()  # open slots that ask for scores
        self._constrained: set[int] = set()  # open slots with a constraint
        self._constraints = Constraints(self.table, folder, model.spec.vocabulary)
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
        adjusted = sampling.penalises or sampling.logit_bias or sampling.constraint is not None
        _note(self._ruled, slot, bool(sampling.temperature > 0 or sampling.ban_tokens or adjusted))
        asked = sampling.logprobs is not None or sampling.prompt_logprobs is not None
        _note(self._scored, slot, asked)
        _note(self._constrained, slot, sampling.constraint is not None)
        known = np.asarray(tokens, dtype=np.int64)
        self._broken.pop(slot, None)
        if known.size and not 0 <= known.min() <= known.max() < self._vocabulary:
            self._broken[slot] = f"a token is not in the vocabulary of {self._vocabulary}"
        self._unsent[slot] = known

    def close_slot(self, slot: int) -> None:
        if 0 <= slot < self.table.slots:
            self.table.close(slot)
            self._unsent.pop(slot, None)
            self._ruled.discard(slot)
            self._scored.discard(slot)
            self._constrained.discard(slot)

    def pack(self, batch: Batch, columns: np.ndarray, most_rows: int) -> Packed:
        """Check a batch, whose `columns_of` are given. Raises ValueError when it cannot run."""
        slots, starts, counts, flags = columns
        decode_only = bool((columns[2:] == 1).all())
        ends = starts + 1 if decode_only else starts + counts
        rows = len(slots) if decode_only else int(counts.sum())
        self._check(slots, starts, None if decode_only else ends)
        if rows > most_rows:
            raise ValueError(f"a step of {rows} positions; at most {most_rows} fit")
        wanted = flags.astype(bool)
        write = slots * self.tokens.shape[1] + ends
        opened = [slot for slot in slots.tolist() if slot in self._unsent] if self._unsent else []
        prompts = [self._unsent.pop(slot) for slot in opened]
        where, blocks = self._appends(batch)
        return Packed(
            slots,
            starts,
            counts,
            wanted,
            rows,
            decode_only,
            write if decode_only else write[wanted],
            where,
            blocks,
            tuple((slot, len(prompt)) for slot, prompt in zip(opened, prompts, strict=True)),
            np.concatenate(prompts) if prompts else _NOTHING,
        )

    def step(self, packed: Packed, backend: Backend) -> tuple[DeviceStep, torch.Tensor]:
        """Send a batch in one copy and apply what travels with it, on the current stream; the step, and
        where in the flat token table its ids go."""
        counts, slots = packed.counts, packed.slots
        first = np.cumsum(counts) - counts
        if packed.rows == len(slots):
            row_slots, positions = slots, packed.starts
        else:
            row_slots = np.repeat(slots, counts)
            positions = np.arange(packed.rows) + np.repeat(packed.starts - first, counts)
        tiles = _tiles(slots, packed.starts, counts, first).reshape(-1)
        singles, sample = first[counts == 1], (first + counts - 1)[packed.wanted]
        parts = (row_slots, positions, tiles, singles, sample, packed.write)
        sent = _send(backend, (*parts, packed.where, packed.blocks, packed.prompts))
        self._apply(packed, *sent[6:])
        step = DeviceStep(
            sent[0],
            sent[1],
            self.tokens,
            self.tables,
            sent[2].view(-1, 4),
            sent[3],
            None if packed.decode_only else sent[4],
        )
        return step, sent[5]

    def outline(
        self, slots: np.ndarray, starts: np.ndarray, counts: np.ndarray, graph: bool = False
    ) -> Outline:
        """What the host tells kernels that plan ahead."""
        return Outline(slots, starts, counts, self.tables, self.table.block_size, graph)

    def update(self, packed: Packed, backend: Backend) -> None:
        """Send and apply only the blocks and prompts that travel with a batch, on the current stream."""
        self._apply(packed, *_send(backend, (packed.where, packed.blocks, packed.prompts)))

    def _apply(
        self, packed: Packed, where: torch.Tensor, blocks: torch.Tensor, prompts: torch.Tensor
    ) -> None:
        if packed.where.size:
            self.append(where, blocks)
        taken = 0
        for slot, count in packed.opened:
            self.tokens[slot, :count].copy_(prompts[taken : taken + count])
            taken += count

    def append(self, where: torch.Tensor, blocks: torch.Tensor) -> None:
        """Write blocks to these places of the flat block tables; int64 [n] each, on the device."""
        self.tables.view(-1).index_copy_(0, where, blocks.int())

    def put(self, where: torch.Tensor, ids: torch.Tensor) -> None:
        """Write ids to these places of the flat token table; what is no token becomes one that exists."""
        self.tokens.view(-1).index_copy_(0, where, ids.clamp_min(0).int())

    def rules(self, packed: Packed, backend: Backend) -> DeviceRules | None:
        """The sampling rules of the rows to sample, or None when all of them are plainly greedy."""
        if not self._ruled:
            return None
        table, slots = self.table, packed.slots[packed.wanted]
        produced = (packed.starts + packed.counts)[packed.wanted]
        temperature = table.temperature[slots]
        banning = (produced < table.ban_until[slots]) & (table.ban_count[slots] > 0)
        adjusted = np.flatnonzero(table.adjusted[slots])
        masked = np.flatnonzero(table.constrained[slots])
        if not (banning.any() or (temperature > 0).any() or adjusted.size or masked.size):
            return None
        count = len(slots)
        top_p, top_k = table.top_p[slots], table.top_k[slots]
        width = max(int(table.ban_count[slots].max()), 1) if banning.any() else 1
        banned = table.ban_tokens[slots, :width]
        filler = np.arange(width) >= np.maximum(table.ban_count[slots], 1)[:, None]
        floats = np.stack((temperature, top_p, table.min_p[slots], np.zeros(count, np.float32)))
        whole = (top_k, table.seed[slots], produced, banning, np.where(filler, banned[:, :1], banned))
        sent = _send(backend, (floats.reshape(-1).view(np.int64), *(part.reshape(-1) for part in whole)))
        chances = sent[0].view(torch.float32).view(4, count)
        return DeviceRules(
            temperature=chances[0],
            top_p=chances[1],
            min_p=chances[2],
            top_k=sent[1],
            seed=sent[2],
            position=sent[3],
            banned=sent[5].view(count, width),
            banning=sent[4] != 0,
            filtered=bool((top_p < 1.0).any() or (top_k > 0).any()),
            adjustments=self._adjustments(adjusted, slots, produced, backend) if adjusted.size else None,
            masks=self._masks(masked, slots, produced, backend) if masked.size else None,
        )

    def _adjustments(
        self, rows: np.ndarray, slots: np.ndarray, produced: np.ndarray, backend: Backend
    ) -> DeviceAdjustments:
        """Of these rows. Tokens come from the device's own table, which has those of steps in flight."""
        table, slots, known = self.table, slots[rows], produced[rows]
        width, count = max(int(table.bias_count[slots].max()), 1), len(rows)
        filled = np.arange(width) < table.bias_count[slots][:, None]
        floats = (table.presence_penalty, table.frequency_penalty, table.repetition_penalty)
        chances = np.concatenate([values[slots] for values in floats] + [np.zeros(count, np.float32)])
        bias = np.zeros((count, width + width % 2), np.float32)
        bias[:, :width] = table.bias_values[slots, :width] * filled
        sent = _send(
            backend,
            (
                *(rows, slots, known, table.prompt_length[slots].astype(np.int64)),
                chances.view(np.int64),
                bias.reshape(-1).view(np.int64),
                (table.bias_tokens[slots, :width] * filled).reshape(-1),
            ),
        )
        penalties = sent[4].view(torch.float32).view(4, count)
        return DeviceAdjustments(
            rows=sent[0],
            seen=self.tokens[:, : int(known.max())].index_select(0, sent[1]),
            known=sent[2],
            prompt=sent[3],
            presence=penalties[0],
            frequency=penalties[1],
            repetition=penalties[2],
            bias_tokens=sent[6].view(count, width),
            bias=sent[5].view(torch.float32).view(count, -1)[:, :width],
        )

    def _masks(
        self, rows: np.ndarray, slots: np.ndarray, produced: np.ndarray, backend: Backend
    ) -> DeviceMasks:
        """Of these rows. Worked out here, while the device computes their logits."""
        words = np.stack(
            [
                self._constraints.words(slot, at)
                for slot, at in zip(slots[rows], produced[rows], strict=True)
            ]
        )
        even = np.pad(words, ((0, 0), (0, words.shape[1] % 2)))
        sent = _send(backend, (rows, even.reshape(-1).view(np.int64)))
        return DeviceMasks(sent[0], sent[1].view(len(rows), -1))

    def learn(self, packed: Packed, tokens: Sequence[int]) -> int | None:
        """Take note of tokens on which a constraint depends. The first row that has none although no
        constraint is to blame, or None."""
        if not self._constrained and INVALID not in tokens:
            return None
        ends = (packed.starts + packed.counts)[packed.wanted].tolist()
        for row, (slot, end) in enumerate(zip(packed.slots[packed.wanted].tolist(), ends, strict=True)):
            if slot in self._constrained:
                self.table.tokens[slot, end] = max(tokens[row], 0)
            elif tokens[row] == INVALID:
                return row
        return None

    def wanted(self, packed: Packed) -> Wanted | None:
        """The produced tokens of a batch to score."""
        if not self._scored:
            return None
        ends = packed.starts + packed.counts
        return wanted_of_produced(self.table, packed.slots, ends, np.flatnonzero(packed.wanted))

    def wanted_of_prompts(self, packed: Packed) -> Wanted | None:
        """The prompt tokens of a batch to score."""
        if not self._scored:
            return None
        return wanted_of_prompts(self.table, packed.slots, packed.starts, packed.counts)

    def _check(self, slots: np.ndarray, starts: np.ndarray, ends: np.ndarray | None) -> None:
        """ends: None means one position each, checked with the starts: this runs for every step."""
        table = self.table
        if not len(slots):
            raise ValueError("a batch without slices")
        if not all_below(slots, table.slots) or not table.opened[slots].all():
            raise ValueError("a slice names a slot that is not open")
        fits = all_below(starts, table.max_length)
        if ends is not None:
            fits = fits and ends.max() <= table.max_length and not (ends <= starts).any()
        if not fits:
            raise ValueError(f"a slice does not fit a slot of {table.max_length} tokens")
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


def _note(slots: set[int], slot: int, belongs: bool) -> None:
    (slots.add if belongs else slots.discard)(slot)


def all_below(values: np.ndarray, limit: int) -> bool:
    """Whether all of these int64 are at least 0 and below the limit: seen as unsigned, negative ones are
    large."""
    return int(values.view(np.uint64).max()) < limit


def _send(backend: Backend, parts: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Flat arrays to the device in one copy, as int64. Each begins at a multiple of 16 bytes, whatever the
    lengths of those before it: Triton compiles a kernel anew for pointers that are aligned less well."""
    sizes = [len(part) for part in parts]
    places = [size + size % 2 for size in sizes]
    values, at = np.zeros(sum(places), dtype=np.int64), 0
    for part, size, place in zip(parts, sizes, places, strict=True):
        values[at : at + size] = part
        at += place
    sent: tuple[torch.Tensor, ...] = torch.split(backend.upload(values), places)
    return [part[:size] for part, size in zip(sent, sizes, strict=True)]


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
