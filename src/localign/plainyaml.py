"""YAML that somebody else may have written: plain values, of a bounded size."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

MOST_CHARACTERS = 2**20
"""Of a file; the longest recipe has some thousand."""
MOST_VALUES = 100_000
"""When every alias is written out: a few lines of aliases of aliases stand for more than any memory holds."""
MOST_OPEN_BRACKETS = 200
"""The parser calls itself for each."""

_FLOAT, _TIMESTAMP = "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"


class _OptionsLoader(yaml.SafeLoader):
    """Takes 1e-3 for a number, as YAML 1.2 does and the command line; dates stay text."""


_OptionsLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in (_FLOAT, _TIMESTAMP)]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_OptionsLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def load_options(text: str) -> Any:
    """The plain values of a file of options, in which ``1e-3`` is a number.

    Args:
        text: YAML.

    Raises:
        ValueError: As of :func:`load_yaml`.
    """
    return load_yaml(text, lambda text: yaml.load(text, _OptionsLoader))


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
