"""Finding the images that conversations name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from localign.errors import UserError

StrPath = str | os.PathLike[str]

MISSING = -1
"""Returned instead of a root's index for an image that no root holds."""


class ImageRoots:
    """Folders that are searched for images, in order.

    Args:
        roots: Folders that the records' paths are relative to. ``PREFIX=FOLDER`` replaces a leading PREFIX of a
            path by FOLDER: ``coco/train2017=/data/coco`` finds ``coco/train2017/7.jpg`` at ``/data/coco/7.jpg``.

    Raises:
        UserError: A folder does not exist.
    """

    def __init__(self, roots: Sequence[StrPath]) -> None:
        self.roots = [_root(os.fspath(root)) for root in roots]
        self._listings: dict[str, frozenset[str]] = {}

    def path(self, image: str, root: int) -> Path:
        """The path of an image in the root that :meth:`find` returned."""
        return Path(self._join(image, root))

    def _join(self, image: str, root: int) -> str:  # a str, because a million Path objects are slow
        prefix, folder = self.roots[root]
        return os.path.join(folder, image.removeprefix(prefix))

    def find(self, image: str) -> int:
        """The index of the first root that has the image, or MISSING. Lists each folder once and opens no file."""
        for number, (prefix, _) in enumerate(self.roots):
            if image.startswith(prefix):
                folder, name = os.path.split(self._join(image, number))
                if folder not in self._listings:
                    self._listings[folder] = _listing(folder)
                if name in self._listings[folder]:
                    return number
        return MISSING

    def forget(self) -> None:
        """Free the cached folder listings."""
        self._listings.clear()


def _root(root: str) -> tuple[str, str]:
    prefix, equals, folder = root.partition("=")
    if not equals or os.path.isdir(root):
        prefix, folder = "", root
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder of images {folder}")
    return prefix.rstrip("/") + "/" if prefix else "", folder


def _listing(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except (OSError, ValueError):
        return frozenset()
