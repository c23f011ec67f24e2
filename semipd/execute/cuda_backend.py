"""`backend.Backend` on an NVIDIA GPU, through torch; partitions through `cuda_driver`."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from semipd.core.errors import ConfigError
from semipd.core.types import Lane
from semipd.execute.backend import Pair, Side
from semipd.execute.cuda_driver import MOST_PAIRS, GreenContext, GreenContexts, partition_pairs
from semipd.model.attention_flashinfer import FlashInferOps, load_flashinfer
from semipd.model.device_model import DeviceModel
from semipd.model.ops import Ops

PROGRAMS_PER_SM = 32  # of the kernel that finds out which SMs a stream has

log = logging.getLogger("semipd")


@dataclass(frozen=True)
class CudaEvent:
    """A recorded torch event with timing."""

    event: torch.cuda.Event

    def done(self) -> bool:
        return bool(self.event.query())

    def seconds_since(self, earlier: CudaEvent) -> float:
        return float(earlier.event.elapsed_time(self.event)) / 1e3


@dataclass(frozen=True)
class CudaReading:
    """A pinned copy that an asynchronous transfer fills."""

    host: torch.Tensor

    def values(self) -> np.ndarray:
        array: np.ndarray = self.host.numpy()
        return array


class CudaBackend:
    """GPU number `ordinal` of those that this process sees. Raises ConfigError when it cannot be used."""

    def __init__(
        self,
        ordinal: int = 0,
        partitioned: bool = True,
        attention: str = "triton",
        most_pairs: int = MOST_PAIRS,
    ) -> None:
        """attention: triton or flashinfer. most_pairs: partitions to make, of those that there can be."""
        # Before the driver starts: with fewer hardware queues than streams, one lane's launches may queue
        # up behind the other's.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        if not torch.cuda.is_available():
            raise ConfigError(
                "torch sees no CUDA device here; use --device cpu, or install torch with CUDA"
            )
        if ordinal >= torch.cuda.device_count():
            raise ConfigError(f"there is no GPU number {ordinal}")
        gc.collect()  # what this process used the card for before may lie in cycles
        try:
            torch.cuda.set_device(ordinal)
            torch.zeros(1, device="cuda")  # creates the primary context, before any green one
        except RuntimeError as error:
            raise ConfigError(f"GPU {ordinal} cannot be used: {str(error).splitlines()[0]}") from error
        properties = torch.cuda.get_device_properties(ordinal)
        self.name: str = properties.name
        self.units: int = properties.multi_processor_count
        self.device = torch.device("cuda", ordinal)
        self._partitioned, self._attention, self._most_pairs = partitioned, attention, most_pairs
        self._contexts: GreenContexts | None = None
        self._graph_pool = torch.cuda.graph_pool_handle()

    def whole(self, lane: Lane) -> Side:
        priority = -1 if lane is Lane.DECODE else 0
        return Side(torch.cuda.Stream(device=self.device, priority=priority), self.units)

    def partition(self) -> list[Pair]:
        if not self._partitioned:
            return []
        try:
            self._contexts = GreenContexts(self.device.index)
            found = partition_pairs(self._contexts, self._most_pairs)
            pairs = [
                Pair(*(self._side(context, index) for context in (prefill, decode)))
                for index, (decode, prefill) in enumerate(found)
            ]
            self._try(pairs[0])
        except RuntimeError as error:  # CannotPartition, or a kernel or an event on these streams
            if (why := self.lost(error)) is not None:
                raise ConfigError(f"{why} (while the GPU was partitioned)") from error
            line = str(error).splitlines()[0]
            log.warning("the GPU cannot be partitioned, both lanes share it with priorities: %s", line)
            self._give_back()
            return []
        for pair in pairs:
            log.debug("partition: prefill %d SMs, decode %d", pair.prefill.units, pair.decode.units)
        return pairs

    def _try(self, pair: Pair) -> None:
        """What every step relies on: a product on one side, then one on the other, ordered and timed by
        events. Raises what the driver does."""
        value = torch.ones((64, 64), device=self.device)
        self.settle()
        events: list[CudaEvent] = []
        for side in (pair.prefill, pair.decode):
            if events:
                self.wait(side, events[-1])
            with self.on(side):
                value = value @ value
            events.append(self.record(side))
        self.settle()
        events[1].seconds_since(events[0])

    def _side(self, context: GreenContext, index: int) -> Side:
        side = Side(torch.cuda.ExternalStream(context.stream, device=self.device), context.units, index)
        return replace(side, sms=self._sms(side))

    def _sms(self, side: Side) -> frozenset[int] | None:
        """The SMs of a side, or None when as many as granted were not seen."""
        # Here, since Triton is not installed beside a CPU's torch.
        from semipd.execute.smid import launch_smid

        with torch.cuda.stream(side.stream):
            out = torch.empty(2 * PROGRAMS_PER_SM * self.units, dtype=torch.int32, device=self.device)
            launch_smid(out)
        side.stream.synchronize()
        seen = frozenset(out[: out.shape[0] // 2].tolist())
        if len(seen) == side.units:
            return seen
        log.warning("a partition of %d SMs ran on %d: it is taken to overlap", side.units, len(seen))
        return None

    def on(self, side: Side) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = torch.cuda.stream(side.stream)
        return context

    def record(self, side: Side) -> CudaEvent:
        event = torch.cuda.Event(enable_timing=True)
        event.record(side.stream)
        return CudaEvent(event)

    def wait(self, side: Side, event: CudaEvent) -> None:
        side.stream.wait_event(event.event)

    def upload(self, values: np.ndarray) -> torch.Tensor:
        # Pinned memory comes from torch's cache, which keeps it until the copy is done.
        return (
            torch.from_numpy(np.ascontiguousarray(values)).pin_memory().to(self.device, non_blocking=True)
        )

    def upload_into(self, target: torch.Tensor, values: np.ndarray) -> None:
        target.copy_(torch.from_numpy(np.ascontiguousarray(values)).pin_memory(), non_blocking=True)

    def read(self, source: torch.Tensor) -> CudaReading:
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        host.copy_(source, non_blocking=True)
        return CudaReading(host)

    def capture(self, side: Side, launch: Callable[[], None]) -> Callable[[], None]:
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # Only this thread launches here, but others of the process may use torch. A capture that fails
        # leaves its stream the current one, which the outer context undoes.
        capturing = torch.cuda.graph(
            graph, pool=self._graph_pool, stream=side.stream, capture_error_mode="thread_local"
        )
        with self.on(side), capturing:
            launch()
        replay: Callable[[], None] = graph.replay
        return replay

    def ops(self, model: DeviceModel, rows: int) -> Ops:
        # Here, since Triton is not installed beside a CPU's torch.
        from semipd.model.ops_triton import TritonOps

        made: Ops = TritonOps(self.device, rows, model.heads, self.units)
        if self._attention == "flashinfer":
            library = load_flashinfer(model.dtype, model.heads.dim)
            windows = [layer.window for layer in model.layers]
            made = FlashInferOps(
                made, library, model.heads, windows, model.dtype, self.device, self.upload, self._mark
            )
        return made

    def _mark(self) -> Callable[[], None]:
        """Take note of this point of the current stream; the result waits for it."""
        event = torch.cuda.Event()
        event.record()
        wait: Callable[[], None] = event.synchronize
        return wait

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)

    def memory(self) -> tuple[int, int]:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return int(free), int(total)

    def lost(self, error: BaseException) -> str | None:
        if isinstance(error, torch.OutOfMemoryError):
            return None
        try:
            torch.cuda.synchronize(self.device)  # a sticky error comes back from every call
        except RuntimeError as sticky:
            return f"the GPU's context is lost: {str(sticky).splitlines()[0]}"
        return None

    def now(self) -> float:
        return time.monotonic()

    def rest(self, woken: threading.Event, seconds: float | None) -> None:
        woken.wait(seconds)

    def close(self) -> None:
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return  # the context is gone, and with it all that could be given back
        self._give_back()

    def _give_back(self) -> None:
        """Destroy the partitions; nothing runs on them any more."""
        # cuBLAS keeps a workspace for each stream that it ever saw, under the stream's address.
        torch._C._cuda_clearCublasWorkspaces()
        if self._contexts is not None:
            self._contexts.close()
            self._contexts = None
