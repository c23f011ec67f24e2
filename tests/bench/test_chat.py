"""The terminal chat: turns, commands, and what happens when things fail."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import signal
import sys
import time
from collections.abc import Generator
from typing import cast

import pytest

from semipd.chat import Chat, Options, Piece, Server, printable
from semipd.core.errors import ConfigError
from tests.bench.mock import Mock


def talk(server: Mock, text: str | bytes, *flags: str, timeout: float = 30) -> tuple[int, str, str]:
    """Pipe lines into `semipd chat`; returns (exit code, stdout, stderr)."""

    async def go() -> tuple[int, str, str]:
        pipe = asyncio.subprocess.PIPE
        async with asyncio.timeout(timeout), server.running():
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "semipd.cli", "chat", "--url", server.url, *flags),
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
            )
            out, error = await child.communicate(text.encode() if isinstance(text, str) else text)
        assert child.returncode is not None
        return child.returncode, out.decode(), error.decode()

    return asyncio.run(go())


def test_a_scripted_conversation_remembers() -> None:
    server = Mock(answer="Grüße\u2028🙂", api_key="k")
    flags = ("--api-key", "k", "--system", "Be brief.", "--temperature", "0.5", "--max-tokens", "9")
    code, out, error = talk(server, "one\n\ntwo\n/reset\nthree\n/quit\nfour\n", *flags)
    assert (code, out) == (0, "Grüße\u2028🙂\n" * 3) and "new conversation" in error
    first, second, third = (request["messages"] for request in server.requests)
    system = {"role": "system", "content": "Be brief."}
    assert first == [system, {"role": "user", "content": "one"}]
    assert second == [
        *first,
        {"role": "assistant", "content": "Grüße\u2028🙂"},
        {"role": "user", "content": "two"},
    ]
    assert third == [system, {"role": "user", "content": "three"}]
    assert server.requests[0]["temperature"] == 0.5 and server.requests[0]["max_tokens"] == 9
    assert "top_p" not in server.requests[0]  # what was not asked for is the server's choice


class Thinker:
    """A server that tells what it thinks."""

    def answer(self, model: str, messages: list[dict[str, str]]) -> Generator[Piece]:
        yield Piece("", "let me")
        yield Piece("", " see")
        yield Piece("yes", "")


@pytest.mark.parametrize("interactive", [True, False])
def test_thoughts_are_shown_to_people_and_not_sent_back(interactive: bool) -> None:
    out, notes = io.StringIO(), io.StringIO()
    chat = Chat(cast(Server, Thinker()), "m", None, out, notes, interactive)
    lines = iter(["so?", "/quit"])
    chat.run(lambda: next(lines))
    assert out.getvalue() == "yes\n" and notes.getvalue() == ("let me see\n\n" if interactive else "")
    assert chat._conversation.turns[-1] == {"role": "assistant", "content": "yes"}


def test_a_system_message_can_be_set_and_shown() -> None:
    server = Mock(answer="yes")
    code, _, error = talk(server, "one\n/system Sing.\ntwo\n/system\n")
    assert code == 0 and "Sing." in error
    assert server.requests[1]["messages"] == [
        {"role": "system", "content": "Sing."},
        {"role": "user", "content": "two"},
    ]


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (Mock(status=400), "error: HTTP 400: not now"),
        (Mock(answer="abcdef", cut=3), "error: the connection failed"),
        (Mock(answer="abc", broken=b'data: {"error": {"message": "lost"}}\n\n'), "error: lost"),
        (Mock(answer="abc", broken=b"data: [1]\n\n"), "error: the server sent something"),
    ],
)
def test_a_failed_turn_is_told_and_forgotten(server: Mock, message: str) -> None:
    code, _, error = talk(server, "one\ntwo\n")
    assert code == 1 and message in error and "Traceback" not in error
    assert [len(request["messages"]) for request in server.requests] == [1, 1]


def test_an_unknown_command_is_not_sent() -> None:
    server = Mock(answer="x")
    code, out, error = talk(server, "/rest\n")
    assert code == 1 and out == "" and "unknown command /rest" in error and server.requests == []


def test_input_that_is_no_text() -> None:
    code, _, error = talk(Mock(answer="x"), b"\xff\xfe\n")
    assert code == 2 and "UTF-8" in error and "Traceback" not in error


def test_no_server_and_a_wrong_key_are_one_line() -> None:
    server = Mock(api_key="k")
    code, _, error = talk(server, "one\n")
    assert code == 2 and "API key" in error and error.count("\n") == 1
    code, _, error = talk(server, "one\n", "--url", "http://127.0.0.1:9")
    assert code == 2 and "no server at http://127.0.0.1:9" in error and error.count("\n") == 1


def test_a_model_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\rc\x9b\x07\td\né🙂\ud800") == "a[2Jbc\td\né🙂"


@pytest.mark.parametrize(
    "values", [{"temperature": -1}, {"temperature": "nan"}, {"top_p": 2}, {"max_tokens": 0}, {"timeout": 0}]
)
def test_bad_options_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Options(**values)  # type: ignore[arg-type]


def test_ctrl_c_stops_the_answer_and_ctrl_d_the_chat() -> None:
    """At a terminal: suggestions are shown, the first Ctrl-C ends one answer only, and the server sees the
    stream closed."""

    async def go() -> tuple[int | None, str, Mock]:
        server = Mock(answer="z" * 2000, gap=0.05, models=[{"id": "m", "suggestions": ["Say hi", 5]}])
        ours, theirs = pty.openpty()
        os.set_blocking(ours, False)
        seen = bytearray()

        async def until(text: str) -> None:
            deadline = time.monotonic() + 60
            while text.encode() not in seen:
                assert time.monotonic() < deadline, f"no {text!r} in {bytes(seen)!r}"
                await asyncio.sleep(0.02)
                try:
                    seen.extend(os.read(ours, 65536))
                except BlockingIOError:
                    continue

        async with server.running():
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "semipd.cli", "chat", "--url", server.url),
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                # A shell that runs the tests in the background has them ignore SIGINT; a terminal does not.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
            try:
                await until("Say hi")
                await until("> ")
                os.write(ours, b"hello\n")
                await until("zzz")
                child.send_signal(signal.SIGINT)
                await until("(stopped)")
                seen.clear()
                os.write(ours, b"again\n")
                await until("zzz")
                child.send_signal(signal.SIGINT)
                await until("(stopped)")
                os.write(ours, b"\x04")
                async with asyncio.timeout(10):
                    await child.wait()
            finally:
                if child.returncode is None:
                    child.kill()
                    await child.wait()
            deadline = time.monotonic() + 5
            while server.closed < 2 and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
        os.close(ours)
        os.close(theirs)
        return child.returncode, seen.decode(), server

    code, seen, server = asyncio.run(go())
    assert code == 0 and "Traceback" not in seen
    assert len(server.requests) == 2 and server.closed >= 2
    spoken = [message["role"] for message in server.requests[1]["messages"]]
    assert spoken == ["user", "assistant", "user"]  # the answer stays as far as it went
