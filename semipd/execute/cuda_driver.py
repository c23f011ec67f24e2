"""Green contexts: partitions of one GPU's SMs inside one process, made with `cuda.bindings`.

One context family, one address space: weights and KV are shared by all of them. The two sides of a split
come out of one `cuDevSmResourceSplitByCount`, as the group and the remainder. Splitting the whole device
afresh for each side gives partitions that overlap.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

LOW, HIGH = 0, -1  # stream priorities; decode has the higher one
MOST_PAIRS = 17

log = logging.getLogger("semipd")


class CannotPartition(RuntimeError):
    """This card, driver or installation has no green contexts; the message says which."""


@dataclass(frozen=True)
class GreenContext:
    """handle: CUgreenCtx; stream: its CUstream as a number; units: SMs granted."""

    handle: Any
    stream: int
    units: int


@dataclass(frozen=True)
class SmGranularity:
    """smallest: least SMs of a partition; step: its size is a multiple of this; total: SMs of the card."""

    smallest: int
    step: int
    total: int


class GreenContexts:
    """Makes partitions of one device, whose primary context must exist. Closing destroys them all."""

    def __init__(self, ordinal: int, driver: Any = None) -> None:
        """driver: the module `cuda.bindings.driver`, imported here when it is None. Raises
        CannotPartition."""
        self._driver = driver = _bindings() if driver is None else driver
        self._made: list[GreenContext] = []
        for name in ("cuDevSmResourceSplitByCount", "cuGreenCtxCreate", "cuGreenCtxStreamCreate"):
            if not hasattr(driver, name):
                raise CannotPartition(f"this cuda-bindings has no {name}")
        self._call("cuInit", 0)
        (self._device,) = self._call("cuDeviceGet", ordinal)
        kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        (self._whole,) = self._call("cuDeviceGetDevResource", self._device, kind)

    def granularity(self) -> SmGranularity:
        """What the driver says where it says it (CUDA 13), else what the architecture's guide says."""
        sm = self._whole.sm
        smallest = int(getattr(sm, "minSmPartitionSize", 0)) or 8
        step = int(getattr(sm, "smCoscheduledAlignment", 0)) or 8
        return SmGranularity(smallest, step, int(sm.smCount))

    def pair(self, units: int) -> tuple[GreenContext, GreenContext]:
        """(a partition of at least `units` SMs, the rest of the card), disjoint. Raises CannotPartition."""
        groups, count, rest = self._call("cuDevSmResourceSplitByCount", 1, self._whole, 0, units)
        if int(count) != 1 or int(rest.sm.smCount) == 0:
            raise CannotPartition(f"the driver made {int(count)} groups of {units} SMs")
        return self._create(groups[0], HIGH), self._create(rest, LOW)

    def close(self) -> None:
        for made in self._made:
            self._driver.cuStreamDestroy(self._driver.CUstream(made.stream))
            self._driver.cuGreenCtxDestroy(made.handle)
        self._made.clear()

    def _create(self, resource: Any, priority: int) -> GreenContext:
        driver = self._driver
        (description,) = self._call("cuDevResourceGenerateDesc", [resource], 1)
        flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        (handle,) = self._call("cuGreenCtxCreate", description, self._device, int(flags))
        non_blocking = int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        (stream,) = self._call("cuGreenCtxStreamCreate", handle, non_blocking, priority)
        kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        (granted,) = self._call("cuGreenCtxGetDevResource", handle, kind)
        made = GreenContext(handle, int(stream), int(granted.sm.smCount))
        self._made.append(made)
        return made

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """What a driver function returns beside its code. Raises CannotPartition with the code's name."""
        try:
            code, *results = getattr(self._driver, name)(*arguments)
        except RuntimeError as error:  # the bindings' own, for a function that this driver does not have
            raise CannotPartition(f"{name}: {error}") from None
        if code != self._driver.CUresult.CUDA_SUCCESS:
            raise CannotPartition(f"{name}: {getattr(code, 'name', code)}")
        return tuple(results)


def partition_pairs(
    contexts: GreenContexts, most: int = MOST_PAIRS
) -> list[tuple[GreenContext, GreenContext]]:
    """(decode's side, prefill's side) for every legal size of decode's, as granted, rising; at most `most`
    of them, since each costs two contexts. Sizes far apart are made first, so that a driver that
    has no room for more leaves a useful table, and one line in the log. Raises CannotPartition when there
    is room for none."""
    sizes = contexts.granularity()
    step = -(-sizes.total // (most * sizes.step)) * sizes.step
    wanted = list(range(max(sizes.smallest, step), sizes.total - sizes.smallest + 1, step))
    if not wanted:
        raise CannotPartition(f"{sizes.total} SMs do not make two partitions of {sizes.smallest}")
    wanted.sort(key=lambda units: [units // step % stride != 0 for stride in (8, 4, 2)])
    pairs: dict[int, tuple[GreenContext, GreenContext]] = {}
    for units in wanted:
        if units in pairs:
            continue  # the driver granted as many when fewer were wanted
        try:
            made = contexts.pair(units)
        except CannotPartition as error:
            if not pairs:
                raise
            log.warning("no more than %d partitions can be made: %s", len(pairs), error)
            break
        pairs.setdefault(made[0].units, made)
    return [pairs[units] for units in sorted(pairs)]


def _bindings() -> Any:
    # Here, since it is an optional package that finds the driver's library when it is imported.
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise CannotPartition(f"cuda-bindings cannot be imported ({error})") from None
    return driver
