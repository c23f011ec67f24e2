"""What the value of a setting may be, and how it is made from what was written; service classes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from semipd.core.errors import ConfigError
from semipd.units import parse_names, parse_seconds, parse_size, parse_text

MAX_CLASSES = 16
NEUTRAL_CLASSES = ("auto", "default")  # names that a request may give to say nothing
_CLASS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Setting:
    """What a field's value may be, and what to tell the user about it."""

    help: str
    kind: str = "text"  # text, names, size, integer, number, seconds, choice, flag, classes
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    metavar: str = ""


@dataclass(frozen=True, slots=True)
class ServiceClass:
    """Requests with targets of their own. ttft, tpot: in seconds; None means no target.

    priority: a request with this `priority` belongs here; None when only the name leads here."""

    name: str
    ttft: float | None = None
    tpot: float | None = None
    priority: int | None = None


def check(name: str, value: Any, setting: Setting) -> Any:
    """Convert and bound one value. Raises ConfigError naming the flag."""
    return _checked("--" + name.replace("_", "-"), value, setting)


def _checked(flag: str, value: Any, setting: Setting) -> Any:
    try:
        converted = _convert(value, setting)
    except (ConfigError, ValueError, TypeError) as error:
        raise ConfigError(f"{flag}: {error}") from None
    is_number = isinstance(converted, (int, float)) and not isinstance(converted, bool)
    if is_number and not setting.low <= converted <= setting.high:
        raise ConfigError(f"{flag}: {converted} is not between {setting.low:g} and {setting.high:g}")
    return converted


def _convert(value: Any, setting: Setting) -> Any:
    match setting.kind:
        case "size":
            return parse_size(value)
        case "seconds":
            return parse_seconds(value)
        case "integer":
            if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
                raise ConfigError(f"{value!r} is not a whole number")
            return int(value)
        case "number":
            if isinstance(value, bool):
                raise ConfigError(f"{value!r} is not a number")
            return float(value)
        case "flag":
            if isinstance(value, bool):
                return value
            if str(value).lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
                return str(value).lower() in ("true", "yes", "on", "1")
            raise ConfigError(f"{value!r} is not true or false")
        case "classes":
            return _classes(value)
        case "names":
            return parse_names(value)
        case "choice":
            if value not in setting.choices:
                raise ConfigError(f"{value!r} is not one of {', '.join(setting.choices)}")
            return value
        case _:
            return parse_text(value)


_CLASS_FIELDS = {
    "ttft": Setting("", "seconds", low=1e-6, high=1e6),
    "tpot": Setting("", "seconds", low=1e-6, high=1e6),
    "priority": Setting("", "integer", low=-(2**31), high=2**31 - 1),
}


def _classes(value: Any) -> tuple[ServiceClass, ...]:
    """From a mapping by name, from JSON text of one, or from a list of what this returns (or of the same as
    mappings, as it travels between processes)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"this is not JSON: {error}") from None
    if isinstance(value, Mapping):
        rows = [(name, {} if fields is None else fields) for name, fields in value.items()]
    elif isinstance(value, (list, tuple)):
        plain = [dataclasses.asdict(row) if isinstance(row, ServiceClass) else dict(row) for row in value]
        rows = [(row.pop("name", None), row) for row in plain]
    else:
        raise ConfigError("service classes are written as name: {ttft, tpot, priority}")
    if len(rows) > MAX_CLASSES:
        raise ConfigError(f"at most {MAX_CLASSES} service classes, not {len(rows)}")
    classes = tuple(_service_class(name, fields) for name, fields in rows)
    if len({entry.name for entry in classes}) < len(classes):
        raise ConfigError("two service classes have the same name")
    priorities = [entry.priority for entry in classes if entry.priority is not None]
    if len(set(priorities)) < len(priorities):
        raise ConfigError("two service classes have the same priority")
    return classes


def _service_class(name: Any, fields: Any) -> ServiceClass:
    if not isinstance(name, str) or not _CLASS_NAME.fullmatch(name) or name in NEUTRAL_CLASSES:
        raise ConfigError(
            f"{name!r} cannot name a service class (letters, digits, _ . -; not auto, default)"
        )
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{name}: write ttft, tpot and priority, not {fields!r}")
    for field_name in fields:
        if field_name not in _CLASS_FIELDS:
            raise ConfigError(f"{name}: {field_name!r} is not one of {', '.join(_CLASS_FIELDS)}")
    given = {
        field_name: _checked(f"{name}.{field_name}", value, _CLASS_FIELDS[field_name])
        for field_name, value in fields.items()
        if value is not None
    }
    return ServiceClass(name, **given)
