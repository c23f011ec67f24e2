"""Where weights lie."""

import gc
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from semipd.model.room import CHUNK, Room


def test_tensors_are_apart_aligned_and_outlive_their_room():
    room = Room()
    first, second = room.empty((3, 5), torch.bfloat16), room.empty((7,), torch.float32)
    first.fill_(1.5), second.fill_(-2.0)
    assert second.data_ptr() - first.data_ptr() == 64 and first.data_ptr() % 64 == 0
    third = room.keep(torch.arange(6).view(2, 3).T)
    del room
    gc.collect()
    assert third.is_contiguous() and third.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert bool((first == 1.5).all()) and bool((second == -2.0).all())


def test_what_does_not_fit_begins_a_new_stretch():
    room = Room()
    small, large, after = (room.empty((size,), torch.uint8) for size in (64, CHUNK + 1, 64))
    for tensor in (small, large, after):
        tensor[-1] = 7
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel()) for t in (small, large, after))
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert room.empty((0, 4), torch.float32).shape == (0, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_huge_pages_are_asked_for():
    tensor = Room().empty((1,), torch.uint8)
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no huge pages")
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)[
        1:
    ]:
        start, end = (int(number, 16) for number in re.match(r"(\w+)-(\w+)", mapping).groups())
        if start <= tensor.data_ptr() < end:
            assert " hg" in mapping
            return
    raise AssertionError("no mapping holds the tensor")
