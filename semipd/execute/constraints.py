"""Which tokens the slots' constraints allow: worked out where tokens are chosen, from the slot table alone.

What is kept between steps only saves work: whoever has nothing, such as a worker that has just been forked,
works the same out anew.
"""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from semipd.core.types import Constraint
from semipd.execute.storage import SlotTable
from semipd.model.grammar import WORD, Follower, GrammarTokenizer
from semipd.model.grammar_text import GrammarError

log = logging.getLogger("semipd")

_GRAMMARS = 32  # compiled ones that are kept
# A mask takes 0.1 ms, a hard one 10, and everybody in the batch waits for it. A text whose masks take more
# processor time than this many seconds each, and as many besides, does not go on.
SLOW, ALLOWED = 0.02, 1.0


@dataclass
class _Known:
    """Of one slot. opening: which of its openings this belongs to. allowed: a mask, before the rest.
    seconds: what `masks` masks took."""

    opening: int
    constraint: Constraint
    allowed: np.ndarray
    follower: Follower | None
    seconds: float = 0.0
    masks: int = 0


class Constraints:
    """folder: of the model, with its tokenizer.json. vocabulary: entries of a row of logits. tokenizer:
    made of these before."""

    def __init__(
        self,
        table: SlotTable,
        folder: str | os.PathLike[str],
        vocabulary: int,
        tokenizer: GrammarTokenizer | None = None,
    ) -> None:
        self._table = table
        self._file = Path(folder) / "tokenizer.json"
        self._vocabulary = vocabulary
        self._tokenizer = tokenizer
        self._compiled: OrderedDict[str, Follower] = OrderedDict()
        self._known: dict[int, _Known] = {}

    def words(self, slot: int, position: int) -> np.ndarray:
        """Tokens that may be produced at this position of a constrained slot, bits of uint32 as in
        `Follower.mask`; none where nothing may. The table has the tokens below the position."""
        table = self._table
        known = self._known.get(slot)
        if known is None or known.opening != table.opening[slot]:
            self._known = {at: one for at, one in self._known.items() if table.opened[at]}
            known = self._known[slot] = self._open(slot)
        output = table.tokens[slot, table.prompt_length[slot] : position]
        allowed = known.allowed.copy()
        if known.constraint.grammar:
            allowed &= self._follow(known, output)
        for *before, last in known.constraint.bad_words:
            if before == output[len(output) - len(before) :].tolist():
                allowed[last // WORD] &= ~np.uint32(1 << last % WORD)
        return allowed

    def mask(self, slot: int, position: int) -> np.ndarray:
        """The same as bool [vocabulary]."""
        bits = np.unpackbits(self.words(slot, position).view(np.uint8), bitorder="little")
        return bits[: self._vocabulary].view(np.bool_)

    def _follow(self, known: _Known, output: np.ndarray) -> np.ndarray:
        """What the grammar allows after this output; none where it cannot be followed any more."""
        if known.follower is None:
            return np.zeros_like(known.allowed)
        started = time.thread_time()
        mask = known.follower.mask(output)
        if known.follower.lost and known.follower.spoiled():
            compiled = self._compiled.get(known.constraint.grammar)
            if compiled is not None and compiled.spoiled():
                del self._compiled[known.constraint.grammar]
            known.follower = self._follower(known.constraint)
            mask = known.follower.mask(output)
        known.seconds += time.thread_time() - started
        known.masks += 1
        if known.seconds > ALLOWED + SLOW * known.masks:
            log.warning("a grammar took %.1f s for %d tokens: its request ends", known.seconds, known.masks)
            known.follower = None
        return mask

    def _open(self, slot: int) -> _Known:
        constraint = self._table.constraint_of(slot)
        follower = None
        if constraint.grammar:
            try:
                follower = self._follower(constraint)
            except GrammarError as error:  # the request's end, and no other's
                log.warning("%s", error)
        return _Known(int(self._table.opening[slot]), constraint, self._always(constraint), follower)

    def _always(self, constraint: Constraint) -> np.ndarray:
        """The mask of what does not depend on the text."""
        bits = np.zeros(-(-self._vocabulary // WORD) * WORD, np.uint8)
        bits[list(constraint.allowed) if constraint.allowed else slice(self._vocabulary)] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def _follower(self, constraint: Constraint) -> Follower:
        if self._tokenizer is None or set(self._tokenizer.ends) != set(constraint.ends):
            self._tokenizer = GrammarTokenizer(self._file, self._vocabulary, constraint.ends)
            self._compiled.clear()
        compiled = self._compiled.get(constraint.grammar)
        if compiled is None:
            compiled = Follower(self._tokenizer, constraint.grammar)
            self._compiled[constraint.grammar] = compiled
            if len(self._compiled) > _GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(constraint.grammar)
        return compiled.copy()
