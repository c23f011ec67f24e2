"""The rule of shares, the driver calls that make them, and whether there is a GPU to ask."""

from __future__ import annotations

import enum
import itertools
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from semipd.core.engine import Engine
from semipd.core.kv import BlockPool
from semipd.core.metrics import Metrics
from semipd.core.partition import Static
from semipd.core.policies import Limits, SemiPD
from semipd.core.types import Device, Event, Lane, Launched, Request, Split
from semipd.execute.backend import Side
from semipd.execute.choose import has_gpu
from semipd.execute.cuda_driver import HIGH, LOW, CannotPartition, GreenContexts, partition_pairs
from semipd.execute.cuda_partition import Placement, disjoint
from semipd.execute.cuda_start import Shape, start_cuda
from tests.checkpoints import make_checkpoint
from tests.execute.fake_cuda import UNITS, FakeBackend


def placement(**kind: Any) -> Placement:
    backend = FakeBackend(**kind)
    whole = {lane: backend.whole(lane) for lane in (Lane.PREFILL, Lane.DECODE)}
    return Placement(whole, backend.partition(), UNITS)


def test_legal_splits_are_what_was_granted() -> None:
    splits = placement().legal_splits
    assert splits[0] == (124, 8) and splits[-1] == (4, 128) and len(splits) == 16
    assert placement(parts=False).legal_splits == ()


@pytest.mark.parametrize(("asked", "got"), [((68, 64), 64), ((66, 66), 64), ((1, 1), 8), ((5, 127), 128)])
def test_the_nearest_partition_stands_in_for_any_split(asked: tuple[int, int], got: int) -> None:
    table = placement()
    table.retarget(Split.pair(*asked, UNITS))
    decode = table.place(Lane.DECODE, None, None).side
    prefill = table.place(Lane.PREFILL, None, None).side
    assert (decode.units, prefill.units) == (got, UNITS - got) and disjoint(prefill, decode)


@pytest.mark.parametrize("parts", [True, False])
def test_what_a_card_grants_is_what_is_told(parts: bool) -> None:
    """Metrics and what a way learns from show the units that lanes had, not those that were asked for."""
    table = placement(parts=parts)
    device = Device("d", UNITS, "SM", table.legal_splits, 2, only_legal=True)
    for prefill, decode in itertools.product((0, 1, 7, 30, 66, 100, UNITS), repeat=2):
        if not prefill and not decode:
            continue
        asked = Split.pair(prefill, decode, UNITS)
        table.retarget(asked)
        told = device.granted(asked)
        for lane in (Lane.PREFILL, Lane.DECODE):
            if asked.of(lane):
                assert told.of(lane) == table.place(lane, None, None).side.units, (asked, told)
            else:
                assert not told.of(lane)


def test_the_metrics_show_what_was_granted(tmp_path: Path) -> None:
    """`--split static:100,32` on a card that can only be cut at 40, 80 and 120."""
    backend = FakeBackend(step=40)
    shape = Shape(slots=4, max_length=64, block_size=4, blocks=64, most_rows=64)
    folder = make_checkpoint(tmp_path, "llama")
    executor = start_cuda(backend, folder, shape, dtype="float32", graph_sides=0).executor
    metrics, pool, told = Metrics(), BlockPool(64, 4), set()

    def hear(event: Event) -> None:
        if isinstance(event, Launched):
            told.add((event.split.of(Lane.PREFILL), event.split.of(Lane.DECODE)))

    engine = Engine(
        executor,
        SemiPD(Limits(UNITS, 32, 4), Static(100, 32, UNITS)),
        {Lane.PREFILL: pool, Lane.DECODE: pool},
        SimpleNamespace(now=backend.now),
        max_sequences=4,
        max_length=64,
        observers=[metrics, hear],
    )
    for index in range(3):
        engine.add(Request(f"{index}", list(range(5, 45)), 6))
    while not engine.idle:
        engine.step()
    assert (92, 40) in told and told <= {(92, 40), (UNITS, 0), (0, UNITS)}
    shown = metrics.snapshot().units
    assert (shown["prefill"], shown["decode"]) in told


def test_sides_of_unknown_sms_are_taken_to_overlap_except_with_their_pair() -> None:
    table = placement(known=False)
    first, second = table.sides(Lane.DECODE)[1:3]
    other = table.sides(Lane.PREFILL)
    assert disjoint(first, other[1]) and not disjoint(first, other[2]) and not disjoint(first, second)
    assert not disjoint(first, other[0]) and not disjoint(first, first)
    assert not disjoint(Side(None, UNITS), Side(None, UNITS)), "two whole devices are one"


def test_a_lane_that_shrinks_never_stays() -> None:
    """If both could stay, each waiting for the other, the split would never change."""
    table = placement(known=False)
    narrow, wide = table.sides(Lane.DECODE)[4], table.sides(Lane.DECODE)[8]
    table.retarget(Split.pair(UNITS - wide.units, wide.units, UNITS))
    prefill_old = table.sides(Lane.PREFILL)[4]
    grows = table.place(Lane.DECODE, narrow, prefill_old)
    assert grows.side is narrow and not grows.wait
    shrinks = table.place(Lane.PREFILL, prefill_old, narrow)
    assert shrinks.side is table.sides(Lane.PREFILL)[8] and shrinks.wait


def test_a_card_that_cannot_be_cut_shares_by_priority() -> None:
    table = placement(parts=False)
    for split in (Split.pair(68, 64, UNITS), Split.lone(Lane.DECODE, UNITS)):
        table.retarget(split)
        place = table.place(Lane.DECODE, None, table.sides(Lane.PREFILL)[0])
        assert place.side.units == UNITS and not place.wait


class FakeDriver:
    """`cuda.bindings.driver` of a card with 132 SMs that grants multiples of 8."""

    def __init__(self, fail: str = "", room: int = 1000) -> None:
        self._room = room  # contexts that can exist at once
        self.calls: list[str] = []
        self._fail = fail
        self.CUresult = enum.Enum(
            "CUresult", ["CUDA_SUCCESS", "CUDA_ERROR_NOT_SUPPORTED", "CUDA_ERROR_OUT_OF_MEMORY"]
        )
        self.CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
        self.CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
        self.CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
        self.CUstream = int
        self.priorities: list[int] = []
        self.alive = 0

    def _answer(self, name: str, *results: Any) -> tuple[Any, ...]:
        self.calls.append(name)
        if name == self._fail:
            return (self.CUresult["CUDA_ERROR_NOT_SUPPORTED"], *results)
        return (self.CUresult["CUDA_SUCCESS"], *results)

    def _sms(self, count: int) -> Any:
        return SimpleNamespace(sm=SimpleNamespace(smCount=count))

    def cuInit(self, flags: int) -> Any:
        return self._answer("cuInit")

    def cuDeviceGet(self, ordinal: int) -> Any:
        return self._answer("cuDeviceGet", ordinal)

    def cuDeviceGetDevResource(self, device: int, kind: int) -> Any:
        return self._answer("cuDeviceGetDevResource", self._sms(132))

    def cuDevSmResourceSplitByCount(self, groups: int, whole: Any, flags: int, least: int) -> Any:
        assert groups == 1 and flags == 0
        granted = -(-least // 8) * 8
        return self._answer("split", [self._sms(granted)], 1, self._sms(132 - granted))

    def cuDevResourceGenerateDesc(self, resources: list[Any], count: int) -> Any:
        assert len(resources) == count == 1
        return self._answer("cuDevResourceGenerateDesc", resources[0])

    def cuGreenCtxCreate(self, description: Any, device: int, flags: int) -> Any:
        assert flags == 1, "the driver requires this flag"
        self.alive += 1
        if self.alive > self._room:
            self.alive -= 1
            return (self.CUresult["CUDA_ERROR_OUT_OF_MEMORY"], None)
        return self._answer("cuGreenCtxCreate", description)

    def cuGreenCtxStreamCreate(self, context: Any, flags: int, priority: int) -> Any:
        assert flags == 1, "a blocking stream would wait for the default one"
        self.priorities.append(priority)
        return self._answer("cuGreenCtxStreamCreate", 77)

    def cuGreenCtxGetDevResource(self, context: Any, kind: int) -> Any:
        return self._answer("cuGreenCtxGetDevResource", context)

    def cuStreamDestroy(self, stream: int) -> Any:
        return self._answer("cuStreamDestroy")

    def cuGreenCtxDestroy(self, context: Any) -> Any:
        self.alive -= 1
        return self._answer("cuGreenCtxDestroy")


class TestGreenContexts:
    def test_both_sides_come_out_of_one_split(self) -> None:
        """Two splits of the whole device, one for each side, would overlap."""
        driver = FakeDriver()
        contexts = GreenContexts(0, driver)
        decode, prefill = contexts.pair(61)
        assert (decode.units, prefill.units) == (64, 68), "as granted, read back from the contexts"
        assert driver.calls.count("split") == 1 and driver.priorities == [HIGH, LOW]
        contexts.close()
        assert driver.alive == 0

    def test_granularity_has_a_default_for_older_drivers(self) -> None:
        sizes = GreenContexts(0, FakeDriver()).granularity()
        assert (sizes.smallest, sizes.step, sizes.total) == (8, 8, 132)

    def test_every_size_is_there_once_and_rises(self) -> None:
        pairs = partition_pairs(GreenContexts(0, FakeDriver()))
        assert [decode.units for decode, _ in pairs] == list(range(8, 125, 8))
        assert all(decode.units + prefill.units == 132 for decode, prefill in pairs)

    @pytest.mark.parametrize(("most", "sizes"), [(2, [72]), (3, [48, 96]), (100, list(range(8, 125, 8)))])
    def test_fewer_pairs_are_spread_over_the_sizes(self, most: int, sizes: list[int]) -> None:
        pairs = partition_pairs(GreenContexts(0, FakeDriver()), most)
        assert [decode.units for decode, _ in pairs] == sizes

    def test_a_driver_without_room_for_all_leaves_sizes_far_apart(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Made in order, the first ones alone would leave prefill nearly everything, whatever the load."""
        with caplog.at_level("WARNING"):
            pairs = partition_pairs(GreenContexts(0, FakeDriver(room=7)))
        assert [decode.units for decode, _ in pairs] == [32, 64, 96]
        assert (
            "no more than 3 partitions can be made: cuGreenCtxCreate: CUDA_ERROR_OUT_OF_MEMORY"
            in caplog.text
        )
        with pytest.raises(CannotPartition, match="OUT_OF_MEMORY"):
            partition_pairs(GreenContexts(0, FakeDriver(room=1)))

    @pytest.mark.parametrize("call", ["cuDeviceGetDevResource", "cuGreenCtxCreate"])
    def test_a_driver_that_refuses_is_named(self, call: str) -> None:
        with pytest.raises(CannotPartition, match=f"{call}: CUDA_ERROR_NOT_SUPPORTED"):
            GreenContexts(0, FakeDriver(call)).pair(8)

    def test_a_missing_or_old_package_is_named(self) -> None:
        with pytest.raises(CannotPartition, match="has no cuDevSmResourceSplitByCount"):
            GreenContexts(0, SimpleNamespace())


def test_a_gpu_is_a_device_file_and_a_torch_that_can_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidiactl").touch()
    assert not has_gpu(tmp_path)
    (tmp_path / "nvidia3").touch()
    for version, expected in (("2.13.0+cpu", False), ("2.11.0+cu130", True), ("2.11.0", True)):
        monkeypatch.setattr(metadata, "version", lambda name, version=version: version)
        assert has_gpu(tmp_path) is expected
