"""Partitions measured: a kernel that writes down the number of its SM says where a stream really runs."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from semipd.core.types import Lane
from semipd.execute.backend import Pair, Side
from semipd.execute.cuda_backend import PROGRAMS_PER_SM, CudaBackend


@pytest.fixture(scope="module")
def backend() -> Iterator[CudaBackend]:
    backend = CudaBackend()
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def pairs(backend: CudaBackend) -> list[Pair]:
    begin = time.perf_counter()
    free, _ = backend.memory()
    pairs = backend.partition()
    after, _ = backend.memory()
    print(
        f"{len(pairs)} partitions in {time.perf_counter() - begin:.2f} s, {(free - after) / 2**20:.0f} MiB"
    )
    if not pairs:
        pytest.skip("this card or driver cannot be partitioned")
    return pairs


def sms_of(backend: CudaBackend, side: Side) -> frozenset[int]:
    found = backend._sms(side)
    assert found is not None, "kernels were seen on another number of SMs than was granted"
    return found


def test_the_two_sides_of_every_split_are_disjoint(backend: CudaBackend, pairs: list[Pair]) -> None:
    for pair in pairs:
        decode, prefill = sms_of(backend, pair.decode), sms_of(backend, pair.prefill)
        assert not decode & prefill
        assert len(decode) == pair.decode.units and len(prefill) == pair.prefill.units
        print(f"prefill {len(prefill)}, decode {len(decode)}")


def test_granted_units_add_up(backend: CudaBackend, pairs: list[Pair]) -> None:
    for pair in pairs:
        assert pair.prefill.units + pair.decode.units == backend.units
    units = [pair.decode.units for pair in pairs]
    assert units == sorted(set(units)) and len(units) >= 4


def test_the_whole_device_is_whole(backend: CudaBackend) -> None:
    assert len(sms_of(backend, backend.whole(Lane.DECODE))) == backend.units


def test_a_graph_keeps_the_side_it_was_captured_on(backend: CudaBackend, pairs: list[Pair]) -> None:
    """Even when another stream replays it: that is why every split has its own graphs."""
    from semipd.execute.smid import launch_smid

    pair = pairs[len(pairs) // 2]
    out = torch.empty(2 * PROGRAMS_PER_SM * backend.units, dtype=torch.int32, device=backend.device)
    with backend.on(pair.decode):
        launch_smid(out)
    replay = backend.capture(pair.decode, lambda: launch_smid(out))
    for side in (pair.decode, pair.prefill, backend.whole(Lane.DECODE)):
        with backend.on(side):
            out.fill_(-1)
            replay()
        torch.cuda.synchronize()
        assert frozenset(out[: out.shape[0] // 2].tolist()) == pair.decode.sms


def test_events_order_streams_of_different_partitions(backend: CudaBackend, pairs: list[Pair]) -> None:
    """The hand-over: work on one side waits for an event of another, in every combination."""
    sides = [pairs[0].decode, pairs[0].prefill, pairs[-1].decode, backend.whole(Lane.PREFILL)]
    value = torch.zeros(1, device=backend.device)
    torch.cuda.synchronize()
    previous = None
    for turn in range(200):
        side = sides[turn % len(sides)]
        if previous is not None:
            backend.wait(side, previous)
        with backend.on(side):
            torch.cuda._sleep(20_000)
            value.mul_(2.0).add_(1.0).remainder_(1009.0)
        previous = backend.record(side)
    torch.cuda.synchronize()
    expected = 0.0
    for _ in range(200):
        expected = (2 * expected + 1) % 1009
    assert value.item() == expected


def test_times_between_events_of_one_stream(backend: CudaBackend, pairs: list[Pair]) -> None:
    for side in (pairs[0].decode, backend.whole(Lane.DECODE)):
        begin = backend.record(side)
        with backend.on(side):
            torch.cuda._sleep(2_000_000)
        end = backend.record(side)
        torch.cuda.synchronize()
        assert end.done() and 2e-4 < end.seconds_since(begin) < 2e-2
