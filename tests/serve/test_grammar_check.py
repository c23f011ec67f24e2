"""Grammars that are tried out: what is refused, what that costs others, and who ends with whom."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from semipd.core.errors import Overloaded
from semipd.execute.storage import MAX_CONSTRAINT as ROOM
from semipd.model.grammar_text import GrammarError
from semipd.serve.constraint import MAX_CONSTRAINT
from semipd.serve.grammar_check import MAX_WAITING, GrammarCheck, Unchecked, WaitingRoom
from semipd.serve.grammar_process import Bounds
from tests.serve.fakes import LiveFake, eventually, make_folder
from tests.serve.serving import Serving, serving

PATIENCE = 60.0
PLENTY = 2**36
SMALL = {"type": "integer"}


def chain(length: int) -> dict[str, Any]:
    """As many patterns, all of which one text must match: the library's time doubles with each."""
    links: dict[str, Any] = {
        f"p{link}": {"pattern": "a*" + "a" * link + "b", "$ref": f"#/$defs/p{link + 1}"}
        for link in range(length)
    }
    return {"type": "string", "$ref": "#/$defs/p0", "$defs": {**links, f"p{length}": {"pattern": "ab"}}}


def order(schema: Any) -> dict[str, str]:
    return {"schema": json.dumps(schema)}


def helpers() -> set[psutil.Process]:
    """Processes below this one that try out grammars; other tests may have left some."""
    below = psutil.Process().children(recursive=True)
    return {process for process in below if "semipd-grammar" in " ".join(_line(process))}


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() if process.status() != psutil.STATUS_ZOMBIE else []
    except psutil.NoSuchProcess:
        return []


@pytest.fixture
def check() -> Iterator[GrammarCheck]:
    check = GrammarCheck()
    yield check
    check.close()


def test_a_grammar_is_tried_out_once(check: GrammarCheck) -> None:
    before = helpers()
    with pytest.raises(Unchecked):
        check.of(order(SMALL), wait=False)
    assert helpers() <= before
    grammar = check.of(order(SMALL))
    assert grammar == check.of(order(SMALL), wait=False) and "integer" in grammar
    with pytest.raises(GrammarError, match="nothing such"):
        check.of(order({"type": "string", "format": "nothing such"}))
    with pytest.raises(GrammarError, match="nothing such"):
        check.of(order({"type": "string", "format": "nothing such"}), wait=False)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (Bounds(0.5, PATIENCE, PLENTY), r"more than 0\.5 s of processor time"),
        (Bounds(PATIENCE, 1.5, PLENTY), r"within 1\.5 s"),
        (Bounds(PATIENCE, PATIENCE, 64 * 2**20), "more than 64 MiB of memory"),
    ],
    ids=["processor", "time", "memory"],
)
def test_what_exceeds_a_bound_is_refused_by_its_name(bounds: Bounds, message: str) -> None:
    """This schema has 3 kB and would take gigabytes and years."""
    check, before = GrammarCheck(bounds), helpers()
    try:
        with pytest.raises(GrammarError, match=message):
            check.of(order(chain(60)))
        assert check.of(order(SMALL))
    finally:
        check.close()
    assert helpers() <= before


def test_the_process_is_started_again_when_it_died(check: GrammarCheck) -> None:
    before = helpers()
    check.of(order(SMALL))
    (helper,) = helpers() - before
    helper.kill()
    assert check.of(order({"type": "number"}))
    assert helper not in helpers() and len(helpers() - before) == 1


def test_a_grammar_whose_process_dies_is_tried_out_again(check: GrammarCheck) -> None:
    before = helpers()
    check.of(order(SMALL))
    (helper,) = helpers() - before
    with ThreadPoolExecutor(1) as pool:
        helper.suspend()
        waiting = pool.submit(check.of, order({"type": "boolean"}))
        helper.kill()
        assert waiting.result(PATIENCE)


def test_who_cannot_start_the_process_says_so(check: GrammarCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(Overloaded):
        check.of(order(SMALL))


def test_the_process_ends_with_its_server(tmp_path: Path) -> None:
    """Also in the middle of a grammar, and when the server is killed."""
    script = (
        "import json, sys; from semipd.serve.grammar_check import GrammarCheck;"
        "from semipd.serve.grammar_process import Bounds; check = GrammarCheck(Bounds(600.0, 600.0));"
        "check.of({'schema': '{}'}); print(flush=True); check.of(json.loads(sys.argv[1]))"
    )
    command = [sys.executable, "-c", script, json.dumps(order(chain(60)))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as server:
        assert server.stdout is not None and server.stdout.readline()
        with eventually(PATIENCE) as wait_for:
            wait_for(lambda: len(psutil.Process(server.pid).children(recursive=True)) == 2)
        below = psutil.Process(server.pid).children(recursive=True)
        os.kill(server.pid, signal.SIGKILL)
    with eventually(PATIENCE) as wait_for:
        wait_for(lambda: not any(_line(process) for process in below))


def test_slots_have_room_for_what_is_let_through() -> None:
    assert MAX_CONSTRAINT == ROOM


def body(schema: Any, **more: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return {"prompt": "hello", "response_format": form, **more}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(make_folder(tmp_path_factory.mktemp("model")), LiveFake(pace=0.002)) as running:
        yield running


def test_others_go_on_while_hostile_grammars_are_tried_out(server: Serving) -> None:
    """Four streams begin and end, a known schema is answered, and both while several grammars take all the
    time that they get."""
    with server.client() as client, ThreadPoolExecutor(8) as pool:
        assert client.post("/v1/completions", json=body(SMALL)).status_code == 200
        asked = threading.Semaphore(0)

        def hostile(number: int) -> Any:
            asked.release()
            return client.post("/v1/completions", json=body(chain(50 + number)), timeout=PATIENCE)

        refused = [pool.submit(hostile, number) for number in range(4)]
        for _ in refused:
            asked.acquire()
        plain = {"prompt": "hello", "max_tokens": 20, "stream": True}
        for _ in range(2):
            streams = [pool.submit(client.post, "/v1/completions", json=plain) for _ in range(4)]
            assert all(stream.result(PATIENCE).text.endswith("[DONE]\n\n") for stream in streams)
            assert client.post("/v1/completions", json=body(SMALL)).status_code == 200
        for answer in (waiting.result(PATIENCE) for waiting in refused):
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "response_format"
            assert "compile" in answer.json()["error"]["message"]  # by the processor's time, or the wall's


def test_only_so_many_wait_for_new_grammars() -> None:
    async def crowd() -> None:
        room, tried = WaitingRoom(), threading.Event()
        waiting = [asyncio.create_task(room.run(tried.wait)) for _ in range(MAX_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match=f"{MAX_WAITING} requests"):
            await room.run(tried.wait)
        tried.set()
        assert all(await asyncio.gather(*waiting)) and await room.run(tried.wait)
        room.close()

    asyncio.run(crowd())
