"""The resident as its parent sees it: started, asked for workers, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

from semipd.core.errors import ConfigError
from semipd.core.ports import ExecutorLost
from semipd.execute.wire import Answer, Channel, Close, Done, Failed, Fork, Ready, Start, socket_pair

PATIENCE = 2.0  # seconds from asking the resident to end to killing it

# Settings of thread pools in the caller's environment are for the caller; ours change while we run.
_POOLS = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "VECLIB_")
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # Pool threads wait for work by spinning, by default for some 15 ms: on cores that another lane has by
    # then, or ahead of the very thread they wait for. 1,000 turns (50 us) cost at most 5% on a quiet
    # machine and made steps 5 times faster, and more, on a busy one.
    "GOMP_SPINCOUNT": "1000",
    # Weights are unpacked, converted and packed: freed copies of 1 MiB and more go back to the system.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "TOKENIZERS_PARALLELISM": "false",
}
# Large buffers on huge pages: forks copy a fraction of the page tables (7 instead of 23 ms for 1 GB of
# weights), and steps are 3 to 5% faster.
_HUGE_PAGES = "glibc.malloc.hugetlb=1"
# The parent's import path, so that both find the same code; -P keeps a file in the working directory from
# hiding a module.
#
# Torch takes more than a second to import: the kernel must watch the parent from before.
_PROGRAM = """
import sys
sys.path[:] = sys.argv[3:]
from semipd.lifetime import die_with_parent
try:
    die_with_parent(int(sys.argv[2]))
except EOFError:
    sys.exit()
from semipd.execute.resident import main
main(int(sys.argv[1]))
"""


class ResidentProcess:
    """Starts the resident: a fresh interpreter, since a fork of the caller would inherit its locks.

    It has a process group of its own: Ctrl-C in a terminal reaches the parent, which decides. Until the
    model is loaded it ends with the thread that made this object.
    """

    def __init__(self) -> None:
        with contextlib.ExitStack() as undo:
            ours, theirs = socket_pair()
            undo.callback(ours.close)
            with theirs:
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-P", "-c", _PROGRAM),
                        *(str(theirs.fileno()), str(os.getpid()), *sys.path),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # the caller's output is the caller's; messages go to stderr
                    env=environment(),
                    pass_fds=(theirs.fileno(),),
                    process_group=0,
                )
            self.channel: Channel[Answer] = Channel(ours, Answer)
            self._listens = False
            undo.pop_all()

    @property
    def pid(self) -> int:
        return self._process.pid

    def load(self, start: Start, memory: int) -> None:
        """Have the model loaded; blocks until it is. memory: descriptor of the shared memory.

        Raises ConfigError with the resident's own words, or ExecutorLost."""
        try:
            self.channel.send(start, [memory])
            answer = self.channel.receive()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise ExecutorLost(f"{self.why_dead()} while loading {start.model}") from None
        if isinstance(answer, Failed):
            raise ConfigError(answer.message) if answer.config else ExecutorLost(answer.message)
        assert isinstance(answer, Ready)
        self._listens = True

    def fork(self, lane: int) -> Channel[Done]:
        """Order a worker; returns our end of its socket, which takes jobs at once. Raises ExecutorLost."""
        try:
            ours, theirs = socket_pair()
        except OSError as error:
            raise ExecutorLost(f"no socket for a new worker: {error.strerror}") from None
        with theirs:
            try:
                self.channel.send(Fork(lane), [theirs.fileno()])
            except (BrokenPipeError, ConnectionResetError):
                ours.close()
                raise ExecutorLost(self.why_dead()) from None
        return Channel(ours, Done)

    def why_dead(self) -> str:
        """Say how the resident ended, whose socket was found closed."""
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "the resident process does not answer"
        if code < 0:
            known = -code in set(signal.Signals)
            name = signal.Signals(-code).name if known else f"signal {-code}"
            hint = "; was the memory too small?" if -code == signal.SIGKILL else ""
            return f"the resident process was killed by {name}{hint}"
        return f"the resident process ended with exit code {code}"

    def close(self) -> None:
        """End the resident and its workers; by force when it does not do so itself in `PATIENCE`.
        Idempotent."""
        with contextlib.suppress(OSError):  # it may be gone
            self.channel.send(Close())
        try:
            self._process.wait(timeout=PATIENCE if self._listens else 0)  # while it loads it hears nothing
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self.channel.close()


def environment() -> dict[str, str]:
    """What the resident and its workers find in `os.environ`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_POOLS)}
    tunables = [os.environ["GLIBC_TUNABLES"]] if "GLIBC_TUNABLES" in os.environ else []
    return inherited | _ENVIRONMENT | {"GLIBC_TUNABLES": ":".join([*tunables, _HUGE_PAGES])}
