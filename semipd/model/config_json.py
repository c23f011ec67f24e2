"""Typed reading of a JSON mapping: every wrong value becomes one line that names its key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from semipd.core.errors import ConfigError

MAX_COUNT = 2**40  # above any real size; keeps arithmetic with a broken config harmless


class ConfigReader:
    """Reads keys of `config`. A key that is absent or null takes the default; without one it is an error.

    Every method raises ConfigError naming the key."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 on."""
        value = self.whole(key, default)
        if value == 0:
            raise ConfigError(
                f"the model's config says {key}: {value!r}; it must be a whole number above 0"
            )
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number from 0 on."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
            raise ConfigError(f"the model's config says {key}: {value!r}; it must be a whole number")
        return value

    def optional_count(self, key: str, default: int) -> int | None:
        """A whole number from 1 on; an explicit null is None, an absent key the default."""
        if key in self.config and self.config[key] is None:
            return None
        return self.count(key, default)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._value(key, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            raise ConfigError(f"the model's config says {key}: {value!r}; it must be a number above 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"the model's config says {key}: {value!r}; it must be true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id, a list of them, or none."""
        value = self.config.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in values):
            raise ConfigError(
                f"the model's config says {key}: {value!r}; it must be a token id or a list of them"
            )
        return tuple(item for item in values if item >= 0)  # some configs write -1 for none

    def mapping(self, key: str) -> dict[str, Any]:
        """A JSON object; empty when absent."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"the model's config says {key}: {value!r}; it must be an object")
        return value or {}

    def items(self, key: str) -> list[Any]:
        """A list; empty when absent."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, list):
            raise ConfigError(f"the model's config says {key}: {value!r}; it must be a list")
        return value or []

    def refuse_unless(self, key: str, expected: Any) -> None:
        """Raise when the key is set to anything that is not implemented."""
        value = self.config.get(key)
        if value is not None and value != expected:
            raise ConfigError(f"{key} {value!r} is not supported (only {expected!r})")

    def _value(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"the model's config does not say {key}")
        return value
