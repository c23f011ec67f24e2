"""The server's process: starts the engine, listens, logs, and ends in good order.

SIGTERM: not ready any more, what is under way finishes (within a time), then the end; a second signal ends
at once. SIGINT (Ctrl-C): the end at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import logging
import os
import shlex
import signal
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import setproctitle

from semipd.build import resolve
from semipd.config import Config
from semipd.core.errors import ConfigError, EngineDead
from semipd.serve.app import create_app
from semipd.serve.chat import load_chat_template
from semipd.serve.gate import Limits
from semipd.serve.generation import RequestMaker
from semipd.serve.http import allow_many_connections, http_server
from semipd.serve.launch import EngineProcess
from semipd.serve.messages import EngineInfo
from semipd.serve.model_folder import read_model_folder
from semipd.serve.process_link import ProcessLink
from semipd.serve.service import Service
from semipd.serve.session import Session
from semipd.serve.tokenizer import Tokenizer
from semipd.serve.traffic import log_traffic

GRACE_SECONDS = 1.0  # for answers that are being written when everything ends
SHOWN_PROMPT = "Once upon a time"  # to a model that does not say what to ask it

log = logging.getLogger("semipd")


def run_server(config: Config, engine: EngineProcess) -> int:
    """Serve until a signal ends it; returns the exit code. Raises ConfigError for what cannot work.

    engine: a process that waits for its settings; started on the main thread, since it ends with the thread
    that started it."""
    setproctitle.setproctitle("semipd-api")
    connections = allow_many_connections()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the cores belong to the model
    resolved = resolve(config)
    folder = read_model_folder(resolved.folder, config.model.generation_config == "auto")
    listener = _listen(config.server.host, config.server.port)
    found = dataclasses.replace(config.model, model=str(resolved.folder))
    link = ProcessLink(dataclasses.replace(config, model=found), engine)
    session = Session(link)
    with listener:
        link.start()  # it loads the model while this process loads the tokenizer
        try:
            tokenizer = Tokenizer(resolved.folder)
            chat = load_chat_template(resolved.folder, tokenizer, config.server.chat_template)
            classes = config.policy.classes or ()
            maker = RequestMaker(folder, config.model.seed, config.cache.prefix_cache, classes, tokenizer)
            limits = dataclasses.replace(Limits.of(config.server), connections=connections)
            server = config.server
            tools = server.tool_call_parser, server.reasoning_parser, server.skip_hosted_tools
            service = Service(resolved.names, folder, tokenizer, chat, maker, session, limits, *tools)
            return asyncio.run(_Server(config, service, listener).run())
        finally:
            link.kill()


class _Server:
    """One run on an event loop."""

    def __init__(self, config: Config, service: Service, listener: socket.socket) -> None:
        self._config = config
        self._service = service
        self._session = service.session
        self._listener = listener
        self._end = asyncio.Event()
        self._hurry = asyncio.Event()
        app = create_app(service, package_version(), config.server.api_key, config.server.metrics_alias)
        self._http = http_server(app, service.gate.limits)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._terminate)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        await self._session.open()
        serving = asyncio.create_task(self._http.serve(sockets=[self._listener]))
        logging_traffic = asyncio.create_task(log_traffic(self._service))
        ending = asyncio.create_task(self._end.wait())
        try:
            await self._started(ending)
            await asyncio.wait((serving, ending), return_when=asyncio.FIRST_COMPLETED)
            await self._drain()
        finally:
            ending.cancel()
            logging_traffic.cancel()
            await self._session.close()
            await self._stop(serving)
            self._service.close()
        return 0

    async def _started(self, ending: asyncio.Task[bool]) -> None:
        """Wait for the engine, and say that it is there. Raises ConfigError if it cannot be built."""
        info = asyncio.create_task(self._session.info())
        await asyncio.wait((info, ending), return_when=asyncio.FIRST_COMPLETED)
        if not info.done():
            info.cancel()
            return
        try:
            engine = info.result()
        except EngineDead:
            lost = self._session.lost
            if lost is not None and lost.refused:
                raise ConfigError(lost.why) from None
            raise
        gc.freeze()  # a collection that walks all modules would hold up every stream for 30 to 60 ms
        _say("\n".join(self._greeting(engine)))

    def _greeting(self, engine: EngineInfo) -> Iterator[str]:
        server, name = self._config.server, self._service.name
        host, port = self._listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        yield f"semipd {package_version()} serves {name} at {url}"
        units = f"{engine.units} {engine.unit_kind}s"
        yield f"on {engine.device}, {units}, sequences of up to {engine.limit} tokens, {self._scheduling()}"
        key = " -H 'Authorization: Bearer KEY'" if server.api_key is not None else ""
        prompt = next(iter(self._service.model.suggestions), SHOWN_PROMPT)
        body = json.dumps({"model": name, "prompt": prompt, "max_tokens": 32}, ensure_ascii=False)
        what = shlex.quote(body)
        yield f"try: curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d {what}"

    def _scheduling(self) -> str:
        """The policy and its targets, as they were understood."""
        policy = self._config.policy
        words = [f"policy {policy.policy}"]
        if policy.ttft_slo is not None:
            words.append(f"first token within {policy.ttft_slo * 1000:g} ms")
        if policy.tpot_slo is not None:
            words.append(f"then {policy.tpot_slo * 1000:g} ms per token")
        return ", ".join(words)

    async def _drain(self) -> None:
        gate = self._service.gate
        gate.draining = True
        if gate.active:
            log.info("waiting up to %g s for %d requests", gate.limits.drain, gate.active)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(gate.limits.drain):
                while gate.active and not self._hurry.is_set() and self._session.lost is None:
                    await asyncio.sleep(0.02)

    async def _stop(self, serving: asyncio.Task[None]) -> None:
        """After the session was closed, so whoever still waits has been told."""
        self._http.should_exit = True
        done, _ = await asyncio.wait((serving,), timeout=GRACE_SECONDS)
        if not done:
            self._http.force_exit = True
            serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving

    def _terminate(self) -> None:
        if self._end.is_set():
            self._hurry.set()
        self._service.gate.draining = True
        self._end.set()

    def _interrupt(self) -> None:
        self._hurry.set()
        self._terminate()


def _say(text: str) -> None:
    """Print it, as far as the output takes it: a server serves whether or not anybody reads this."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails when it ends


def package_version() -> str:
    try:
        return version("semipd")
    except PackageNotFoundError:
        return "0"


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError when the address cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        # Python puts the address behind the system's words, which is said here already.
        reason = str(getattr(error, "strerror", None) or error).partition(" (while attempting")[0]
        raise ConfigError(f"cannot listen on {host}, port {port}: {reason}") from None
