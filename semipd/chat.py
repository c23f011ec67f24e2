"""`semipd chat`: a conversation in the terminal with any OpenAI-compatible server.

At a terminal: answers appear as they are produced, Ctrl-C stops the present answer, Ctrl-D ends. When the
input is no terminal, every line is a turn and only the answers are printed, so a chat can be scripted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TextIO

import httpx

from semipd.core.errors import ConfigError
from semipd.flags import add_flags, check_fields, from_flags, setting

HELP = """\
/reset          forget the conversation
/system [TEXT]  set the system message and start anew; without a text, show it
/help           show this
/quit           end (so does Ctrl-D)
Ctrl-C stops the present answer."""
SUGGESTIONS_SHOWN = 8
MAX_LINE = 1 << 20
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Options:
    """Chat"""

    url: str = setting("http://127.0.0.1:8000", "the server; any that speaks OpenAI's HTTP API")
    model: str | None = setting(None, "model to ask for (default: the first of /v1/models)")
    system: str | None = setting(None, "system message")
    temperature: float | None = setting(
        None, "0 always takes the likeliest token (default: the server's)", "number", low=0, high=100
    )
    top_p: float | None = setting(
        None,
        "draw from this share of the likeliest tokens (default: the server's)",
        "number",
        low=0,
        high=1,
    )
    max_tokens: int | None = setting(
        None, "most tokens of an answer (default: the server's)", "size", low=1, high=2**24
    )
    seed: int | None = setting(None, "of the drawing of tokens", "integer", low=0, high=2**63 - 1)
    api_key: str | None = setting(None, "sent as a bearer token")
    timeout: float = setting(
        600.0, "longest wait for the server's next sign", "seconds", low=0.01, high=1e6
    )

    def __post_init__(self) -> None:
        check_fields(self)


class ChatError(Exception):
    """One answer could not be had; the conversation may go on."""


class Piece(NamedTuple):
    """Of an answer. thought: of what comes before it, where the server tells that apart."""

    text: str
    thought: str


class Server:
    """Knows how to ask: one HTTP client and the sampling parameters."""

    def __init__(self, options: Options) -> None:
        url = options.url if "://" in options.url else f"http://{options.url}"
        headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
        try:
            self._http = httpx.Client(
                base_url=url.rstrip("/").removesuffix("/v1"),
                headers=headers,
                timeout=httpx.Timeout(options.timeout, connect=10.0),
                trust_env=False,
            )
        except (httpx.InvalidURL, UnicodeEncodeError, ValueError) as error:
            raise ConfigError(f"cannot ask {options.url!r}: {error}") from None
        self.url = url
        self._fields = {
            name: getattr(options, name)
            for name in ("temperature", "top_p", "max_tokens", "seed")
            if getattr(options, name) is not None
        }

    def find_model(self, wanted: str | None) -> tuple[str, list[str]]:
        """(model, suggestions to show). Raises ConfigError when no server is there or it has no model."""
        try:
            answer = self._http.get("/v1/models", timeout=10.0)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ConfigError(f"no server at {self.url}: {_reason(error)}") from None
        if answer.status_code in (401, 403):
            raise ConfigError(f"{self.url} refuses the API key (HTTP {answer.status_code}); see --api-key")
        entry = _model_entry(answer, wanted)
        model = wanted or entry.get("id")
        if not isinstance(model, str):
            raise ConfigError(f"{self.url}/v1/models names no model; give --model")
        suggestions = entry.get("suggestions")
        if not isinstance(suggestions, list):
            suggestions = []
        return model, [text for text in suggestions if isinstance(text, str)][:SUGGESTIONS_SHOWN]

    def answer(self, model: str, messages: list[dict[str, str]]) -> Generator[Piece]:
        """Yield the pieces of the next answer. Closing the iterator ends the request on the server.

        Raises ChatError."""
        body = {"model": model, "messages": messages, "stream": True, **self._fields}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise ChatError(_refusal(response))
                for line in _lines(response):
                    if line.startswith(b"data:") and any(piece := _piece(line[5:].strip())):
                        yield piece
        except httpx.HTTPError as error:
            raise ChatError(f"the connection failed: {_reason(error)}") from None

    def close(self) -> None:
        self._http.close()


def _model_entry(answer: httpx.Response, wanted: str | None) -> dict[str, Any]:
    try:
        entries = [entry for entry in answer.json()["data"] if isinstance(entry, dict)]
    except (ValueError, KeyError, TypeError):
        return {}
    if wanted is not None:
        entries = [entry for entry in entries if entry.get("id") == wanted]
    return entries[0] if entries else {}


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """Split at newlines only: `iter_lines` also splits at characters that JSON may hold (U+2028)."""
    rest = b""
    for piece in response.iter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    yield rest


def _piece(payload: bytes) -> Piece:
    """What is in one event. Raises ChatError for an error sent in the stream."""
    if payload == b"[DONE]":
        return Piece("", "")
    try:
        chunk = json.loads(payload)
        if chunk.get("error"):
            raise ChatError(_message(chunk["error"]))
        choices = chunk.get("choices") or [{}]
        delta = choices[0].get("delta") or {}
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        return Piece(str(delta.get("content") or ""), str(thought or ""))
    except (ValueError, AttributeError, TypeError, LookupError):
        raise ChatError("the server sent something that is no chat chunk") from None


def _refusal(response: httpx.Response) -> str:
    try:
        message = _message(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        message = response.reason_phrase
    return f"HTTP {response.status_code}: {message}"


def _message(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]


def _reason(error: Exception) -> str:
    """Few words: the system's message without its error number."""
    if isinstance(error, httpx.TimeoutException):
        return "timed out"
    text = str(error) or type(error).__name__
    return text.split("] ", 1)[-1].lower() if text.startswith("[Errno") else text


class Conversation:
    """The messages so far. A turn enters when its answer does, so a failed one leaves no trace."""

    def __init__(self, system: str | None) -> None:
        self.system = system
        self.turns: list[dict[str, str]] = []

    def with_turn(self, text: str) -> list[dict[str, str]]:
        """What to send for the next user turn."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.turns, {"role": "user", "content": text}]

    def add(self, text: str, answer: str) -> None:
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def reset(self, system: str | None) -> None:
        self.system, self.turns = system, []


class Chat:
    """Reads turns, prints answers to `out`, hints and errors to `notes`.

    interactive: Ctrl-C stops an answer; otherwise it ends the chat."""

    def __init__(
        self,
        server: Server,
        model: str,
        system: str | None,
        out: TextIO,
        notes: TextIO,
        interactive: bool = True,
    ) -> None:
        self._server, self._model, self._interactive = server, model, interactive
        self._conversation = Conversation(system)
        self._out, self._notes = out, notes
        self.failures = 0
        self._thinking = False

    def run(self, read: Callable[[], str]) -> None:
        """Until `read` raises EOFError (Ctrl-D) or the user quits."""
        while True:
            try:
                line = read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self.note("\n(Ctrl-D or /quit ends)")
                continue
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._turn(line)

    def note(self, text: str) -> None:
        print(printable(text), file=self._notes, flush=True)

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        match name:
            case "/reset":
                self._conversation.reset(self._conversation.system)
                self.note("(a new conversation)")
            case "/system" if rest.strip():
                self._conversation.reset(rest.strip())
                self.note("(a new conversation with this system message)")
            case "/system":
                self.note(self._conversation.system or "(no system message)")
            case "/help":
                self.note(HELP)
            case _:
                self.failures += 1
                self.note(f"unknown command {name}\n{HELP}")

    def _turn(self, text: str) -> None:
        """Ask and print. A stopped answer stays in the conversation as far as it went."""
        pieces: list[str] = []
        stream = self._server.answer(self._model, self._conversation.with_turn(text))
        try:
            for piece in stream:
                if self._interactive:
                    self._think(piece.thought)
                if piece.text:
                    self._think("")
                    pieces.append(piece.text)
                    self._out.write(printable(piece.text))
                    self._out.flush()
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            self.note("\n(stopped)")
        except ChatError as error:
            self.failures += 1
            self.note(("\n" if pieces else "") + f"error: {error}")
            return
        finally:
            stream.close()  # ends the request
            self._think("")
        self._out.write("\n")
        self._out.flush()
        if pieces:
            self._conversation.add(text, "".join(pieces))

    def _think(self, thought: str) -> None:
        """Show what the model thinks, paler than its answers; "": nothing more of it."""
        pale, normal = ("\x1b[2m", "\x1b[0m") if self._notes.isatty() else ("", "")
        if thought or self._thinking:
            text = f"{pale}{printable(thought)}{normal}" if thought else "\n\n"
            self._notes.write(text)
            self._notes.flush()
        self._thinking = bool(thought)


def printable(text: str) -> str:
    """Without control characters but newline and tab: a model must not steer the terminal. Without lone
    surrogates: they cannot be written."""
    return _CONTROLS.sub("", text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `semipd chat`."""
    add_flags(parser, Options)


def run(namespace: argparse.Namespace) -> int:
    """Hold a conversation on stdin and stdout. Returns 0; 1 when input was piped and a turn failed.

    Raises ConfigError when the server is not there (one line, exit code 2)."""
    options = from_flags(Options, namespace)
    server = Server(options)
    try:
        model, suggestions = server.find_model(options.model)
        at_terminal = sys.stdin.isatty()
        chat = Chat(server, model, options.system, sys.stdout, sys.stderr, at_terminal)
        if at_terminal:
            _welcome(chat, model, suggestions)
            chat.run(_prompt)
            return 0
        chat.run(_read_line)
        return 1 if chat.failures else 0
    finally:
        server.close()


def _welcome(chat: Chat, model: str, suggestions: list[str]) -> None:
    chat.note(f"Talking to {model}. /help shows the commands, Ctrl-D ends.")
    if suggestions:
        chat.note("Try:" + "".join(f"\n  {' '.join(text.split())}" for text in suggestions))


def _prompt() -> str:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives `input` a history and line editing
    return input("> ")


def _read_line() -> str:
    """The next line of piped input. Raises EOFError at its end, ConfigError for what is no text."""
    try:
        line = sys.stdin.readline(MAX_LINE)
        line.encode()
    except UnicodeError:
        raise ConfigError("the input is not UTF-8 text") from None
    if not line:
        raise EOFError
    if len(line) == MAX_LINE:
        raise ConfigError(f"a line of the input has more than {MAX_LINE} characters")
    return line
