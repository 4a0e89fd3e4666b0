"""Sources of image files: a folder, or a list of paths."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from localign.data.decoding import read_bytes
from localign.data.sources.base import SUFFIXES, EncodedSource, Names
from localign.data.sources.lists import read_list
from localign.data.untrusted.walking import Found, skipped_line, walk
from localign.errors import UserError, did_you_mean
from localign.files import is_inside
from localign.text.printing import printable


class _FileSource(EncodedSource):
    """Image files named by their paths below a root folder."""

    kind = "files"

    def __init__(self, root: Path, names: Iterable[str], image_size: tuple[int, int] | None) -> None:
        super().__init__(image_size)
        self.root = root
        self._names = Names.of(names)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The path relative to the root, with forward slashes."""
        return self._names[index]

    def path(self, index: int) -> Path:
        """The image's path."""
        return self.root / self._names[index]

    def data_files(self) -> Iterator[tuple[str, str]]:
        return ((name, os.path.join(self.root, name)) for name in self._names)

    def encoded(self, index: int) -> bytes:
        return read_bytes(self.path(index), self.name(index))

    def _digest(self, digest: hashlib.blake2b) -> None:
        self._names.update(digest)


class FolderSource(_FileSource):
    """Every image below a folder, at any depth, sorted by name.

    Sub-folders have no meaning. Names that begin with a dot are skipped. Links to folders are followed, except
    links that lead back into the folder. Pipes, sockets and devices are skipped.

    Args:
        folder: The folder.
        image_size: (rows, columns) to which images will be resized; large JPEGs are then decoded at reduced size
            (see ``read_image``). None decodes in full, which crops that magnify need.

    Attributes:
        skipped: (name, reason) of what has an image's name or a folder's place and is neither.

    Raises:
        UserError: The folder does not exist or holds no images.
    """

    kind = "folder"

    def __init__(self, folder: str | os.PathLike[str], image_size: tuple[int, int] | None = None) -> None:
        root = Path(folder)
        _check_folder(root)
        found = walk(root, SUFFIXES)
        if not found.names:
            raise UserError(_no_images_error(root, found))
        super().__init__(root, sorted(found.names), image_size)
        self.skipped = tuple(sorted(found.skipped))

    @property
    def notice(self) -> str | None:
        """What was skipped because it is no file."""
        return skipped_line(list(self.skipped))


def _check_folder(root: Path) -> None:
    if root.is_dir():
        return
    if root.exists():
        raise UserError(f"{root} is a file, not a folder of images")
    raise UserError(f"there is no folder {root}{_sibling_hint(root)}")


def _sibling_hint(path: Path) -> str:
    try:
        return did_you_mean(path.name, os.listdir(path.parent))
    except OSError:
        return ""


def _no_images_error(root: Path, found: Found) -> str:
    if found.skipped:
        return f"no images in the folder {printable(root)}: {skipped_line(found.skipped)}"
    if not found.other:
        return f"the folder {printable(root)} is empty"
    kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in found.other.most_common(4))
    return f"no images in the folder {printable(root)}: found {found.other.total()} other files ({printable(kinds)})"


class FileListSource(_FileSource):
    """The images that a list names, relative to the list's folder.

    Each line of a .txt file is a path. A .csv or .tsv file has the paths in its first column, or in the column that its
    heading names. Each line of a .jsonl file is an object with ``path`` and an optional ``label``. Blank lines and
    lines that begin with ``#`` are skipped; order and repetitions are kept. See :mod:`localign.data.sources.lists`.

    Args:
        file: The list.
        image_size: As for ``FolderSource``.
        allow_outside: Accept paths, absolute or with ``..``, that lead out of the list's folder.

    Attributes:
        file: The list.
        missing: Listed paths that do not exist. They count as unreadable from the start.

    Raises:
        UserError: The list is missing, empty or not UTF-8 text, its first row names no file and is no
            heading, none of its files exists, or paths lead out of its folder without ``allow_outside``.
    """

    kind = "list"

    def __init__(
        self,
        file: str | os.PathLike[str],
        image_size: tuple[int, int] | None = None,
        allow_outside: bool = False,
    ) -> None:
        self.file = path = Path(file)
        names = read_list(path, path.parent).names
        if not names:
            raise UserError(f"the list {printable(path)} names no images")
        if not allow_outside:
            _check_inside(path, names)
        super().__init__(path.parent, names, image_size)
        self.missing = _missing(path.parent, names)
        self.unreadable = tuple((name, "no such file") for name in self.missing)
        if len(self.missing) == len(set(names)):
            first = printable(repr(names[0]))
            raise UserError(
                f"none of the {len(names)} files in {printable(path)} exists; the first is {first}"
            )


def _check_inside(file: Path, names: list[str]) -> None:
    """Raises UserError if a list names files outside its folder. Each folder is looked at once."""
    folders = {os.path.split(name)[0]: name for name in reversed(names)}
    outside = [name for folder, name in folders.items() if not is_inside(folder, str(file.parent))]
    if outside:
        raise UserError(
            f"the list {printable(file)} names images outside its folder, such as {printable(repr(outside[-1]))}; "
            "--allow-outside accepts them"
        )


def _missing(root: Path, names: list[str]) -> tuple[str, ...]:
    """The names without a file. Each folder is listed once, since a call per file is slow for a million files."""
    listings: dict[str, frozenset[str]] = {}
    missing: dict[str, None] = {}
    for name in names:
        folder, base = os.path.split(name)
        if folder not in listings:
            try:
                listings[folder] = frozenset(os.listdir(root / folder))
            except (OSError, ValueError):
                listings[folder] = frozenset()
        if base not in listings[folder]:
            missing[name] = None
    return tuple(missing)
