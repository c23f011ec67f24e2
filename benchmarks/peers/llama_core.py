"""llama.cpp's batched core, driven as its own server drives it: every running sequence adds its token to a
batch, prompts fill the rest up to the batch size, one `llama_decode` runs them all.

Runs under an interpreter that has llama-cpp-python; the greedy choice is numpy's argmax.
"""

from __future__ import annotations

import ctypes
from collections import deque
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy

_QUIET = llama_cpp.llama_log_callback(lambda level, text, data: None)


@dataclass
class Sequence:
    """One request. at: how many of `tokens` are in the cache; left: tokens still to produce."""

    key: Any
    tokens: list[int]
    left: int
    slot: int = -1
    at: int = 0


class Batch:
    """A `llama_batch` over numpy arrays, each token in one sequence."""

    def __init__(self, size: int) -> None:
        self.size, self.count = size, 0
        self.token, self.place, self.slots = (numpy.zeros(size, numpy.int32) for _ in range(3))
        self.wanted = numpy.zeros(size, numpy.int8)
        self.ones = numpy.ones(size, numpy.int32)
        addresses = self.slots.ctypes.data + 4 * numpy.arange(size, dtype=numpy.uint64)
        self.pointers = addresses.astype(numpy.uint64)
        fields = dict(llama_cpp.llama_batch._fields_)

        def pointer(array: Any, name: str) -> Any:
            return ctypes.cast(array.ctypes.data, fields[name])

        self.native = llama_cpp.llama_batch(
            n_tokens=0,
            token=pointer(self.token, "token"),
            embd=None,
            pos=pointer(self.place, "pos"),
            n_seq_id=pointer(self.ones, "n_seq_id"),
            seq_id=pointer(self.pointers, "seq_id"),
            logits=pointer(self.wanted, "logits"),
        )

    def put(self, sequence: Sequence, most: int) -> bool:
        """The next tokens of a sequence, at most so many; True when its last known one is among them."""
        known = len(sequence.tokens)
        count = min(most, known - sequence.at, self.size - self.count)
        rows = slice(self.count, self.count + count)
        self.token[rows] = sequence.tokens[sequence.at : sequence.at + count]
        self.place[rows] = range(sequence.at, sequence.at + count)
        self.slots[rows] = sequence.slot
        self.wanted[rows] = 0
        self.count += count
        sequence.at += count
        if count and sequence.at == known:
            self.wanted[self.count - 1] = 1
            return True
        return False


class Core:
    """A model, a cache for `sequences` of `length` tokens, and steps of at most `batch` tokens.

    unified: one cache for all sequences instead of a part for each. Parts save work in attention, but only
    sequences in neighbouring parts, and only equally many tokens of each, are computed together.
    quantized: whether the file is."""

    def __init__(
        self,
        file: str,
        threads: int,
        sequences: int,
        length: int,
        batch: int,
        unified: bool,
        quantized: bool,
    ) -> None:
        llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        loading = llama_cpp.llama_model_default_params()
        # Pack weights for this CPU; but 0.3.36, built with AMX, ends with a protection fault at ldtilecfg
        # when it packs quantised ones.
        loading.use_extra_bufts = not (quantized and built_with_amx())
        model = llama_cpp.llama_model_load_from_file(file.encode(), loading)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = sequences * length, sequences
        settings.n_batch = max(batch, sequences)
        settings.n_ubatch = min(settings.n_batch, 512)
        settings.n_outputs_max = sequences
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = unified
        self.context = llama_cpp.llama_init_from_model(model, settings) if model else None
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = Batch(settings.n_batch)
        self.free = list(range(sequences))[::-1]  # the lowest is taken first
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, key: Any, prompt: list[int], new: int) -> None:
        self.waiting.append(Sequence(key, list(prompt), new))

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def step(self) -> list[tuple[Any, int, bool]]:
        """Run one batch. (key, token, whether it was the last) of every sequence that got one."""
        while self.free and self.waiting:
            sequence = self.waiting.popleft()
            sequence.slot = self.free.pop()
            self.running.append(sequence)
            self.running.sort(key=lambda s: s.slot)
        self.batch.count = 0
        ready = [(s, self.batch.count - 1) for s in self._decoding() if self.batch.put(s, 1)]
        for sequence in self.running:
            if sequence.at < len(sequence.tokens) and self.batch.put(sequence, self.batch.size):
                ready.append((sequence, self.batch.count - 1))
        self.batch.native.n_tokens = self.batch.count
        if llama_cpp.llama_decode(self.context, self.batch.native):
            raise RuntimeError("llama_decode failed")
        return [self._take(sequence, row) for sequence, row in ready]

    def _decoding(self) -> list[Sequence]:
        return [s for s in self.running if s.at and len(s.tokens) - s.at == 1]

    def _take(self, sequence: Sequence, row: int) -> tuple[Any, int, bool]:
        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        token = int(numpy.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())
        sequence.tokens.append(token)
        sequence.left -= 1
        if not sequence.left:
            self.running.remove(sequence)
            llama_cpp.llama_memory_seq_rm(self.memory, sequence.slot, -1, -1)
            self.free = sorted([*self.free, sequence.slot], reverse=True)
        return sequence.key, token, not sequence.left


def built_with_amx() -> bool:
    """Whether the library uses matrix units; without GGML_NATIVE=OFF a build takes what it finds."""
    info: bytes = llama_cpp.llama_print_system_info()
    return b"AMX_INT8 = 1" in info
