"""What outlives a worker: the slot table, one flat buffer that the planner's process and the workers map.

numpy only, so that the planner's process needs no torch. Every field is an array indexed by slot. The
planner's side writes a slot before it sends the step that reads it; only `tokens` is also written by
workers (each step writes the token after its last position).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from semipd.core.types import BlockAppend, Constraint, Sampling

MAX_BANNED = 80  # ids that a slot can ban while min_tokens holds: stop ids plus end-of-sequence ids
MAX_BIASES = 300  # entries of `logit_bias`
MAX_CONSTRAINT = 2**17  # bytes of a constraint; memory that no slot has used is not there yet


class SlotTable:
    """Views over `buffer` (at least `nbytes(...)` long, zeroed when new).

    tokens: int32 [slots, max_length + 1]. blocks: int32 [slots, max_blocks]. The rest: one value a slot.
    """

    def __init__(
        self, buffer: memoryview | bytearray, slots: int, max_length: int, block_size: int
    ) -> None:
        self.slots = slots
        self.max_length = max_length
        self.block_size = block_size
        offset = 0
        for name, dtype, shape in _fields(slots, max_length, block_size):
            count = int(np.prod(shape))
            view: np.ndarray = np.frombuffer(buffer, dtype=dtype, count=count, offset=offset).reshape(shape)
            setattr(self, name, view)
            offset += _padded(count * np.dtype(dtype).itemsize)

    tokens: np.ndarray
    blocks: np.ndarray
    temperature: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    top_k: np.ndarray
    seed: np.ndarray
    ban_until: np.ndarray
    ban_count: np.ndarray
    ban_tokens: np.ndarray
    presence_penalty: np.ndarray
    frequency_penalty: np.ndarray
    repetition_penalty: np.ndarray
    prompt_length: np.ndarray
    bias_count: np.ndarray
    bias_tokens: np.ndarray
    bias_values: np.ndarray
    logprobs: np.ndarray  # -1: none wanted
    prompt_logprobs: np.ndarray  # -1: none wanted
    constraint: np.ndarray  # uint8 [slots, MAX_CONSTRAINT], of which the first `constraint_bytes` hold one
    constraint_bytes: np.ndarray
    constrained: np.ndarray
    opening: np.ndarray  # how often the slot was opened: tells whoever remembers something of it
    adjusted: np.ndarray  # whether penalties or biases change logits
    special: np.ndarray  # whether it takes more than the best entry of the logits, bans aside
    opened: np.ndarray

    @staticmethod
    def nbytes(slots: int, max_length: int, block_size: int) -> int:
        return sum(
            _padded(int(np.prod(shape)) * np.dtype(dtype).itemsize)
            for _, dtype, shape in _fields(slots, max_length, block_size)
        )

    def open(self, slot: int, tokens: Sequence[int], sampling: Sampling) -> None:
        """Write a slot's known tokens and sampling rule. Raises ValueError out of range."""
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot} is out of range 0 to {self.slots - 1}")
        if len(tokens) > self.max_length:
            raise ValueError(f"{len(tokens)} tokens do not fit a slot of {self.max_length}")
        if len(sampling.ban_tokens) > MAX_BANNED:
            raise ValueError(f"at most {MAX_BANNED} tokens can be banned, not {len(sampling.ban_tokens)}")
        if len(sampling.logit_bias) > MAX_BIASES:
            raise ValueError(f"at most {MAX_BIASES} biases, not {len(sampling.logit_bias)}")
        constraint = b"" if sampling.constraint is None else _encoded(sampling.constraint)
        if len(constraint) > MAX_CONSTRAINT:
            raise ValueError(f"a constraint of {len(constraint)} bytes; at most {MAX_CONSTRAINT} fit")
        self.opening[slot] += 1
        self.constraint[slot, : len(constraint)] = np.frombuffer(constraint, np.uint8)
        self.constraint_bytes[slot] = len(constraint)
        self.constrained[slot] = sampling.constraint is not None
        self.tokens[slot, : len(tokens)] = tokens
        self.temperature[slot] = sampling.temperature
        self.top_p[slot] = sampling.top_p
        self.min_p[slot] = sampling.min_p
        self.top_k[slot] = sampling.top_k
        self.seed[slot] = sampling.seed
        self.ban_until[slot] = sampling.ban_until
        self.ban_count[slot] = len(sampling.ban_tokens)
        self.ban_tokens[slot, : len(sampling.ban_tokens)] = sampling.ban_tokens
        self._adjust(slot, sampling)
        self.logprobs[slot] = -1 if sampling.logprobs is None else sampling.logprobs
        self.prompt_logprobs[slot] = -1 if sampling.prompt_logprobs is None else sampling.prompt_logprobs
        asked = sampling.logprobs is not None
        ruled = self.adjusted[slot] or self.constrained[slot]
        self.special[slot] = sampling.temperature > 0 or asked or ruled
        self.opened[slot] = True

    def _adjust(self, slot: int, sampling: Sampling) -> None:
        """Write what changes logits."""
        self.presence_penalty[slot] = sampling.presence_penalty
        self.frequency_penalty[slot] = sampling.frequency_penalty
        self.repetition_penalty[slot] = sampling.repetition_penalty
        self.prompt_length[slot] = sampling.prompt_length
        count = self.bias_count[slot] = len(sampling.logit_bias)
        self.bias_tokens[slot, :count] = [token for token, _ in sampling.logit_bias]
        self.bias_values[slot, :count] = [value for _, value in sampling.logit_bias]
        self.adjusted[slot] = sampling.penalises or count > 0

    def constraint_of(self, slot: int) -> Constraint:
        """The constraint of a slot that has one."""
        import msgspec  # as in `_encoded`

        data = self.constraint[slot, : self.constraint_bytes[slot]].tobytes()
        return msgspec.msgpack.decode(data, type=Constraint)

    def close(self, slot: int) -> None:
        self.opened[slot] = False

    def append(self, appends: Sequence[BlockAppend]) -> None:
        """Extend block tables. Entries that a step in flight reads are never changed (planner's rule)."""
        for slot, first, blocks in appends:
            self.blocks[slot, first : first + len(blocks)] = blocks


def _fields(slots: int, max_length: int, block_size: int) -> tuple[tuple[str, type, tuple[int, ...]], ...]:
    max_blocks = -(-max_length // block_size) + 1
    return (
        ("tokens", np.int32, (slots, max_length + 1)),
        ("blocks", np.int32, (slots, max_blocks)),
        ("temperature", np.float32, (slots,)),
        ("top_p", np.float32, (slots,)),
        ("min_p", np.float32, (slots,)),
        ("top_k", np.int32, (slots,)),
        ("seed", np.int64, (slots,)),
        ("ban_until", np.int32, (slots,)),
        ("ban_count", np.int32, (slots,)),
        ("ban_tokens", np.int32, (slots, MAX_BANNED)),
        ("presence_penalty", np.float32, (slots,)),
        ("frequency_penalty", np.float32, (slots,)),
        ("repetition_penalty", np.float32, (slots,)),
        ("prompt_length", np.int32, (slots,)),
        ("bias_count", np.int32, (slots,)),
        ("bias_tokens", np.int32, (slots, MAX_BIASES)),
        ("bias_values", np.float32, (slots, MAX_BIASES)),
        ("logprobs", np.int32, (slots,)),
        ("prompt_logprobs", np.int32, (slots,)),
        ("constraint", np.uint8, (slots, MAX_CONSTRAINT)),
        ("constraint_bytes", np.int32, (slots,)),
        ("constrained", np.bool_, (slots,)),
        ("opening", np.int64, (slots,)),
        ("adjusted", np.bool_, (slots,)),
        ("special", np.bool_, (slots,)),
        ("opened", np.bool_, (slots,)),
    )


def _padded(nbytes: int) -> int:
    """Each field starts on a cache line of its own."""
    return -(-nbytes // 64) * 64


def _encoded(constraint: Constraint) -> bytes:
    import msgspec  # here, since a GPU's executor is tested where it is not installed

    return msgspec.msgpack.encode(constraint)
