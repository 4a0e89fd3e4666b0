"""The architecture: CONTRIBUTING's map of rooms is the rule that imports keep."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import groupby

import pytest
from rooms import ROOT, floor, imports, modules, rooms

MAX_LINES, MAX_FILES = 400, 14


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
