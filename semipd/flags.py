"""Settings of commands that only talk to a server: a frozen dataclass whose fields carry `setting.Setting`.

From such a class follow the command's flags, the checks of its values and its errors, as for the engine's
own settings.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from semipd.config import unknown_setting
from semipd.setting import Setting, check

Options = TypeVar("Options")


def setting(default: Any, help: str, kind: str = "text", *, group: str = "", **rest: Any) -> Any:
    """A field's default, help and bounds; None as a value always means "not given".

    group: the heading of its flag in the command's help."""
    return dataclasses.field(
        default=default, metadata={"setting": Setting(help, kind, **rest), "group": group}
    )


def check_fields(options: Any) -> None:
    """Convert and bound every field; for `__post_init__`. Raises ConfigError naming the flag."""
    for entry in dataclasses.fields(options):
        value = getattr(options, entry.name)
        if value is not None:
            converted = check(entry.name, value, entry.metadata["setting"])
            object.__setattr__(options, entry.name, converted)


def from_values(kind: type[Options], values: Mapping[str, Any]) -> Options:
    """Build `kind` from flat names ("input-length" or "input_length"). None means the default.

    Raises ConfigError for an unknown name (suggesting the nearest) or a value out of bounds."""
    known = [entry.name for entry in dataclasses.fields(kind)]  # type: ignore[arg-type]
    given = {str(key).replace("-", "_"): value for key, value in values.items()}
    for name in given:
        if name not in known:
            raise unknown_setting(name, known)
    return kind(**{name: value for name, value in given.items() if value is not None})


def add_flags(parser: argparse._ActionsContainer, kind: type) -> None:
    """One flag per field, under the heading of its group; values stay text, and a flag that is not given is
    None."""
    groups: dict[str, argparse._ActionsContainer] = {"": parser}
    for entry in dataclasses.fields(kind):
        setting: Setting = entry.metadata["setting"]
        heading = entry.metadata.get("group", "")
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        place = groups[heading]
        flag = "--" + entry.name.replace("_", "-")
        if setting.kind == "flag":
            action = argparse.BooleanOptionalAction if entry.default else "store_true"
            place.add_argument(flag, action=action, default=None, help=setting.help)
            continue
        shown = "" if entry.default is None else f" (default {entry.default})"
        place.add_argument(
            flag,
            choices=setting.choices or None,
            metavar=setting.metavar or (None if setting.choices else entry.name.rpartition("_")[2].upper()),
            help=(setting.help + shown).replace("%", "%%"),
        )


def from_flags(kind: type[Options], namespace: argparse.Namespace) -> Options:
    """What `add_flags` parsed, checked. Raises ConfigError."""
    names = [entry.name for entry in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return from_values(kind, {name: getattr(namespace, name, None) for name in names})
