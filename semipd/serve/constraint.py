"""What may be produced at all: a request's response format, allowed tokens and bad words, checked and made
ready for those who choose tokens. May wait for a grammar, so not for the event loop's thread."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec

from semipd.core.errors import Refused
from semipd.core.types import Constraint
from semipd.model.grammar_text import GrammarError
from semipd.serve.grammar_check import GrammarCheck
from semipd.serve.model_folder import ModelFolder
from semipd.serve.params import SamplingParams
from semipd.serve.tokenizer import Tokenizer

MAX_SCHEMA_BYTES = 2**16
MAX_SCHEMA_DEPTH = 64
MAX_MULTIPLE = 10_000  # states of an automaton that counts remainders; the library has no limit on them
MAX_PATTERN = 4096  # characters; a token can take time in their square, wherever in the text it comes
MAX_CONSTRAINT = 2**17  # bytes, as `execute.storage` has room for
MAX_BAD_WORD_TOKENS = 64
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FORMAT = "response_format"


class Lark(NamedTuple):
    """A grammar of calls of tools, or of what param asks for. spelled: the same without special tokens, by
    which it is checked."""

    text: str
    spelled: str
    param: str = "tools"


class ConstraintMaker:
    """Of one model. tokenizer: None where it has none; then only token ids can be named. Safe to use from
    several threads."""

    def __init__(self, model: ModelFolder, tokenizer: Tokenizer | None) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._check = GrammarCheck()

    def close(self) -> None:
        """End the process that tries out grammars. Idempotent; the next grammar starts it again."""
        self._check.close()

    def of(self, params: SamplingParams, calls: Lark | None = None, wait: bool = True) -> Constraint | None:
        """None where everything may be produced. calls: what the text has to follow instead of a response
        format. wait: for a new grammar to be tried out.

        Raises Refused, naming the field, Overloaded where no grammar can be tried out, and Unchecked."""
        schema = schema_of(params.response_format)
        grammar = ""
        if schema is None and calls is None and params.allowed_token_ids is None and not params.bad_words:
            return None
        if schema is not None or calls is not None:
            _check_company(params)
            if self._tokenizer is None:
                raise Refused("the model folder has no tokenizer.json to follow a grammar with", _FORMAT)
            grammar = self._lark(calls, wait) if calls is not None else self._json(schema or "", wait)
        allowed = tuple(params.allowed_token_ids or ())
        if allowed and max(allowed) >= self._model.vocabulary:
            raise Refused(f"token {max(allowed)} is not in the vocabulary", "allowed_token_ids")
        constraint = Constraint(
            grammar=grammar,
            # A model that cannot say that it is done says its last token where it has to be.
            ends=self._model.eos or (self._model.vocabulary - 1,),
            allowed=allowed,
            bad_words=tuple(
                dict.fromkeys(ids for word in params.bad_words for ids in self._spellings(word))
            ),
        )
        if grammar and (size := len(msgspec.msgpack.encode(constraint))) > MAX_CONSTRAINT:
            param = calls.param if calls is not None else _FORMAT
            raise Refused(f"{param}: a grammar of {size} bytes; at most {MAX_CONSTRAINT}", param)
        return constraint

    def _json(self, schema: str, wait: bool) -> str:
        try:
            return self._check.of({"schema": schema}, wait)
        except GrammarError as error:
            raise Refused(f"response_format: this schema is not supported: {error}", _FORMAT) from None

    def _lark(self, lark: Lark, wait: bool) -> str:
        if len(lark.text) > MAX_SCHEMA_BYTES:
            message = f"{lark.param}: a grammar of {len(lark.text)} bytes; at most {MAX_SCHEMA_BYTES}"
            raise Refused(message, lark.param)
        try:
            return self._check.of({"lark": lark.text, "spelled": lark.spelled}, wait)
        except GrammarError as error:
            message = f"{lark.param}: this schema is not supported: {error}"
            raise Refused(message, lark.param) from None

    def _spellings(self, word: str) -> list[tuple[int, ...]]:
        """The word's tokens at a text's beginning and after a blank, as vLLM has them: the second only if
        it has another first token and no more of them."""
        if self._tokenizer is None:
            raise Refused("the model folder has no tokenizer.json to find words with", "bad_words")
        plain, spaced = (tuple(self._tokenizer.encode(text, False)) for text in (word, " " + word.lstrip()))
        if not plain:
            raise Refused(f"bad_words: {word[:40]!r} has no tokens", "bad_words")
        if len(plain) > MAX_BAD_WORD_TOKENS:
            message = f"bad_words: {word[:40]!r} has {len(plain)} tokens; at most {MAX_BAD_WORD_TOKENS}"
            raise Refused(message, "bad_words")
        another = spaced and spaced[0] != plain[0] and len(spaced) == len(plain)
        return [plain, spaced] if another else [plain]


def schema_of(response_format: Mapping[str, Any] | None) -> str | None:
    """The JSON schema, as text, that an OpenAI response format asks for; None for any text. Raises
    Refused."""
    if response_format is None:
        return None
    kind = response_format.get("type")
    extra = set(response_format) - {"type", "json_schema"}
    if extra:
        raise Refused(f"unknown parameter: response_format.{str(min(extra))[:80]}", _FORMAT)
    given = response_format.get("json_schema")
    if kind != "json_schema" and given is not None:
        raise Refused("response_format.json_schema needs the type json_schema", _FORMAT)
    match kind:
        case "text":
            return None
        case "json_object":
            return '{"type":"object"}'
        case "json_schema":
            return _schema(given)
    raise Refused("response_format.type must be text, json_object or json_schema", _FORMAT)


def _schema(given: Any) -> str:
    if not isinstance(given, Mapping):
        raise Refused("response_format.json_schema is missing", _FORMAT)
    extra = set(given) - {"name", "schema", "strict", "description"}
    if extra:
        raise Refused(f"unknown parameter: response_format.json_schema.{str(min(extra))[:80]}", _FORMAT)
    name, schema = given.get("name"), given.get("schema")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise Refused("response_format.json_schema.name must be 1 to 64 of A-Z, a-z, 0-9, _ and -", _FORMAT)
    if not isinstance(schema, Mapping):
        raise Refused("response_format.json_schema.schema must be an object", _FORMAT)
    check_schema(schema, _FORMAT)
    try:
        text = msgspec.json.encode(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise Refused(f"response_format.json_schema.schema is no JSON: {error}", _FORMAT) from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise Refused(f"the schema has {len(text)} bytes; at most {MAX_SCHEMA_BYTES} are taken", _FORMAT)
    return text.decode()


def check_schema(schema: Any, param: str) -> None:
    """Refuse what is nested too deeply, and what the compiler would work on for ever, as `param`."""
    level, multiple = [schema], 1
    for _ in range(MAX_SCHEMA_DEPTH):
        deeper: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                multiple = math.lcm(multiple, _digits(value.get("multipleOf")))
                if "pattern" in value or "patternProperties" in value:
                    _check_patterns(value, param)
                deeper += value.values()
            elif isinstance(value, (list, tuple)):
                deeper += value
            if multiple > MAX_MULTIPLE:
                message = f"the least common multiple of all multipleOf exceeds {MAX_MULTIPLE}"
                raise Refused(f"{param}: this schema is not supported: {message}", param)
        level = deeper
        if not level:
            return
    raise Refused(f"the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep", param)


def _check_patterns(schema: Mapping[Any, Any], param: str) -> None:
    several = schema.get("patternProperties")
    for pattern in (schema.get("pattern"), *(several if isinstance(several, Mapping) else ())):
        if isinstance(pattern, str) and len(pattern) > MAX_PATTERN:
            message = f"a pattern of {len(pattern)} characters; at most {MAX_PATTERN}"
            raise Refused(f"{param}: this schema is not supported: {message}", param)


def _digits(value: Any) -> int:
    """A number without its decimal point; 1 for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value or value != value:
        return 1
    if abs(value) > MAX_MULTIPLE:
        return MAX_MULTIPLE + 1
    _, digits, exponent = Decimal(str(value)).as_tuple()
    assert isinstance(exponent, int)
    whole = int("".join(map(str, digits)))
    return whole if exponent < 0 else int(abs(value))


def _check_company(params: SamplingParams) -> None:
    """Refuse what contradicts a grammar."""
    if params.ignore_eos:
        message = "ignore_eos contradicts response_format and tool_choice: their text ends when complete"
        raise Refused(message, "ignore_eos")
    if params.min_tokens:
        message = "min_tokens contradicts response_format and tool_choice: their text ends when complete"
        raise Refused(message, "min_tokens")
    if params.allowed_token_ids is not None:
        message = "allowed_token_ids contradicts response_format and tool_choice"
        raise Refused(message, "allowed_token_ids")
