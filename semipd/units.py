"""Sizes, times and names as people write them."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from semipd.core.errors import ConfigError

_SIZE = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)b?\s*$", re.IGNORECASE)
_TIME = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*(us|ms|s|m|h|)\s*$", re.IGNORECASE)
_LONGEST = 64  # characters; the patterns take quadratic time, and a header of a request is read with one
_MOST_NAMES = 64
_SECONDS = {"": 1.0, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_size(text: str | int) -> int:
    """A count or a number of bytes: 4096, "32K" (1,024s: K and Ki are the same), "2GiB".

    A fraction needs a unit, of which it leaves whole ones. Raises ConfigError."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = _SIZE.match(shown := str(text)[: _LONGEST + 1])
    if not match or len(shown) > _LONGEST:
        raise ConfigError(f"{shown!r} is not a size; write 4096, 32K or 2GiB")
    power = " kmgt".index(match[2].lower() or " ")
    size = Decimal(match[1]) * 1024**power
    if not power and size != int(size):
        raise ConfigError(f"{text!r} is not a whole number")
    return int(size)


def parse_seconds(text: str | float) -> float:
    """A time in seconds: 0.3, "300ms", "2m". A bare number is seconds. Raises ConfigError."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return float(text)
    match = _TIME.match(shown := str(text)[: _LONGEST + 1])
    if not match or len(shown) > _LONGEST:
        raise ConfigError(f"{shown!r} is not a time; write 0.3, 300ms or 2m")
    return float(match[1]) * _SECONDS[match[2].lower()]


def parse_text(text: Any) -> str:
    """Any text with something in it. Raises ConfigError."""
    if not isinstance(text, str):
        raise ConfigError(f"{text!r} is not text")
    if not text.strip():  # an unset variable of a shell: --api-key "$KEY" must not mean "no key"
        raise ConfigError("this is empty; leave it out for the default")
    return text


def parse_names(names: Any) -> tuple[str, ...]:
    """A name, or a list of them, each once. Raises ConfigError."""
    parts = [names] if isinstance(names, str) else names
    if not isinstance(parts, (list, tuple)) or not 1 <= len(parts) <= _MOST_NAMES:
        raise ConfigError(f"this is a name, or a list of 1 to {_MOST_NAMES} of them")
    return tuple(dict.fromkeys(map(parse_text, parts)))
