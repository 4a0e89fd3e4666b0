"""Images that are files: of a folder, or of a list."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from localign.data.decoding import read_bytes
from localign.data.sources.base import SUFFIXES, EncodedSource, Names
from localign.errors import UserError, did_you_mean

LIST_SUFFIXES = (".txt", ".csv", ".jsonl")
PATH_HEADERS = frozenset({"path", "file", "filename", "file_name", "image", "name"})
LABEL_HEADERS = frozenset({"label", "class"})


class _FileSource(EncodedSource):
    """Images named by paths below a root."""

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
        """Where the image lies."""
        return self.root / self._names[index]

    def encoded(self, index: int) -> bytes:
        return read_bytes(self.path(index), self.name(index))

    def _digest(self, digest: hashlib.blake2b) -> None:
        self._names.update(digest)


class FolderSource(_FileSource):
    """Every image below a folder, at any depth, in the order of their names.

    Class folders need not be there and mean nothing. Names that begin with a dot are passed over; links to
    folders are followed, but never round in a circle.

    Args:
        folder: The folder.
        image_size: (rows, columns) the images will be brought to; large JPEGs are then decoded at a fraction
            (see ``read_image``). None decodes in full, as crops that magnify want it.

    Raises:
        UserError: There is no such folder, or no image in it.
    """

    kind = "folder"

    def __init__(self, folder: str | os.PathLike[str], image_size: tuple[int, int] | None = None) -> None:
        root = Path(folder)
        _check_folder(root)
        other: Counter[str] = Counter()
        names = sorted(_walk(root, other))
        if not names:
            raise UserError(_nothing_found(root, other))
        super().__init__(root, names, image_size)


def _check_folder(root: Path) -> None:
    if root.is_dir():
        return
    if root.exists():
        raise UserError(f"{root} is a file, not a folder of images")
    raise UserError(f"there is no folder {root}{_near_siblings(root)}")


def _near_siblings(path: Path) -> str:
    try:
        return did_you_mean(path.name, os.listdir(path.parent))
    except OSError:
        return ""


def _walk(root: Path, other: Counter[str]) -> Iterator[str]:
    """Relative names of the images below ``root``; ``other`` counts the suffixes of what is no image."""
    stack: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]
    while stack:
        prefix, links = stack.pop()
        try:
            with os.scandir(root / prefix) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        chain = _followed(entry, links) if entry.is_symlink() else links
                        if chain:
                            stack.append((f"{prefix}{entry.name}/", chain))
                    elif (suffix := os.path.splitext(entry.name)[1].lower()) in SUFFIXES:
                        yield prefix + entry.name
                    else:
                        other[suffix] += 1
        except OSError as error:
            raise UserError(f"cannot list the folder {root / prefix}: {error.strerror}") from None


def _followed(entry: os.DirEntry[str], links: tuple[str, ...]) -> tuple[str, ...]:
    """The chain of followed folders with this link's, or () where the link leads back."""
    real = os.path.realpath(entry.path)
    here = os.path.realpath(os.path.dirname(entry.path))
    leads_back = real in links or here == real or here.startswith(real.rstrip(os.sep) + os.sep)
    return () if leads_back else (*links, real)


def _nothing_found(root: Path, other: Counter[str]) -> str:
    if not other:
        return f"the folder {root} is empty: no images to read"
    kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in other.most_common(4))
    return f"no images in the folder {root}: found {other.total()} other files ({kinds})"


class FileListSource(_FileSource):
    """The images a list names, relative to the list.

    Of a .txt each line is a path; of a .csv the first column, under a heading or none; of a .jsonl each line is an
    object with ``path`` and perhaps ``label``. Blank lines and lines that begin with ``#`` are passed over; order
    and repetitions stay.

    Args:
        file: The list.
        image_size: As for ``FolderSource``.

    Attributes:
        file: The list.
        missing: The listed paths that do not exist.
        unreadable: (name, reason) of these: they count as unreadable from the start.

    Raises:
        UserError: The list is missing, empty or no text, or none of its files exists.
    """

    kind = "list"

    def __init__(self, file: str | os.PathLike[str], image_size: tuple[int, int] | None = None) -> None:
        self.file = path = Path(file)
        names = listed_names(path)
        if not names:
            raise UserError(f"the list {path} names no images")
        super().__init__(path.parent, names, image_size)
        self.missing = _missing(path.parent, names)
        self.unreadable = tuple((name, "no such file") for name in self.missing)
        if len(self.missing) == len(set(names)):
            raise UserError(f"none of the {len(names)} files in {path} exists; the first is {names[0]!r}")


def listed_names(path: Path) -> list[str]:
    """What a list names, in its order. Raises UserError as :func:`list_rows`."""
    return [row[0] for n, row in enumerate(list_rows(path)) if n or not is_heading(path, row)]


def list_rows(path: Path) -> Iterator[list[str]]:
    """The stripped cells of each row that is neither blank nor a comment.

    A line of a .txt is one cell; one of a .jsonl gives its path and, where it has one, its label.

    Raises:
        UserError: The list is missing or no text, or a line of a .jsonl is no object with a path.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}{_near_siblings(path)}")
    kind = path.suffix.lower()
    try:
        with open(path, encoding="utf-8-sig", newline="" if kind == ".csv" else None) as handle:
            for number, row in enumerate(
                csv.reader(handle) if kind == ".csv" else ([line] for line in handle)
            ):
                cells = [cell.strip() for cell in row]
                if cells and cells[0] and not cells[0].startswith("#"):
                    yield _of_object(cells[0], f"{path}, line {number + 1},") if kind == ".jsonl" else cells
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"{path} is not a UTF-8 list of image paths, one per line") from None
    except OSError as error:
        raise UserError(f"cannot read the list {path}: {error.strerror}") from None


def _of_object(line: str, where: str) -> list[str]:
    """Path and label of one line of a .jsonl."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{where} is no JSON object")
    path = next((content[key] for key in content if key.lower() in PATH_HEADERS), None)
    if not isinstance(path, str) or not path:
        raise UserError(f'{where} names no image: its objects look like {{"path": "x.jpg", "label": "cat"}}')
    label = next((content[key] for key in content if key.lower() in LABEL_HEADERS), None)
    return [path] if label is None else [path, str(label)]


def is_heading(path: Path, first_row: list[str]) -> bool:
    """Whether the first row of a list names columns, which only a .csv's can."""
    return path.suffix.lower() == ".csv" and first_row[0].lower() in PATH_HEADERS


def _missing(root: Path, names: list[str]) -> tuple[str, ...]:
    """The names without a file, by listing each folder once: a call per file is slow for a million."""
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
