"""Where the images of conversations lie."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from localign.errors import UserError

StrPath = str | os.PathLike[str]

MISSING = -1
"""In place of the root of an image that is in none."""


class ImageRoots:
    """The folders that images are looked for in, in turn.

    Args:
        roots: Each a folder that the records' paths are relative to, or ``PREFIX=FOLDER``: where what begins
            with PREFIX lies. ``coco/train2017=/data/coco`` finds ``coco/train2017/7.jpg`` as ``/data/coco/7.jpg``.

    Raises:
        UserError: There is no such folder.
    """

    def __init__(self, roots: Sequence[StrPath]) -> None:
        self.roots = [_root(os.fspath(root)) for root in roots]
        self._listings: dict[str, frozenset[str]] = {}

    def path(self, image: str, root: int) -> Path:
        """Where an image lies in the given root, which its path fits."""
        return Path(self._joined(image, root))

    def _joined(self, image: str, root: int) -> str:  # text: a million paths as objects take long
        prefix, folder = self.roots[root]
        return os.path.join(folder, image.removeprefix(prefix))

    def find(self, image: str) -> int:
        """The first root that has the image, or MISSING. Folders are listed once, and files not opened."""
        for number, (prefix, _) in enumerate(self.roots):
            if image.startswith(prefix):
                folder, name = os.path.split(self._joined(image, number))
                if folder not in self._listings:
                    self._listings[folder] = _listing(folder)
                if name in self._listings[folder]:
                    return number
        return MISSING

    def forget(self) -> None:
        """Free the listings of the folders."""
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
