"""semipd: an LLM serving engine that runs prefill and decode at the same time on shares of one device."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semipd.llm import LLM
    from semipd.serve.params import SamplingParams

__all__ = ["LLM", "SamplingParams"]

_HOMES = {"LLM": "semipd.llm", "SamplingParams": "semipd.serve.params"}


def __getattr__(name: str) -> Any:
    """Public names on first use: the planner's core and the simulator are importable without the rest."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
