"""A live server on a loopback port, with the fake engine in a thread behind it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from semipd.build import targets_of
from semipd.config import PolicyConfig
from semipd.serve.app import create_app
from semipd.serve.chat import load_chat_template
from semipd.serve.gate import Limits
from semipd.serve.generation import RequestMaker
from semipd.serve.http import http_server
from semipd.serve.model_folder import read_model_folder
from semipd.serve.service import Service
from semipd.serve.session import Session
from semipd.serve.thread_link import EngineThread, ThreadLink
from semipd.serve.tokenizer import Tokenizer
from tests.serve.fakes import MAX_LENGTH, LiveFake, make_engine, make_tokenizer


class Serving:
    """Where the server is, and what is behind it."""

    def __init__(self, executor: LiveFake, service: Service, thread: EngineThread, port: int) -> None:
        self.executor = executor
        self.service = service
        self.thread = thread
        self.url = f"http://127.0.0.1:{port}"

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20.0, headers=headers, trust_env=False)


@contextmanager
def serving(
    folder: Path,
    executor: LiveFake,
    *,
    api_key: str | None = None,
    limits: Limits = Limits(),
    sequences: int = 16,
    policy: PolicyConfig = PolicyConfig(),
    metrics_alias: str | None = None,
    tool_call_parser: str = "auto",
    reasoning_parser: str = "auto",
    length: int = MAX_LENGTH,
    names: Sequence[str] = ("tiny",),
    skip_hosted_tools: bool = False,
) -> Iterator[Serving]:
    """Serve the folder's tokenizer over the executor's tokens until the block ends. policy: its targets."""
    engine_thread = EngineThread(
        lambda observers: make_engine(executor, observers, sequences=sequences, length=length),
        targets_of(policy),
    )
    session = Session(ThreadLink(engine_thread))
    model = read_model_folder(folder)
    tokenizer = Tokenizer(folder)
    chat = load_chat_template(folder, tokenizer)
    maker = RequestMaker(model, classes=policy.classes or (), tokenizer=tokenizer)
    tools = tool_call_parser, reasoning_parser, skip_hosted_tools
    service = Service(names, model, tokenizer, chat, maker, session, limits, *tools)
    http = http_server(create_app(service, "1.2.3", api_key, metrics_alias), limits)
    listener = socket.create_server(("127.0.0.1", 0))

    async def main() -> None:
        await session.open()
        await http.serve(sockets=[listener])
        await session.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        yield Serving(executor, service, engine_thread, listener.getsockname()[1])
    finally:
        http.should_exit = True
        thread.join(10)
        service.close()
        engine_thread.close()
        listener.close()
    assert not thread.is_alive(), "the server did not stop"


def script_of(text: str) -> list[int]:
    """The tokens of an answer, and its end."""
    return [*make_tokenizer().encode(text).ids, 0]


@contextmanager
def speaking(folder: Path, text: str, **more: Any) -> Iterator[Serving]:
    """A server on which every answer is this text. more: as for `serving`."""
    with serving(folder, LiveFake(script=script_of(text)), length=1024, **more) as running:
        yield running
