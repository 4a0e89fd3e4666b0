"""Shared by the fuzz tests: number of examples, valid reactions of readers, and strategies for values."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from localign.errors import UserError

T = TypeVar("T")

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
"""Examples per test. `make test-slow` sets more, and then they differ each time."""

bounded = settings(
    max_examples=EXAMPLES,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "a", "0"])
)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)


def result_or_refusal(call: Callable[[], T]) -> T | None:
    """The result of a reader; None if it refuses its input with one line. Any other error is a defect."""
    try:
        return call()
    except UserError as error:
        line = str(error)
    assert line.strip(), "an empty line"
    assert "\n" not in line
    return None


def corrupted(content: bytes) -> st.SearchStrategy[bytes]:
    """A damaged file: bytes are overwritten, cut off, inserted or removed."""

    def spoil(edits: list[tuple[str, int, bytes]]) -> bytes:
        spoilt = bytearray(content)
        for kind, place, new in edits:
            at = place % (len(spoilt) + 1)
            if kind == "overwrite":
                spoilt[at : at + len(new)] = new
            elif kind == "insert":
                spoilt[at:at] = new
            elif kind == "remove":
                del spoilt[at : at + len(new)]
            else:
                del spoilt[at:]
        return bytes(spoilt)

    kinds = st.sampled_from(["overwrite", "overwrite", "insert", "remove", "cut"])
    places = st.integers(0, len(content)) | st.integers(0, 200)
    edits = st.tuples(kinds, places, st.binary(min_size=1, max_size=8))
    return st.lists(edits, min_size=1, max_size=3).map(spoil)


def finite(value: Any) -> bool:
    """Whether a number is neither NaN nor infinite."""
    return bool(value == value and abs(value) != float("inf"))
