"""A list of slices in, token ids out. Knows no phases: prefill and decode differ only in the counts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from semipd.core.types import Score, Slice
from semipd.execute.constraints import Constraints
from semipd.execute.storage import SlotTable
from semipd.execute.wire import pack
from semipd.model.attention import Pool, Ragged
from semipd.model.dense import DenseModel, StepInputs
from semipd.model.grammar import GrammarTokenizer
from semipd.model.logprobs import chances
from semipd.model.sampler import Adjustment, SamplingRows, sample
from semipd.model.step import Boundary, Chosen, FusedStep

_SCORED = 64  # prompt positions whose logits exist at the same time


class Produced(NamedTuple):
    """One token per slice with `sample`, in order. scores: as in `StepResult`."""

    tokens: list[int]
    scores: tuple[Score, ...] = ()


class Runner:
    """Runs steps of one lane over the shared storage: slot table, KV pool (`DenseModel.kv_shape`),
    weights."""

    def __init__(
        self,
        model: DenseModel,
        table: SlotTable,
        kv: torch.Tensor,
        fused: bool = True,
        folder: str | os.PathLike[str] = "",
        grammar: GrammarTokenizer | None = None,
    ) -> None:
        """fused: run steps in a few calls where the model can; the tokens are the same
        (`DenseModel.fused_step`). folder: with the tokenizer, for slots under a grammar; grammar: what was
        made of that before."""
        self._model = model
        self._table = table
        self._kv = kv
        self._pool = Pool.of(kv)
        self._constraints = Constraints(table, folder, model.spec.vocabulary, grammar)
        self._step = model.fused_step(kv, table) if fused else None

    def run(self, slices: Sequence[Slice] | bytes, boundary: Boundary) -> Produced:
        """Compute the slices (bytes: as `pack` makes them) and choose their tokens, each written to
        `table.tokens[slot, start + count]`. `boundary` is called between large operations.

        Raises ValueError for a slot that is not open, a range that does not fit it or an unknown token;
        FloatingPointError when logits are not finite. A step that raised may be run again."""
        packed = slices if isinstance(slices, bytes) else pack(slices)
        if not packed:
            return Produced([])
        try:
            if self._step is None or (chosen := self._step.run(packed, boundary)) is None:
                return self._forward(_columns(packed), boundary)
            if chosen.others:
                return self._finish(self._step, chosen, _columns(packed))
            return Produced(chosen.tokens)
        except FloatingPointError:
            slots, starts, counts, _ = _columns(packed).T
            self._clear(slots, starts + counts)
            raise

    def _forward(self, columns: np.ndarray, boundary: Boundary) -> Produced:
        """As `run`, for any slices."""
        self._check(columns)
        slots, starts, counts, _ = columns.T
        wanted = columns[:, 3].astype(bool)
        inputs = self._inputs(slots, starts, counts, wanted)
        scores: tuple[Score, ...] = ()
        if (self._table.prompt_logprobs[slots] >= 0).any():
            logits, scores = self._score_prompts(inputs, slots, starts, counts, boundary)
        else:
            logits = self._model.forward(inputs, self._kv, boundary)
        rows = np.flatnonzero(wanted)
        if not rows.size:
            return Produced([], scores)
        tokens, more = self._choose(logits, slots[rows], (starts + counts)[rows], rows)
        return Produced(tokens, scores + more)

    def _finish(self, step: FusedStep, chosen: Chosen, columns: np.ndarray) -> Produced:
        """Choose the tokens that the step could not."""
        tokens, others = chosen
        rows = np.flatnonzero(columns[:, 3])[others]
        slots, starts, counts, _ = columns[rows].T
        found, scores = self._choose(step.logits(others), slots, starts + counts, rows)
        for place, token in zip(others, found, strict=True):
            tokens[place] = token
        return Produced(tokens, scores)

    def _choose(
        self, logits: torch.Tensor, slots: np.ndarray, produced: np.ndarray, rows: np.ndarray
    ) -> Produced:
        """A token for each row of logits, written to the table, too, and the scores that are asked for.
        produced: the tokens' positions; rows: of their slices in the batch. Overwrites logits."""
        counts = self._table.logprobs[slots]
        asked = np.flatnonzero(counts >= 0)
        raw = logits[torch.from_numpy(asked)] if asked.size else logits[:0]  # a copy
        tokens = sample(logits, self._rules(slots, produced), self._model.kernels)
        self._table.tokens[slots, produced] = np.maximum(tokens, 0)  # a step ahead may read NO_TOKEN's
        found = chances(raw, [max(tokens[place], 0) for place in asked], counts[asked].tolist())
        places = zip(rows[asked].tolist(), produced[asked].tolist(), found, strict=True)
        return Produced(tokens, tuple(Score(row, position, *chance) for row, position, chance in places))

    def _score_prompts(
        self,
        inputs: StepInputs,
        slots: np.ndarray,
        starts: np.ndarray,
        counts: np.ndarray,
        boundary: Boundary,
    ) -> tuple[torch.Tensor, tuple[Score, ...]]:
        """Compute a step; the logits of its rows to sample, and scores of the prompt tokens that follow its
        other positions, where they are asked for."""
        table, firsts = self._table, np.cumsum(counts) - counts
        ends = np.minimum(starts + counts, table.prompt_length[slots] - 1)
        asked = [
            (index, int(firsts[index]) + position - int(starts[index]), position + 1)
            for index in np.flatnonzero(table.prompt_logprobs[slots] >= 0).tolist()
            for position in range(int(starts[index]), int(ends[index]))
        ]  # slice, row and position of each token
        at = torch.tensor([row for _, row, _ in asked], dtype=torch.int64)
        whole = replace(inputs, sample=torch.cat((inputs.sample, at)))
        hidden, sampled = self._model.hidden(whole, self._kv, boundary), inputs.sample.shape[0]
        scores: list[Score] = []
        for first in range(0, len(asked), _SCORED):
            boundary()
            part = asked[first : first + _SCORED]
            logits = self._model.logits_of(hidden[sampled + first : sampled + first + len(part)])
            tokens = [int(table.tokens[slots[index], position]) for index, _, position in part]
            most = [int(table.prompt_logprobs[slots[index]]) for index, _, _ in part]
            found = chances(logits, tokens, most)
            scores += [
                Score(index, position, *chance)
                for (index, _, position), chance in zip(part, found, strict=True)
            ]
        boundary()
        return self._model.logits_of(hidden[:sampled]), tuple(scores)

    def _check(self, columns: np.ndarray) -> None:
        """Against the table. Raises ValueError."""
        slots, starts, counts, _ = columns.T
        table = self._table
        if slots.min() < 0 or slots.max() >= table.slots or not table.opened[slots].all():
            raise ValueError(f"a slice names a slot that is not open: {self._closed(slots)}")
        if starts.min() < 0 or counts.min() < 1 or (starts + counts).max() > table.max_length:
            raise ValueError(f"a slice does not fit a slot of {table.max_length} tokens")

    def _closed(self, slots: np.ndarray) -> list[int]:
        known = self._table.opened
        return [int(slot) for slot in slots if not 0 <= slot < len(known) or not known[slot]]

    def _inputs(
        self, slots: np.ndarray, starts: np.ndarray, counts: np.ndarray, wanted: np.ndarray
    ) -> StepInputs:
        table, size = self._table, self._table.block_size
        ends = np.cumsum(counts)
        if ends[-1] == len(slots):
            row_slots, positions = slots, starts
        else:
            row_slots = np.repeat(slots, counts)
            positions = np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts)
        tokens = table.tokens[row_slots, positions].astype(np.int64)
        if tokens.min() < 0 or tokens.max() >= self._model.spec.vocabulary:
            raise ValueError(f"a token is not in the vocabulary of {self._model.spec.vocabulary}")
        blocks = table.blocks[row_slots, positions // size]
        in_use = -(-int((starts + counts).max()) // size)
        return StepInputs(
            tokens=torch.from_numpy(tokens),
            positions=torch.from_numpy(positions),
            ragged=Ragged(starts, counts, table.blocks[slots, :in_use]),
            kv_rows=self._pool.rows(blocks, positions % size),
            sample=torch.from_numpy(ends[wanted] - 1),
        )

    def _clear(self, slots: np.ndarray, ends: np.ndarray) -> None:
        """Zero what is not finite in the KV blocks of these slots. A later owner of such a block masks what
        it has not written, but no mask hides a NaN."""
        counts = -(-ends // self._table.block_size)
        used = [self._table.blocks[slot, :count] for slot, count in zip(slots, counts, strict=True)]
        blocks = torch.from_numpy(np.unique(np.concatenate(used)).astype(np.int64))
        for layer in self._kv:
            layer[:, blocks] = torch.nan_to_num(layer[:, blocks], nan=0.0, posinf=0.0, neginf=0.0)

    def _rules(self, slots: np.ndarray, produced: np.ndarray) -> SamplingRows:
        table = self._table
        return SamplingRows(
            temperature=table.temperature[slots],
            top_p=table.top_p[slots],
            top_k=table.top_k[slots],
            min_p=table.min_p[slots],
            seed=table.seed[slots],
            position=produced,
            ban_until=table.ban_until[slots],
            ban_count=table.ban_count[slots],
            ban_tokens=table.ban_tokens[slots],
            adjustments={
                row: self._adjustment(int(slots[row]), int(produced[row]))
                for row in np.flatnonzero(table.adjusted[slots]).tolist()
            },
            masks={
                row: self._constraints.mask(int(slots[row]), int(produced[row]))
                for row in np.flatnonzero(table.constrained[slots]).tolist()
            },
        )

    def _adjustment(self, slot: int, position: int) -> Adjustment:
        """Of the logits for the token at `position`."""
        table = self._table
        biases = table.bias_count[slot]
        return Adjustment(
            seen=table.tokens[slot, :position],
            prompt_length=int(table.prompt_length[slot]),
            presence=table.presence_penalty[slot],
            frequency=table.frequency_penalty[slot],
            repetition=table.repetition_penalty[slot],
            bias_tokens=table.bias_tokens[slot, :biases],
            bias=table.bias_values[slot, :biases],
        )


def _columns(packed: bytes) -> np.ndarray:
    """Slots, starts, counts and sample flags of packed slices, int64 [n, 4]."""
    return np.frombuffer(packed, np.int64).reshape(-1, 4).copy()
