"""What the control groups around this process allow: a container, a service of systemd, a batch job.

Limits hold at every level, so each group counts from this process's own up to the topmost one that is in
sight; the tightest wins. Both versions of the interface are read; without either, nothing is limited.
"""

from __future__ import annotations

from collections.abc import Iterator

from semipd.execute.linux import read_text, table

_ROOT = "/sys/fs/cgroup"


def processor_quota() -> float | None:
    """Cores' worth of time; None without a limit."""
    quotas = [quota for folder in _groups("cpu") if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def available_memory() -> int:
    """Bytes that this process could still take: of the machine, and of every group's limit."""
    rooms = [room for folder in _groups("memory") if (room := _room(folder)) is not None]
    return max(0, min([table("/proc/meminfo")["MemAvailable:"] * 1024, *rooms]))


def total_memory() -> int:
    """Bytes that all processes of the innermost group may take together; without groups, the machine's."""
    limits = [limit for folder in _groups("memory") if (limit := _limit(folder)) is not None]
    return min([table("/proc/meminfo")["MemTotal:"] * 1024, *limits])


def _groups(controller: str) -> Iterator[str]:
    """Folders of this process's groups, its own first. In a container a path may be the host's, of which
    only the top is in sight: folders that are not there hold empty files for `read_text`."""
    lines = [line.split(":", 2) for line in read_text("/proc/self/cgroup").splitlines()]
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and controller not in controllers.split(","):
            continue
        base = f"{_ROOT}/{controller}" if controllers else _ROOT
        names = [name for name in path.split("/") if name not in ("", "..")]
        for count in range(len(names), -1, -1):
            yield "/".join([base, *names[:count]])
    if not lines:
        yield _ROOT


def _quota(folder: str) -> float | None:
    words = read_text(f"{folder}/cpu.max").split() or [
        read_text(f"{folder}/cpu.cfs_quota_us"),
        read_text(f"{folder}/cpu.cfs_period_us"),
    ]
    if len(words) != 2 or not all(word.isdigit() for word in words):  # "max", or -1, or not there
        return None
    return int(words[0]) / max(int(words[1]), 1)


def _limit(folder: str) -> int | None:
    limit = read_text(f"{folder}/memory.max") or read_text(f"{folder}/memory.limit_in_bytes")
    return int(limit) if limit.isdigit() else None


def _room(folder: str) -> int | None:
    limit = _limit(folder)
    if limit is None:
        return None
    used = table(f"{folder}/memory.stat")  # cached files do not count: they give way
    names = ("total_rss", "total_shmem") if "total_rss" in used else ("anon", "shmem")
    return limit - sum(used.get(name, 0) for name in names)
