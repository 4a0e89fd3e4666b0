"""The architecture: CONTRIBUTING's map of rooms is the rule that imports keep."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
MAX_LINES, MAX_FILES = 400, 14


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
def rooms() -> tuple[str, ...]:
    """The rooms of CONTRIBUTING's table, from the ground floor up: dotted module or package names."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \|", text.partition("## The rooms")[2].partition("\n## ")[0], re.MULTILINE)
    return tuple(
        "localign." + name.removesuffix("/").removesuffix(".py").replace("/", ".")
        for row in rows
        for name in re.findall(r"`([^`]+)`", row)
    )


@cache
def floor(module: str) -> int:
    """The position of a module's room in the table; the room with the longest name that fits is the module's."""
    fitting = [room for room in rooms() if module == room or module.startswith(f"{room}.")]
    assert fitting, f"{module} belongs to no room of CONTRIBUTING's table"
    return rooms().index(max(fitting, key=len))


def test_a_room_imports_only_from_rooms_above_it_in_the_table() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if "localign" not in (module, other) and floor(other) > floor(module)
    ]
    assert sorted(wrong) == []


def test_the_table_names_rooms_that_exist() -> None:
    assert len(rooms()) > 20
    assert [room for room in rooms() if room not in modules()] == []
    assert [room for room, count in Counter(rooms()).items() if count > 1] == []


def test_a_walk_enters_no_room_twice() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    walks = text.partition("### Three walks")[2].partition("\n## ")[0].strip().split("\n\n")
    assert len(walks) == 3
    for walk in walks:
        steps = [name for name in re.findall(r"`([^`]+)`", walk) if name.endswith(".py")]
        entered = [room for room, _ in groupby(floor("localign." + s[:-3].replace("/", ".")) for s in steps)]
        assert all(f"localign.{s[:-3].replace('/', '.')}" in modules() for s in steps), walk
        assert len(steps) > 5
        assert len(entered) == len(set(entered)), walk


def _circle() -> list[str]:
    """Modules that import one another in a circle; empty without one."""
    left = {name: set(others) for name, others in imports().items() if name != "localign"}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert _circle() == []


def test_nothing_imports_the_facade() -> None:
    """`api.py` is for users; the package's own code imports what is behind it."""
    assert [
        name for name, others in imports().items() if "localign.api" in others and name != "localign"
    ] == []


@pytest.mark.parametrize("folder", ["src", "benchmarks"])
def test_files_and_folders_stay_small(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    long = {str(f.relative_to(ROOT)): n for f in files if (n := len(f.read_text().splitlines())) > MAX_LINES}
    assert long == {}
    crowded = {
        str(f): n for f, n in Counter(f.parent.relative_to(ROOT) for f in files).items() if n > MAX_FILES
    }
    assert crowded == {}


def _classes() -> Iterator[tuple[str, str]]:
    for module, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield node.name, module


def test_no_public_class_name_stands_for_two_classes() -> None:
    owners = defaultdict(list)
    for name, module in _classes():
        owners[name].append(module)
    assert {name: found for name, found in owners.items() if len(found) > 1} == {}
