"""What the planner's process, the resident and the workers say to each other: msgpack over SEQPACKET
sockets, one message a packet. No tensor travels, and nothing is unpickled.

    planner ── Start, Fork (+ a socket), Close ──> resident      Ready | Failed | Forked ──> planner
    planner ── Job ──> worker                                    Done ──> planner
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Generic, TypeVar

import msgspec

from semipd.core.types import Score, Slice

PACKET = 1 << 18  # bytes; a batch or result of 4,096 slices takes less than a quarter of it
_SCORE, _CHANCE = 26, 14  # most bytes of a `Score`, and of one of the best in it


class Start(msgspec.Struct, frozen=True, tag=True):
    """What to load, and the shape of the shared memory whose descriptor comes along."""

    model: str
    dtype: str
    load_format: str
    seed: int
    slots: int
    max_length: int
    blocks: int
    block_size: int
    cores: tuple[int, ...]
    parent: int  # process id
    log_level: int
    quantization: str = "none"
    quantize_head: bool = False


class Fork(msgspec.Struct, frozen=True, tag=True):
    """Fork a worker for lane number `lane`, in place of the one before; its socket comes along."""

    lane: int


class Close(msgspec.Struct, frozen=True, tag=True):
    """End the workers and then yourself."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Loaded; forks are welcome."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The resident cannot do its work and ends. config: the user's setting or folder is to blame."""

    message: str
    config: bool = False


class Forked(msgspec.Struct, frozen=True, tag=True):
    """The worker of this lane runs under this process id."""

    lane: int
    pid: int


class Job(msgspec.Struct, frozen=True, array_like=True):
    """One batch, its slices as `pack` makes them. Its block tables are already in the slot table."""

    step: int
    slices: bytes


class Done(msgspec.Struct, frozen=True, array_like=True):
    """What became of a job: the fields of `StepResult`. more: only some of its scores; others follow."""

    step: int
    tokens: tuple[int, ...]
    started: float
    finished: float
    error: str | None = None
    scores: tuple[Score, ...] = ()
    more: bool = False


def pack(slices: Iterable[Slice]) -> bytes:
    """Slices as the compiled step reads them: four 64-bit numbers each, in the order of their fields."""
    numbers = tuple(chain.from_iterable(slices))
    return struct.pack(f"{len(numbers)}q", *numbers)


def cut_scores(scores: Sequence[Score]) -> list[tuple[Score, ...]]:
    """The scores in parts that each fit into a packet; at least one part."""
    parts: list[tuple[Score, ...]] = []
    first = size = 0
    for index, score in enumerate(scores):
        taken = _SCORE + _CHANCE * len(score.ids)
        if size + taken > PACKET // 2:
            parts.append(tuple(scores[first:index]))
            first, size = index, 0
        size += taken
    return [*parts, tuple(scores[first:])]


Order = Start | Fork | Close
Answer = Ready | Failed | Forked
Message = TypeVar("Message")


class Channel(Generic[Message]):
    """One end of a SEQPACKET socket that receives messages of one type. Owns the socket.

    Every receiving method raises EOFError when the other end is gone and all it sent has been read.
    """

    def __init__(self, end: socket.socket, receives: object) -> None:
        self._socket = end
        self._buffer = bytearray(PACKET)
        self._view = memoryview(self._buffer)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(receives)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: msgspec.Struct, descriptors: Sequence[int] = ()) -> None:
        """Send one message. Raises BrokenPipeError or ConnectionResetError when the other end is gone."""
        data = self._encoder.encode(message)
        if descriptors:
            socket.send_fds(self._socket, [data], list(descriptors))
        else:
            self._socket.send(data)

    def receive(self) -> Message:
        """The next message; blocks."""
        message = self._receive(0)
        assert message is not None
        return message

    def poll(self) -> Message | None:
        """The next message, or None when there is none now."""
        return self._receive(socket.MSG_DONTWAIT)

    def receive_with_descriptors(self) -> tuple[Message, list[int]]:
        """The next message and the file descriptors that came along; blocks."""
        data, descriptors, _, _ = socket.recv_fds(self._socket, PACKET, 4, socket.MSG_CMSG_CLOEXEC)
        if not data:
            raise EOFError("the other process is gone")
        return self._decoder.decode(data), descriptors

    def close(self) -> None:
        self._socket.close()

    def _receive(self, flags: int) -> Message | None:
        while True:
            try:
                count = self._socket.recv_into(self._buffer, 0, flags)
            except BlockingIOError:
                return None
            except ConnectionResetError:
                continue  # told once, when the other end died with messages unread; what it sent follows
            if not count:
                raise EOFError("the other process is gone")
            return self._decoder.decode(self._view[:count])


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends that keep the borders of messages."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
