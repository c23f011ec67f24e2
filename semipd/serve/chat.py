"""Messages to token ids by the model's own chat template, in a sandbox.

A template's special tokens are meant; the same characters in a message are not (CVE-2026-44222). So before
rendering, every special token that a message spells is replaced by a mark that no client can guess, and
after rendering, text around the template's special tokens is encoded as plain characters.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from semipd.core.errors import ConfigError, Refused
from semipd.serve.tokenizer import Tokenizer

Message = Mapping[str, Any]  # role, content and what conversation.messages_of adds
_OWN_VARIABLES = frozenset(("messages", "add_generation_prompt", "tools", "documents"))
TOOL_USE = "tool_use"  # the name of a second template, for conversations with tools


class ChatTemplate:
    """A model's chat template, compiled once. Safe to use from several threads.

    tool_source: the template for conversations with tools; None where the model takes none."""

    def __init__(self, source: str, tokenizer: Tokenizer, with_tools: str | None = None) -> None:
        """with_tools: a second template, for conversations with tools."""
        self._template, self._looks_at = _compiled(source)
        self._sources = source + (with_tools or "")
        self.tool_source = source if "tools" in self._looks_at else None
        self._with_tools = self._template
        if with_tools is not None:
            self._with_tools, more = _compiled(with_tools)
            self._looks_at |= more
            self.tool_source = with_tools
        self._tokenizer = tokenizer
        # Longest first, so that a token that begins with another is seen whole.
        texts = sorted(tokenizer.special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts)) or r"(?!)")
        self._special_ids = frozenset(tokenizer.special.values())
        self._names = {
            name: text
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (text := tokenizer.named_special(name)) is not None
        }

    def mentions(self, text: str) -> bool:
        """Whether the template has this text in it."""
        return text in self._sources

    def looks_at(self, name: str) -> bool:
        """Whether the template has this variable."""
        return name in self._looks_at

    def encode(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] = MappingProxyType({}),
        open_end: bool = False,
    ) -> list[int]:
        """Ids of the rendered conversation. variables: of the template, besides. open_end: leave out what
        comes behind the last message's content. Raises Refused when the template refuses."""
        self._check_variables(variables)
        mark = f"\ue000{secrets.token_hex(8)}:"
        hidden: list[str] = []

        def hide(match: re.Match[str]) -> str:
            hidden.append(match[0])
            return f"{mark}{len(hidden) - 1}\ue001"

        def safe(value: Any) -> Any:
            if isinstance(value, str):
                return self._special.sub(hide, value)
            if isinstance(value, Mapping):
                return {safe(key): safe(part) for key, part in value.items()}
            return [safe(part) for part in value] if isinstance(value, list) else value

        turns, end = safe(list(messages)), f"{mark}end\ue001"
        if open_end:
            turns[-1]["content"] += end
        text = self._render(turns, add_generation_prompt, safe(list(tools)), safe(variables))
        if open_end:
            text, found, _ = text.rpartition(end)
            if not found:
                message = "the chat template does not end with the last message's content"
                raise Refused(message, "continue_final_message")
        if not hidden:
            ids = self._tokenizer.encode_trusted(text)
            if self._specials_in(ids) == self._specials_of(text):
                return ids
        return self._encode_marked(text, re.compile(mark + "([0-9]+)\ue001"), hidden)

    def _specials_in(self, ids: Sequence[int]) -> list[int]:
        return [index for index in ids if index in self._special_ids]

    def _specials_of(self, text: str) -> list[int]:
        """Those that the text spells out. Encoding may find more: a normaliser can make one of others."""
        return [self._tokenizer.special[found] for found in self._special.findall(text)]

    def _encode_marked(self, text: str, mark: re.Pattern[str], hidden: Sequence[str]) -> list[int]:
        ids: list[int] = []
        end = 0
        for match in [*self._special.finditer(text), None]:
            plain = text[end : match.start()] if match else text[end:]
            if plain:
                plain = mark.sub(lambda found: hidden[int(found[1])], plain)
                ids += self._tokenizer.encode(plain, add_special=False)
            if match:
                ids.append(self._tokenizer.special[match[0]])
                end = match.end()
        return ids

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        """Variables are only those that the template knows and nobody else sets."""
        for name, value in variables.items():
            if name not in self._looks_at or name in _OWN_VARIABLES or name in self._names:
                message = (
                    f"chat_template_kwargs.{name[:80]}: this model's chat template has no such variable"
                )
                raise Refused(message, "chat_template_kwargs")
            if not isinstance(value, (bool, int, float, str, type(None))):
                message = f"chat_template_kwargs.{name[:80]} must be a string, a number, true or false"
                raise Refused(message, "chat_template_kwargs")

    def _render(
        self, messages: list[Any], add_generation_prompt: bool, tools: list[Any], variables: dict[str, Any]
    ) -> str:
        template = self._with_tools if tools else self._template
        try:
            return template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=tools or None,
                documents=None,
                **self._names,
                **variables,
            )
        except TemplateError as error:
            raise Refused(f"the chat template refused the messages: {error}", "messages") from None
        except Exception as error:  # whatever a template's own code raises is about these messages
            text = f"the chat template failed on the messages: {type(error).__name__}: {error}"
            raise Refused(text, "messages") from None


def load_chat_template(
    folder: Path, tokenizer: Tokenizer, file: str | Path | None = None
) -> ChatTemplate | None:
    """The template in chat_template.jinja or tokenizer_config.json, and the one for tools where that is
    another; None for a model without one. file: the template, instead. Raises ConfigError."""
    if file is not None:
        source = _read(Path(file).expanduser())
        if source is None:
            raise ConfigError(f"--chat-template: there is no file {file}")
        return ChatTemplate(source, tokenizer)
    named = _named_templates(tokenizer.config)
    source = _read(folder / "chat_template.jinja") or named.get("default")
    with_tools = _read(folder / "additional_chat_templates" / f"{TOOL_USE}.jinja") or named.get(TOOL_USE)
    return ChatTemplate(source, tokenizer, with_tools) if source is not None else None


def _named_templates(config: Mapping[str, Any]) -> dict[str, str]:
    """Those of tokenizer_config.json, which holds one or a list with names."""
    given = config.get("chat_template")
    if not isinstance(given, list):
        return {"default": given} if isinstance(given, str) else {}
    entries = [entry for entry in given if isinstance(entry, dict)]
    return {
        str(entry.get("name")): entry["template"]
        for entry in entries
        if isinstance(entry.get("template"), str)
    }


def _read(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None


def _compiled(source: str) -> tuple[Template, set[str]]:
    """The template, and the variables that it looks at."""
    environment = _environment()
    try:
        names = meta.find_undeclared_variables(environment.parse(source))
        return environment.from_string(source), names - set(environment.globals)
    except TemplateSyntaxError as error:
        raise ConfigError(f"the chat template has an error on line {error.lineno}: {error}") from None


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as the field's templates expect it: trimmed blocks, break and continue, a few functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    environment.globals["namespace"] = _SafeNamespace
    return environment


class _SafeNamespace(Namespace):
    """Without names that begin with an underscore, through which a template could reach the interpreter."""

    def __init__(*arguments: Any, **values: Any) -> None:
        given = dict(*arguments[1:], **values)
        for name in given:
            _check_name(name)
        Namespace.__init__(arguments[0], given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise TemplateError(f"a namespace cannot hold {name!r}")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own, does not escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
