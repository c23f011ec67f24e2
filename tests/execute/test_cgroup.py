"""Limits of control groups, as files of the system that are not this machine's."""

from __future__ import annotations

import pytest

from semipd.execute import cgroup, linux

MEMINFO = {"/proc/meminfo": "MemTotal: 900 kB\nMemAvailable: 800 kB\nHugePages_Total: 0"}
TOP = "/sys/fs/cgroup"
NEW = {"/proc/self/cgroup": "0::/user.slice/run.service"}
OLD = {"/proc/self/cgroup": "5:cpu,cpuacct:/jobs/7\n4:memory:/jobs/7\n1:name=systemd:/jobs/7\n0::/jobs/7"}
HOSTS = {"/proc/self/cgroup": "0::/docker/abc"}  # a container that is told its host's path
OUTSIDE = {"/proc/self/cgroup": "0::/../other"}


def show(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    for module in (cgroup, linux):
        monkeypatch.setattr(module, "read_text", lambda path: (MEMINFO | files).get(path, ""))


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        (NEW, None),
        (NEW | {f"{TOP}/user.slice/run.service/cpu.max": "max 100000"}, None),
        (NEW | {f"{TOP}/user.slice/run.service/cpu.max": "150000 100000"}, 1.5),
        (NEW | {f"{TOP}/user.slice/cpu.max": "50000 100000", f"{TOP}/cpu.max": "max 100000"}, 0.5),
        (HOSTS | {f"{TOP}/cpu.max": "200000 100000"}, 2.0),
        (OUTSIDE | {f"{TOP}/cpu.max": "200000 100000"}, 2.0),
        ({f"{TOP}/cpu.max": "200000 100000"}, 2.0),
        (OLD | {f"{TOP}/cpu/jobs/7/cpu.cfs_quota_us": "-1"}, None),
        (
            OLD
            | {
                f"{TOP}/cpu/jobs/7/cpu.cfs_quota_us": "-1",
                f"{TOP}/cpu/jobs/7/cpu.cfs_period_us": "100000",
                f"{TOP}/cpu/jobs/cpu.cfs_quota_us": "300000",
                f"{TOP}/cpu/jobs/cpu.cfs_period_us": "100000",
            },
            3.0,
        ),
    ],
)
def test_the_tightest_quota_of_all_groups_counts(
    files: dict[str, str], quota: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service's limit is in its own group; only a container sees its limit at the top."""
    show(monkeypatch, files)
    assert cgroup.processor_quota() == quota


@pytest.mark.parametrize(
    ("files", "room"),
    [
        ({}, 800 * 1024),
        (NEW | {f"{TOP}/user.slice/memory.max": "max"}, 800 * 1024),
        (
            NEW
            | {
                f"{TOP}/user.slice/memory.max": "5000",
                f"{TOP}/user.slice/memory.stat": "anon 1000\nfile 900\nshmem 100",
            },
            3900,
        ),
        (
            OLD
            | {
                f"{TOP}/memory/jobs/7/memory.limit_in_bytes": "4000",
                f"{TOP}/memory/jobs/7/memory.stat": "rss 1\ntotal_cache 9\ntotal_rss 50\ntotal_shmem 5",
                f"{TOP}/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            3945,
        ),
        (NEW | {f"{TOP}/memory.max": "10", f"{TOP}/memory.stat": "anon 20"}, 0),
    ],
)
def test_memory_is_what_the_machine_and_all_groups_leave(
    files: dict[str, str], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    show(monkeypatch, files)
    assert cgroup.available_memory() == room


def test_the_whole_is_no_more_than_a_group_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults are shares of this: of the machine's memory, they would not fit a small container."""
    show(monkeypatch, {})
    assert cgroup.total_memory() == 900 * 1024
    show(monkeypatch, NEW | {f"{TOP}/user.slice/memory.max": "5000"})
    assert cgroup.total_memory() == 5000


def test_this_machine_has_memory_left() -> None:
    assert cgroup.available_memory() > 2**20
