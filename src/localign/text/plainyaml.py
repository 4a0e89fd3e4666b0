"""Reads untrusted YAML: only plain values, of limited size."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

MAX_CHARACTERS = 2**20
"""Per file. The longest recipe has a few thousand."""
MAX_VALUES = 100_000
"""With all aliases expanded. A few lines of nested aliases can expand to more values than fit in memory."""
MAX_OPEN_BRACKETS = 200
"""The parser recurses for each open bracket."""

_FLOAT, _TIMESTAMP = "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"


class _OptionsLoader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 and the command line do, and dates as text."""


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
    """Parse the YAML of an options file, in which ``1e-3`` is a number.

    Args:
        text: YAML.

    Raises:
        ValueError: As for :func:`load_yaml`.
    """
    return load_yaml(text, lambda text: yaml.load(text, _OptionsLoader))


def load_yaml(text: str, loader: Callable[[str], Any] = yaml.safe_load) -> Any:
    """Parse YAML into plain values.

    Args:
        text: YAML.
        loader: Parses the text. It must not construct objects other than plain values.

    Raises:
        ValueError: The text is not YAML, is too long, is nested too deeply, or names other objects. The message has one
            line.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read")
    if _deepest(text) > MAX_OPEN_BRACKETS:
        raise ValueError(f"more than {MAX_OPEN_BRACKETS} brackets are open at once")
    try:
        content = loader(text)
        _count(content, 0)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # loaders have their own error classes
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from error
    return content


def _deepest(text: str) -> int:
    """An upper bound of the number of brackets open at once. Brackets in strings count too."""
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
    if so_far > MAX_VALUES:
        raise ValueError(f"it holds more than {MAX_VALUES:,} values")
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    for part in inner if isinstance(inner, list | tuple | set) else ():
        so_far = _count(part, so_far)
    return so_far
