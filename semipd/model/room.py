"""Memory for weights, which every step reads from end to end: one stretch, on huge pages where the system
gives them. Single buffers of a few MiB get small pages, whatever malloc is told, and then cores wait for
addresses as well: decoding in 4 bits takes 7% longer, in bfloat16 2%.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
from collections.abc import Sequence

import torch

CHUNK = 64 << 20  # bytes that are asked for at a time; what is not written takes no memory
_ALIGNED = 64


class Room:
    """Hands out tensors next to one another, to any thread. Memory returns when its last tensor is gone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Zeros, until something else is written there."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            if self._chunk is None or self._used + size > len(self._chunk):
                self._chunk, self._used = _chunk(max(size, CHUNK)), 0
            chunk, offset = self._chunk, self._used
            self._used += -(-size // _ALIGNED) * _ALIGNED
        tensor = torch.frombuffer(chunk, dtype=dtype, count=count, offset=offset)
        return tensor.view(tuple(shape))

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy in here."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)


def _chunk(size: int) -> mmap.mmap:
    chunk = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # a system without: small pages then
        chunk.madvise(mmap.MADV_HUGEPAGE)
    return chunk
