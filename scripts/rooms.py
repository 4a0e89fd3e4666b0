"""The package's import graph and the rooms of CONTRIBUTING's table, read from the files; nothing is imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"


@cache
def modules() -> Mapping[str, Path]:
    """Dotted name -> file, of every module of the package."""
    found = {}
    for path in (SOURCE / "localign").rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> Mapping[str, frozenset[str]]:
    """Module -> the package's modules that it imports anywhere, in functions and for type checkers too."""
    return {name: frozenset(_imported(path) - {name}) for name, path in modules().items()}


def _imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            portable = path.parent.name == "portable"  # transformers copies its files out of the package
            assert node.level == 0 or portable, f"{path}: imports are absolute"
            if node.level:
                found.add(f"localign.portable.{node.module}")
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in modules() else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in modules()}


@cache
def table() -> tuple[tuple[str, ...], ...]:
    """The rows of CONTRIBUTING's table from the ground floor up, each with its rooms: dotted names."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    part = text.partition("## The rooms")[2].partition("\n## ")[0]
    return tuple(
        tuple(
            "localign." + name.removesuffix("/").removesuffix(".py").replace("/", ".")
            for name in re.findall(r"`([^`]+)`", row)
        )
        for row in re.findall(r"^\| (`.+?) \|", part, re.MULTILINE)
    )


@cache
def rooms() -> tuple[str, ...]:
    """The rooms from the ground floor up."""
    return tuple(room for row in table() for room in row)


@cache
def room_of(module: str) -> str:
    """The room of a module: the one with the longest name that fits."""
    fitting = [room for room in rooms() if module == room or module.startswith(f"{room}.")]
    assert fitting, f"{module} belongs to no room of CONTRIBUTING's table"
    return max(fitting, key=len)


def floor(module: str) -> int:
    """The position of a module's room in the table."""
    return rooms().index(room_of(module))
