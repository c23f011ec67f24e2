"""The load client against a server with known delays: are the numbers it reports the true ones?"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from semipd.bench.client import measure
from semipd.bench.options import Options
from semipd.bench.payload import LOWEST_ID
from semipd.cli import main
from semipd.core.errors import ConfigError
from semipd.flags import from_values
from tests.bench import idle_time
from tests.bench.mock import Mock

SLACK = 0.04  # for a kernel that delivers late: see idle_time
PATIENCE = 120  # true seconds that a command may take


def load(server: Mock, **values: Any) -> dict[str, Any]:
    """Run a benchmark against the server, both in one event loop."""

    async def go() -> dict[str, Any]:
        async with asyncio.timeout(30), server.running():
            return await measure(Options(url=server.url, **values))

    return idle_time.run(go())


def test_latencies_are_the_servers_delays() -> None:
    result = load(Mock(first=0.1, gap=0.02), requests=4, concurrency=2, output_length="6")
    assert 0.1 <= result["ttft_s"]["p50"] < 0.1 + SLACK
    assert 0.02 <= result["itl_s"]["mean"] < 0.02 + SLACK
    assert result["tpot_s"]["mean"] == pytest.approx(result["itl_s"]["mean"])
    assert result["e2e_s"]["mean"] == pytest.approx(result["ttft_s"]["mean"] + 5 * result["tpot_s"]["mean"])
    assert result["completed"] == 4 and result["output_tokens"] == 24 and result["chunks"] == 24
    assert result["output_throughput"] == pytest.approx(24 / result["duration_s"])
    assert result["without_usage"] == result["chunks_unlike_usage"] == result["short_outputs"] == 0


def test_waiting_to_be_sent_counts() -> None:
    """Arrivals at 0, one stream at a time, 50 ms each: the k-th user waited k * 50 ms. Counting from the
    moment of sending would report 50 ms for each, the error called coordinated omission."""
    result = load(Mock(first=0.05), requests=6, rate=float("inf"), concurrency=1, output_length="1")
    assert 0.29 < result["ttft_s"]["max"] < 0.3 + 6 * SLACK
    assert 0.17 < result["ttft_s"]["mean"] < 0.175 + 4 * SLACK
    assert result["send_delay_s"]["max"] > 0.24


def test_a_stalled_server_shows_in_every_latency_behind_it() -> None:
    result = load(Mock(first=0.1, lanes=1), requests=8, rate=100, output_length="1")
    assert result["completed"] == 8 and result["ttft_s"]["max"] > 0.6
    assert result["send_delay_s"]["p50"] < SLACK  # the schedule itself was kept


def test_the_schedule_is_the_seeds() -> None:
    async def go() -> list[float]:
        server = Mock()
        async with server.running():
            # One at a time: two connections' requests may reach a busy server in either order.
            await measure(
                Options(url=server.url, requests=20, rate=100, concurrency=1, output_length="1:9", seed=4)
            )
        return [request["max_tokens"] for request in server.requests]

    first, again = idle_time.run(go()), idle_time.run(go())
    assert first == again and len(set(first)) > 3


def test_prompts_are_ids_of_the_length_asked_for() -> None:
    server = Mock(models=[{"id": "small", "vocab_size": 40}])
    result = load(server, requests=3, input_length="17:30", output_length="2")
    prompts = [request["prompt"] for request in server.requests]
    assert all(17 <= len(prompt) <= 30 for prompt in prompts) and prompts[0] != prompts[1]
    assert all(LOWEST_ID <= token < 40 for prompt in prompts for token in prompt)
    request = server.requests[0]
    assert request["model"] == "small" and request["temperature"] == 0 and request["ignore_eos"] is True
    assert result["prompt_tokens"] == sum(map(len, prompts)) and result["prompt_length_mismatch"] == 0


def test_chats_are_asked_in_text() -> None:
    server = Mock()
    result = load(
        server, requests=2, endpoint="chat", input_length="12", output_length="3", ignore_eos=False
    )
    message = server.requests[0]["messages"][0]
    assert message["role"] == "user" and len(message["content"].split()) == 12
    assert "ignore_eos" not in server.requests[0]
    assert result["chunks"] == 6  # the opening chunk with the role is no token


def test_a_chunk_of_several_tokens_is_one_gap() -> None:
    result = load(Mock(gap=0.02, per_chunk=4), requests=2, output_length="12")
    assert result["output_tokens"] == 24 and result["chunks"] == 6
    assert result["chunks_unlike_usage"] == 2
    assert 0.02 <= result["itl_s"]["p50"] < 0.02 + SLACK
    assert result["tpot_s"]["mean"] == pytest.approx(2 * result["itl_s"]["mean"] / 11)


def test_without_usage_chunks_are_counted() -> None:
    result = load(Mock(usage=False), requests=2, output_length="5")
    assert result["without_usage"] == 2 and result["output_tokens"] == 10


def test_short_answers_are_noticed() -> None:
    assert load(Mock(answer="ab"), requests=2, endpoint="chat", output_length="5")["short_outputs"] == 2


@pytest.mark.parametrize(
    ("server", "kind"),
    [
        (Mock(status=503), "HTTP 503 busy"),
        (Mock(cut=2), "disconnect"),
        (Mock(cut=0), "disconnect"),
        (Mock(broken=b"data: {nonsense\n\n"), "bad stream: a chunk is not a completion"),
        (Mock(broken=b'data: {"error": {"type": "overload"}}\n\n'), "error in the stream: overload"),
        (Mock(answer=""), "no output"),
        (Mock(first=5.0), "timeout"),
    ],
)
def test_errors_are_counted_by_kind(server: Mock, kind: str) -> None:
    result = load(server, requests=3, rate=200, endpoint="chat", output_length="4", timeout=0.3)
    assert result["errors"] == {kind: 3}
    assert result["completed"] == 0 and result["failed"] == 3
    assert result["ttft_s"]["p50"] is None


def test_targets() -> None:
    """The second half waits behind the first and misses; failures would miss as well."""
    result = load(
        Mock(first=0.15, lanes=2),
        requests=4,
        rate=float("inf"),
        output_length="2",
        ttft_slo="0.25",
        tpot_slo=1,
    )
    assert result["attainment"] == 0.5
    assert result["goodput"] == pytest.approx(2 / result["duration_s"])
    failing = load(Mock(status=500), requests=4, rate=float("inf"), ttft_slo=1)
    assert failing["attainment"] == 0.0


def test_a_duration_ends_the_sending_not_the_answers() -> None:
    result = load(Mock(first=0.05, gap=0.01), duration=0.5, concurrency=2, output_length="3")
    assert 6 <= result["completed"] <= 16 and result["failed"] == 0 and not result["interrupted"]
    open_loop = load(Mock(), duration=0.5, rate=100, output_length="1")
    assert 25 <= open_loop["completed"] <= 80


def test_warm_up_is_not_counted() -> None:
    server = Mock()
    result = load(server, requests=3, warmup=2, output_length="2")
    assert len(server.requests) == 5 and result["completed"] == 3
    assert len({json.dumps(request["prompt"]) for request in server.requests}) == 5


def test_connections_are_kept() -> None:
    server = Mock()
    load(server, requests=30, concurrency=3, output_length="2")
    assert server.connections <= 4


def test_a_trace_brings_times_lengths_and_shared_prefixes(tmp_path: Any) -> None:
    path = tmp_path / "trace.jsonl"
    row = '{{"time": {}, "prompt_tokens": {}, "output_tokens": {}, "block_size": 8, "keys": [{}]}}\n'
    path.write_text(
        row.format(50, 20, 2, '"a", "b"') + row.format(50.4, 20, 3, '"a", "c"') + row.format(59, 5, 3, "")
    )
    server = Mock()
    result = load(server, trace=str(path), trace_speed=2, duration=1.0)
    one, other = (request["prompt"] for request in server.requests)
    assert len(one) == len(other) == 20
    assert one[:8] == other[:8] and one[8:16] != other[8:16]
    assert result["output_tokens"] == 5 and result["duration_s"] >= 0.2


def test_a_bad_trace_row_ends_the_run_with_its_number(tmp_path: Any) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"time": 0, "prompt_tokens": 5, "output_tokens": 0}\n')
    with pytest.raises(ConfigError, match="row 1"):
        load(Mock(), trace=str(path))


def test_a_key_is_needed_and_sent() -> None:
    assert load(Mock(api_key="secret"), requests=1, output_length="1", api_key="secret")["completed"] == 1
    with pytest.raises(ConfigError, match="API key"):
        load(Mock(api_key="secret"), requests=1)


def test_a_server_without_models_needs_a_name() -> None:
    with pytest.raises(ConfigError, match="--model"):
        load(Mock(models=[]), requests=1)
    assert load(Mock(models=[]), requests=1, model="x", output_length="1")["model"] == "x"


@pytest.mark.parametrize(
    "values",
    [
        {"requests": 0},
        {"concurrency": 0},
        {"duration": "-1"},
        {"rate": "nan"},
        {"rate": 0},
        {"rate": "inf", "duration": 5},
        {"input_length": "0"},
        {"workload": "nosuch"},
        {"arrivals": "gamma:2"},
        {"arrivals": "gamma:x", "rate": 2},
        {"endpoint": "chat", "prompt_kind": "ids"},
        {"trace": "x", "rate": 2},
        {"timeout": "forever"},
        {"vocab_size": 1},
        {"reqests": 5},
    ],
)
def test_bad_options_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        from_values(Options, values)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "semipd.cli", "bench", "serve", *arguments]


def test_no_server_is_one_line_and_exit_code_2() -> None:
    ended = subprocess.run(
        command("--url", "127.0.0.1:9"), capture_output=True, text=True, timeout=PATIENCE
    )
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.strip().count("\n") == 0 and "no server at http://127.0.0.1:9" in ended.stderr


async def _started(*arguments: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*command(*arguments), stdout=pipe, stderr=pipe)


def test_the_command_prints_a_table_and_ends_with_one_json_line() -> None:
    async def go() -> tuple[int | None, str, str]:
        server = Mock(status=200)
        async with asyncio.timeout(PATIENCE), server.running():
            child = await _started(
                "--url", server.url, "--requests", "3", "--output-length", "4", "--ttft-slo", "1s"
            )
            out, error = await child.communicate()
        return child.returncode, out.decode(), error.decode()

    code, out, error = asyncio.run(go())
    lines = out.strip().split("\n")
    assert code == 0 and error == ""
    assert "Serving Benchmark Result" in out and "goodput" in out and "ITL" in out
    assert json.loads(lines[-1])["completed"] == 3
    assert not any(line.startswith("{") for line in lines[:-1])


def test_ctrl_c_prints_what_there_is() -> None:
    async def go() -> tuple[int | None, str]:
        server = Mock(first=0.02, gap=0.0)
        async with asyncio.timeout(PATIENCE), server.running():
            child = await _started(
                "--url", server.url, "--requests", "100000", "--output-length", "2", "--json"
            )
            deadline = time.monotonic() + PATIENCE / 2
            while len(server.requests) < 30 and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
            os.kill(child.pid, signal.SIGINT)
            out, _ = await child.communicate()
        return child.returncode, out.decode()

    code, out = asyncio.run(go())
    result = json.loads(out)
    assert code == 130 and result["interrupted"] and result["completed"] > 10 and result["failed"] == 0


def test_the_help_is_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    """As that of the other commands: every flag under a heading that says what it is about."""
    with pytest.raises(SystemExit):
        main(["bench", "serve", "--help"])
    loose, *groups = capsys.readouterr().out.partition("options:")[2].split("\n\n")
    assert loose.count("--") == 1, "only --help stands alone"
    headings = [group.split(":")[0] for group in groups]
    assert headings == ["Server", "Load", "Lengths and prompts", "Trace", "Result"]
    assert "--rate" in groups[1] and "--trace-speed" in groups[3]
