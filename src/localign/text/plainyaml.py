"""Reads untrusted YAML: only plain values, of limited size."""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_CHARACTERS = 2**20
"""Per file. The longest recipe has a few thousand."""
MAX_VALUES = 100_000
"""With all aliases expanded. A few lines of nested aliases can expand to more values than fit in memory."""
MAX_BITS = 1024
"""Per integer. Python cannot print one of 15,000 bits."""
MAX_OPEN_BRACKETS = 200
"""The parser recurses for each open bracket."""

_FLOAT, _TIMESTAMP = "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"


class _PlainLoader(yaml.SafeLoader):
    """Reads null, booleans, numbers, text, lists and mappings. Dates are text.

    Other types, and keys that occur twice, are errors.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                problem = f"the key {key.value!r:.60} occurs twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _without(*tags: str) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """The rules that give text without quotes a type, less those for some types."""
    return {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag not in tags]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_PlainLoader.yaml_implicit_resolvers = _without(_TIMESTAMP)
_PlainLoader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
}


class _OptionsLoader(_PlainLoader):
    """Reads 1e-3 as a number, as YAML 1.2 and the command line do."""


_OptionsLoader.yaml_implicit_resolvers = _without(_FLOAT, _TIMESTAMP)
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
    return _load(text, _OptionsLoader)


def load_yaml(text: str) -> Any:
    """Parse YAML into plain values.

    Args:
        text: YAML.

    Raises:
        ValueError: The text is not YAML, is too long, is nested too deeply, repeats a key, or names other objects. The
            message has one line.
    """
    return _load(text, _PlainLoader)


def _load(text: str, loader: type[_PlainLoader]) -> Any:
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read")
    if _deepest(text) > MAX_OPEN_BRACKETS:
        raise ValueError(f"more than {MAX_OPEN_BRACKETS} brackets are open at once")
    try:
        content = yaml.load(text, loader)
        _count(content, 0)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ValueError(f"{' '.join((error.problem or '').split())}{line}") from error
    except Exception as error:  # a YAML reader raises nearly anything
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
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError(f"it holds a number of {value.bit_length():,} bits; at most {MAX_BITS:,} are read")
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    for part in inner if isinstance(inner, list | tuple | set) else ():
        so_far = _count(part, so_far)
    return so_far
