"""The server as a process: how it starts, drains, is interrupted, and leaves nothing behind.

Nothing here counts on a moment being enough: what must be under way is waited for, and what must end soon
may take as long as this machine's pace (its start of a server) makes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serve.fakes import eventually, make_folder

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0
SCRIPT = """
import sys
from semipd.config import from_mapping
from semipd.core.errors import ConfigError
from semipd.serve.launch import EngineProcess
from semipd.serve.server import run_server
values = dict(pair.split("=") for pair in sys.argv[2:])
try:
    settings = {"model": sys.argv[1], "port": "0", "shutdown_timeout": "3", **values}
    with EngineProcess(module="tests.serve.fake_process") as engine:
        code = run_server(from_mapping(settings), engine)
except ConfigError as error:
    print(error, file=sys.stderr)
    code = 2
print("torch" in sys.modules, "transformers" in sys.modules)
sys.exit(code)
"""


class Running:
    """A server process and the engine process that it started. starting: seconds until it served."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        began = time.monotonic()
        self.process = process
        assert process.stdout is not None
        self.greeting = [process.stdout.readline() for _ in range(3)]
        self.url = next(word for word in self.greeting[0].split() if word.startswith("http://"))
        self.starting = time.monotonic() - began
        self.children = psutil.Process(process.pid).children(recursive=True)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE, trust_env=False)

    def work(
        self, pool: ThreadPoolExecutor, client: httpx.Client, **more: object
    ) -> Future[httpx.Response]:
        """A long request, once it is under way."""
        answer = pool.submit(client.post, "/v1/completions", json={**LONG, **more})
        with eventually(PATIENCE) as wait_for:
            wait_for(lambda: client.get("/load").json()["server_load"] > 0)
        return answer

    def ends(self) -> tuple[int, float]:
        """Exit code and seconds until nothing was left of it."""
        began = time.monotonic()
        code = self.process.wait(PATIENCE)
        with eventually(PATIENCE) as wait_for:
            wait_for(lambda: not any(map(_runs, self.children)))
        return code, time.monotonic() - began


def _runs(process: psutil.Process) -> bool:
    """A zombie does not: only its parent's interest is missing."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


@contextlib.contextmanager
def start(
    folder: Path, *settings: str, pace: int = 0, delay: float = 0.0, under: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*under, sys.executable, "-c", SCRIPT, str(folder), *settings],
        cwd=ROOT,
        env={**os.environ, "FAKE_PACE": str(pace), "FAKE_DELAY": str(delay)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def running(folder: Path, *settings: str, pace: int = 0) -> Iterator[Running]:
    with start(folder, *settings, pace=pace) as process:
        yield Running(process)


LONG = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True}


def test_it_serves_without_torch_and_ctrl_c_ends_it(folder: Path) -> None:
    with running(folder, pace=20) as server, server.client() as client, ThreadPoolExecutor(1) as pool:
        assert "curl " in server.greeting[2] and server.url in server.greeting[2]
        names = {child.cmdline()[0] for child in server.children if child.cmdline()}
        assert names == {"semipd-engine"}
        assert client.post("/v1/completions", json={"prompt": "hello"}).status_code == 200
        cut = server.work(pool, client)
        server.process.send_signal(signal.SIGINT)
        code, seconds = server.ends()
        assert code == 0 and seconds < max(5.0, 3 * server.starting)
        assert cut.result(PATIENCE).status_code == 503
        assert server.process.stdout is not None
        assert server.process.stdout.read() == "False False\n", (
            "torch or transformers came into the API process"
        )


def test_it_serves_as_the_first_process_of_a_container(folder: Path) -> None:
    """The engine took a parent with the number 1 for a parent that was gone."""
    alone = ["unshare", "--pid", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("needs leave to make a namespace of process ids")
    with start(folder, under=alone) as process, Running(process).client() as client:
        assert client.post("/v1/completions", json={"prompt": "hello"}).status_code == 200


def test_while_loading_it_listens_and_can_be_ended(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        start(folder, f"port={port}", delay=600.0) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
        eventually(PATIENCE) as wait_for,
    ):

        def listening() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return client.get("/health").json() == {"status": "loading"}
            return False

        wait_for(listening)
        for answer in (
            client.get("/ready"),
            client.post("/v1/completions", json=LONG),
            client.get("/metrics"),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE / 2) == 0, "it waited for the engine to load"
        wait_for(lambda: not any(map(_runs, children)))


def test_sigterm_drains(folder: Path) -> None:
    with (
        running(folder, "shutdown_timeout=60", pace=30) as server,
        server.client() as client,
        ThreadPoolExecutor(1) as pool,
        eventually(PATIENCE) as wait_for,
    ):
        whole = server.work(pool, client, max_tokens=100)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: client.get("/ready").status_code == 503)
        refused = client.post("/v1/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert client.get("/health").status_code == 200
        answer = whole.result(PATIENCE)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 100
        assert server.ends()[0] == 0


def test_sigterm_to_every_process_drains_as_well(folder: Path) -> None:
    """That is how systemd ends a service."""
    with (
        running(folder, "shutdown_timeout=60", pace=30) as server,
        server.client() as client,
        ThreadPoolExecutor(1) as pool,
    ):
        whole = server.work(pool, client, max_tokens=100)
        for child in server.children:
            child.terminate()
        server.process.send_signal(signal.SIGTERM)
        answer = whole.result(PATIENCE)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 100
        assert server.ends()[0] == 0


def test_it_serves_though_nobody_reads_its_output(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        start(folder, f"port={port}") as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=PATIENCE) as client,
        eventually(PATIENCE) as wait_for,
    ):
        assert process.stdout is not None
        process.stdout.close()

        def ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return client.get("/ready").status_code == 200
            return False

        wait_for(ready)
        assert client.post("/v1/completions", json={"prompt": "hello"}).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        process.stdout = None


def test_a_drain_has_an_end(folder: Path) -> None:
    with (
        running(folder, "shutdown_timeout=1", pace=100) as server,
        server.client() as client,
        ThreadPoolExecutor(1) as pool,
    ):
        cut = server.work(pool, client)
        server.process.send_signal(signal.SIGTERM)
        code, seconds = server.ends()
        assert code == 0 and seconds > 1.0
        assert cut.result(PATIENCE).status_code == 503


def test_a_second_signal_ends_a_drain_at_once(folder: Path) -> None:
    with (
        running(folder, "shutdown_timeout=50", pace=300) as server,
        server.client() as client,
        ThreadPoolExecutor(1) as pool,
        eventually(PATIENCE) as wait_for,
    ):
        cut = server.work(pool, client)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: client.get("/ready").status_code == 503)
        server.process.send_signal(signal.SIGTERM)
        code, seconds = server.ends()
        assert code == 0 and seconds < 45.0
        assert cut.result(PATIENCE).status_code == 503


def test_the_engine_dies_with_a_killed_server(folder: Path) -> None:
    with running(folder) as server:
        server.process.kill()
        server.ends()


def test_a_killed_engine_is_answered_for(folder: Path) -> None:
    with running(folder, pace=20) as server, server.client() as client, ThreadPoolExecutor(1) as pool:
        pending = server.work(pool, client)
        server.children[0].kill()
        answer = pending.result(PATIENCE)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
        assert "signal 9" in answer.text
        later = client.post("/v1/completions", json=LONG)
        assert later.status_code == 503 and client.get("/health").status_code == 503
        server.process.send_signal(signal.SIGTERM)
        assert server.ends()[0] == 0


def test_what_cannot_work_is_one_line(folder: Path, tmp_path: Path) -> None:
    broken = make_folder(tmp_path / "broken")
    (broken / "tokenizer.json").write_text('{"version": "1.0"')
    bare = make_folder(tmp_path / "bare", tokenizer=False)
    (tmp_path / "empty").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, word in (
            ((folder, "max_model_len=7"), "seven is not a length"),
            ((broken,), "tokenizer.json"),
            ((bare,), "tokenizer.json"),
            ((tmp_path / "empty",), "config.json"),
            ((folder, f"port={port}"), f"port {port}"),
        ):
            with start(*arguments) as process:
                _, errors = process.communicate(timeout=PATIENCE)
                assert process.returncode == 2
                assert word in errors and len(errors.strip().splitlines()) == 1, errors
