"""What the front end must know of a model folder: vocabulary size, end-of-sequence ids, sampling defaults,
what to ask it.

Reads the JSON files of a Hugging Face model folder; never the weights."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semipd.core.errors import ConfigError, Refused
from semipd.serve.params import Defaults, SamplingParams

MAX_EOS = 16
MAX_SUGGESTIONS = 8
MAX_SUGGESTION = 200
UNSUPPORTED_DEFAULTS = {"no_repeat_ngram_size": 0, "typical_p": 1.0}

_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character: cannot be sent or shown

log = logging.getLogger("semipd")


@dataclass(frozen=True)
class ModelFolder:
    """path: the folder. vocabulary: ids run from 0 to vocabulary - 1. eos: ids that end a sequence.

    suggestions: questions that the model can answer, for people who meet it (suggestions.json)."""

    path: Path
    vocabulary: int
    eos: tuple[int, ...]
    defaults: Defaults
    suggestions: tuple[str, ...] = ()


def read_model_folder(path: str | Path, own_defaults: bool = True) -> ModelFolder:
    """own_defaults: take sampling defaults from generation_config.json. Raises ConfigError, in one line,
    for a folder that is not one of a model."""
    folder = Path(path)
    config = read_json(folder / "config.json")
    if config is None:
        raise ConfigError(f"{folder}: there is no config.json, so this is not a model folder")
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    vocabulary = text.get("vocab_size")
    if isinstance(vocabulary, bool) or not isinstance(vocabulary, int) or not 1 <= vocabulary < 2**31:
        raise ConfigError(f"{folder / 'config.json'}: vocab_size is {vocabulary!r}, not a count")
    generation = read_json(folder / "generation_config.json") or {}
    eos = _ids(generation.get("eos_token_id"), vocabulary) or _ids(text.get("eos_token_id"), vocabulary)
    if len(eos) > MAX_EOS:
        raise ConfigError(f"{folder}: {len(eos)} end-of-sequence ids; at most {MAX_EOS} can be used")
    defaults = _defaults(folder, generation) if own_defaults else Defaults()
    return ModelFolder(folder, vocabulary, eos, defaults, _suggestions(folder))


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file. Raises ConfigError for a broken one."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds no JSON object")
    return value


def _suggestions(folder: Path) -> tuple[str, ...]:
    """{"suggestions": [text, ...]}; what is too long or no text is left out."""
    value = (read_json(folder / "suggestions.json") or {}).get("suggestions")
    texts = value if isinstance(value, list) else []
    short = [text for text in texts if isinstance(text, str) and 0 < len(text) <= MAX_SUGGESTION]
    return tuple([text for text in short if not _SURROGATE.search(text)][:MAX_SUGGESTIONS])


def _ids(value: Any, vocabulary: int) -> tuple[int, ...]:
    """Distinct token ids; what no model can say is left out: some write -1 for none."""
    ids = [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and i >= 0]
    if beyond := [i for i in ids if i >= vocabulary]:
        log.warning("eos_token_id %.30s is beyond the vocabulary of %d; ignored", beyond[0], vocabulary)
    return tuple(dict.fromkeys(i for i in ids if i < vocabulary))


def _defaults(folder: Path, generation: dict[str, Any]) -> Defaults:
    for name, neutral in UNSUPPORTED_DEFAULTS.items():
        if generation.get(name) not in (None, neutral):
            log.warning("generation_config.json sets %s, which is not supported; ignored", name)
    given = {
        name: generation[name]
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        if generation.get(name) is not None
    }
    try:
        params = SamplingParams(**given)
    except Refused as refused:
        raise ConfigError(f"{folder / 'generation_config.json'}: {refused}") from None
    filled = Defaults().fill(params)
    assert filled.temperature is not None and filled.top_p is not None
    assert filled.top_k is not None and filled.min_p is not None and filled.repetition_penalty is not None
    return Defaults(filled.temperature, filled.top_p, filled.top_k, filled.min_p, filled.repetition_penalty)
