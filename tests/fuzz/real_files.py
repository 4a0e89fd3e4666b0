"""Structured damage to real files: their values are exchanged, removed, repeated, nested or blown up."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"

LARGE = 100_000
"""Characters of a large value."""

ODD: list[Any] = [
    *(
        None,
        True,
        0,
        -1,
        1e308,
        float("nan"),
        float("inf"),
        10**400,
        "",
        " ",
        "\0",
        "/",
        "..",
        "\ud800",
        "=1",
    ),
    *([], {}, [[]], {"": ""}, "x" * LARGE, ["x"] * 1000, "<image>" * 1000, "../" * 1000, "\x1b[2J\n"),
]


def deep(levels: int = 150) -> Any:
    """Lists in lists."""
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values inside a value."""
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    else:
        return [path] if path else []
    return ([path] if path else []) + [place for key, part in inner for place in places(part, (*path, key))]


def mutated(value: Any, draw: random.Random, count: int = 2) -> Any:
    """A copy with some of its values replaced, removed, renamed, repeated or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, count)):
        found = places(value)
        if not found:
            return value
        *way, key = draw.choice(found)
        inner = value
        for step in way:
            inner = inner[step]
        draw.choice(_CHANGES)(inner, key, draw)
    return value


def _replace(inner: Any, key: Any, draw: random.Random) -> None:
    inner[key] = copy.deepcopy(draw.choice([*ODD, deep()]))  # later changes must not reach ODD


def _remove(inner: Any, key: Any, draw: random.Random) -> None:
    del inner[key]


def _rename(inner: Any, key: Any, draw: random.Random) -> None:
    if isinstance(inner, dict):
        new = draw.choice(["images", "video", "messages", "system", "role", "Image", "", key + " "])
        inner[new] = inner.pop(key)


def _wrap(inner: Any, key: Any, draw: random.Random) -> None:
    inner[key] = draw.choice([[inner[key]], {"value": inner[key]}, [inner[key]] * 3, json.dumps(inner[key])])


def _exchange(inner: Any, key: Any, draw: random.Random) -> None:
    other = draw.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
    inner[key], inner[other] = inner[other], inner[key]


_CHANGES: list[Callable[[Any, Any, random.Random], None]] = [
    _replace,
    _replace,
    _remove,
    _rename,
    _wrap,
    _exchange,
]


def damaged_text(text: str, draw: random.Random) -> bytes:
    """A text whose bytes are overwritten, cut off, inserted or repeated."""
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(content) + 1)
        kind = draw.randrange(5)
        if kind == 0:
            content[at : at + 4] = draw.randbytes(4)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            content[at:at] = (
                draw.choice([b"[", b"{", b'"', b"\\", b"\0", b"\xef\xbb\xbf", b"- ", b"&a "]) * LARGE
            )
        elif kind == 3:
            content[at:at] = content[: draw.randrange(2000)]
        else:
            del content[at : at + draw.randrange(50)]
    return bytes(content)
