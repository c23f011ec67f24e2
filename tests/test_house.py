"""What keeps the house in shape, as CONTRIBUTING.md and docs/architecture.md state it."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "semipd").rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 400, 50

# What a room, or a file beside the rooms, may import of ours; nothing else, so imports point one way.
MAY_IMPORT = {
    "core": set(),
    "trace": {"core"},
    "lifetime": set(),
    "logs": set(),
    "units": {"core"},
    "setting": {"core", "units"},
    "config": {"core", "setting"},
    "flags": {"config", "core", "setting"},
    "foreign_flags": set(),
    "box": set(),
    "model": {"core"},
    "execute": {"core", "lifetime", "logs", "model"},
    "sizing": {"config", "core", "execute", "model"},
    "start": {"build", "config", "core", "execute", "lifetime", "serve"},
    "build": {"config", "core", "execute", "model", "sizing"},
    "serve": {"build", "config", "core", "flags", "lifetime", "logs", "model", "setting", "trace", "units"},
    "bench": {"build", "config", "core", "execute", "flags", "model", "trace", "units"},
    "chat": {"core", "flags", "units"},
    "llm": {"build", "config", "core", "serve"},
    "__init__": {"llm", "serve"},
    "cli": {
        "",
        "bench",
        "chat",
        "config",
        "core",
        "foreign_flags",
        "llm",
        "logs",
        "serve",
        "setting",
        "start",
    },
}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "semipd").with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module}
            if node.module == "semipd":
                found |= {f"semipd.{alias.name}" for alias in node.names if alias.name[0].islower()}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "semipd")))
def test_a_file_answers_one_question_and_imports_one_way(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert kernel or lines <= FUNCTION_LINES, f"{node.name} has {lines} lines"
    ours = {name.partition(".")[2].partition(".")[0] for name in imports_of(path) if name[:6] == "semipd"}
    room = room_of(path)
    assert ours - {room} <= MAY_IMPORT[room]


def test_the_brain_needs_the_standard_library_alone() -> None:
    for path in FILES:
        if room_of(path) == "core":
            others = {name.partition(".")[0] for name in imports_of(path)} - {"semipd"}
            assert others <= sys.stdlib_module_names, path
            assert not others & {"asyncio", "time", "threading"}, path


def test_the_walk_of_a_request_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {room for room in MAY_IMPORT if (ROOT / "semipd" / room).is_dir()}
    named = {name for name in re.findall(r"`([a-z_]+/[a-z_/]+\.py)`", text) if name.split("/")[0] in rooms}
    assert len(named) > 15
    assert [name for name in sorted(named) if not (ROOT / "semipd" / name).is_file()] == []
