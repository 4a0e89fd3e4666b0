"""YAML that somebody else may have written: plain values, of a bounded size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

MOST_CHARACTERS = 2**20
"""Of a file; the longest recipe has some thousand."""
MOST_VALUES = 100_000
"""When every alias is written out: a few lines of aliases of aliases stand for more than any memory holds."""
MOST_OPEN_BRACKETS = 200
"""The parser calls itself for each."""


def load_yaml(text: str, loader: Callable[[str], Any] = yaml.safe_load) -> Any:
    """The plain values that a text holds.

    Args:
        text: YAML.
        loader: Makes values of it and constructs no other objects.

    Raises:
        ValueError: It is no YAML, too long, nested too deeply, or names other objects; one line says why.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters; at most {MOST_CHARACTERS:,} are read")
    if _deepest(text) > MOST_OPEN_BRACKETS:
        raise ValueError(f"more than {MOST_OPEN_BRACKETS} brackets are open at once")
    try:
        content = loader(text)
        _count(content, 0)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # the loader's own errors, whichever it uses
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from error
    return content


def _deepest(text: str) -> int:
    """An upper bound of how many brackets are open at once; those in strings count too."""
    depth = deepest = 0
    for character in text:
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth = max(0, depth - 1)
    return deepest


def _count(value: Any, so_far: int) -> int:
    so_far += 1
    if so_far > MOST_VALUES:
        raise ValueError(f"it holds more than {MOST_VALUES:,} values")
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    for part in inner if isinstance(inner, list | tuple | set) else ():
        so_far = _count(part, so_far)
    return so_far
