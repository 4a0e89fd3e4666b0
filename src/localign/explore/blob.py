"""The arrays of a page: bytes one after the other, and where each array lies."""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

_ALIGNMENT = 8


class Place(TypedDict):
    """Where an array lies."""

    dtype: str
    """numpy's name; all bytes are little-endian."""
    shape: list[int]
    offset: int
    """Bytes from the start, a multiple of 8."""


class Blob:
    """Collects arrays."""

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Append an array under a name that is not taken yet."""
        assert name not in self.places, name
        content = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
        self.places[name] = {"dtype": array.dtype.name, "shape": list(array.shape), "offset": self._size}
        padding = -len(content) % _ALIGNMENT
        self._parts += [content, bytes(padding)]
        self._size += len(content) + padding

    def bytes(self) -> bytes:
        """All arrays."""
        return b"".join(self._parts)
