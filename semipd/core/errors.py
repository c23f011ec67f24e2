"""Refusals. Whatever cannot be served gets one of these, by name, and harms nothing else."""

from __future__ import annotations


class SemipdError(Exception):
    """Base of every error that a user of this package may want to catch."""


class Refused(SemipdError, ValueError):
    """A request that can never be served as it stands. `param` names the offending field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Overloaded(SemipdError):
    """The queue is full; the same request may succeed later."""


class ConfigError(SemipdError, ValueError):
    """A setting or a model folder that cannot work. Shown as one line, exit code 2."""


class EngineDead(SemipdError):
    """The engine cannot run anything any more."""
