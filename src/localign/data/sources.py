"""Where images come from: a folder, a list of files, the embedded scenes.

A source is random access and is sent to loader workers, so it holds its names in one block of bytes: a few
hundred megabytes for thirteen million files, which forked workers share; Python strings they would copy.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import os
import struct
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageFile

from localign.errors import UserError, near

SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
"""File name endings taken for images, in any case."""

MAX_PIXELS = 2**27
"""An image that claims more pixels than this is refused before it is decoded (a decompression bomb)."""

DECODE_HEADROOM = 1.2
"""Scaled decoding keeps each side at least this many times the wanted one: the published crop enlarges by up
to 1 / sqrt(0.8 * 0.9) = 1.18."""

_LIST_SUFFIXES = (".txt", ".csv")
_LIST_HEADERS = frozenset({"path", "file", "filename", "file_name", "image", "name"})
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The machine's shortage, not the file's fault: passing over the image would quietly change the data.
_MACHINE_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class UnreadableImage(Exception):
    """One file that gives no image: its ``name`` in the source, and the ``reason`` on one line."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that it survives pickling between processes
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@runtime_checkable
class ImageSource(Protocol):
    """Random access to named images. Instances are picklable: they go to loader workers."""

    kind: str

    def __len__(self) -> int:
        """How many images there are, readable or not."""

    def name(self, index: int) -> str:
        """A stable name for logs, such as ``n01440764/x.jpg``."""

    def load(self, index: int) -> Image.Image:
        """The image in RGB. Raises UnreadableImage."""

    def fingerprint(self) -> str:
        """A short hash of what the source holds; a run is not continued on another."""


def read_image(
    path: str | os.PathLike[str], name: str, at_least: int | None = None, *, upright: bool = True
) -> Image.Image:
    """Decode one file to an RGB image.

    Args:
        path: The file.
        name: How the image is called in ``UnreadableImage``.
        at_least: Pixels; a JPEG at least twice this on both sides is decoded at 1/2, 1/4 or 1/8, both sides
            staying at or above it. None decodes in full.
        upright: Turn the image as its EXIF orientation says; False gives the pixels as they are stored.

    Raises:
        UnreadableImage: The file is missing, empty, truncated, corrupt, no image, or larger than MAX_PIXELS.
    """
    try:
        # Warnings about odd metadata, and Pillow's about size: the size is judged here instead.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return _decode(image, name, at_least, upright)
    except UnreadableImage:
        raise
    except Exception as error:  # decoders raise SyntaxError, struct.error, IndexError, ... on corrupt files
        if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
            raise
        raise UnreadableImage(name, _reason(error, path)) from None


def _decode(image: Image.Image, name: str, at_least: int | None, upright: bool) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(name, f"{width} x {height} pixels; at most {MAX_PIXELS} are decoded")
    if at_least is not None:
        image.draft(None, (at_least, at_least))  # only JPEG can; other formats ignore it
    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # whatever another library set: a half-grey image is not data
    try:
        image.load()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant
    # Only now: to read a PNG's metadata is to load it, and a failure there would leave a blank image.
    turn = _UPRIGHT.get(_orientation(image)) if upright else None
    rgb = to_rgb(image, name)
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # broken metadata does not make the pixels unreadable
        return 1


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """RGB from any mode: transparency over white, 16 bits by their upper eight."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()  # the file's own object closes with the file
    if image.mode == "F":
        raise UnreadableImage(name, "floating-point pixels have no known range")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        wide = image.mode != "I" or values.max() > 255
        levels = values.clip(0, 65535) >> 8 if wide else values.clip(0)
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image.convert("RGB")


def _reason(error: Exception, path: str | os.PathLike[str]) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "empty file" if os.path.getsize(path) == 0 else "not an image of a known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS} pixels"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(text.replace(str(path), "").split())
    plain = isinstance(error, OSError) and text
    return text if plain else f"{type(error).__name__}: {text}".rstrip(": ")


class _Names:
    """A read-only sequence of file names in one block of bytes."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        begin = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[begin : self._ends[index]].tobytes())

    def update(self, digest: hashlib.blake2b) -> None:
        digest.update(struct.pack("<q", len(self)))
        digest.update(self._ends.astype("<i8").tobytes())
        digest.update(self._bytes.tobytes())


class _FileSource:
    """Images named by paths below a root."""

    kind = "files"

    def __init__(self, root: Path, names: Iterable[str], image_size: tuple[int, int] | None) -> None:
        self.root = root
        self._names = _Names(names)
        # The larger side for both, for a file may lie on its side until its EXIF orientation is applied.
        self._at_least = int(np.ceil(DECODE_HEADROOM * max(image_size))) if image_size else None
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The path relative to the root, with forward slashes."""
        return self._names[index]

    def path(self, index: int) -> Path:
        """Where the image lies."""
        return self.root / self._names[index]

    def load(self, index: int) -> Image.Image:
        """The image in RGB, upright. Raises UnreadableImage."""
        return read_image(self.path(index), self.name(index), self._at_least)

    def fingerprint(self) -> str:
        """Of the kind, the names in order and the scale of decoding; not of where the root lies."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(f"{self.kind}|{self._at_least}".encode(), digest_size=8)
            self._names.update(digest)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


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
        return near(path.name, os.listdir(path.parent))
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
    """The images a list names: one path per line (.txt) or in the first column (.csv), relative to the list.

    Blank lines, lines that begin with ``#`` and a .csv heading are passed over; order and repetitions stay.

    Args:
        file: The list.
        image_size: As for ``FolderSource``.

    Attributes:
        file: The list.
        missing: The listed paths that do not exist; they count as unreadable.

    Raises:
        UserError: The list is missing, empty or no text, or none of its files exists.
    """

    kind = "list"

    def __init__(self, file: str | os.PathLike[str], image_size: tuple[int, int] | None = None) -> None:
        self.file = path = Path(file)
        names = [row[0] for n, row in enumerate(list_rows(path)) if n or not is_heading(path, row)]
        if not names:
            raise UserError(f"the list {path} names no images")
        super().__init__(path.parent, names, image_size)
        self.missing = _missing(path.parent, names)
        if len(self.missing) == len(set(names)):
            raise UserError(f"none of the {len(names)} files in {path} exists; the first is {names[0]!r}")


def list_rows(path: Path) -> Iterator[list[str]]:
    """The stripped cells of each row that is neither blank nor a comment; a line of a .txt is one cell.

    Raises:
        UserError: The list is missing or no text.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}{_near_siblings(path)}")
    table = path.suffix.lower() == ".csv"
    try:
        with open(path, encoding="utf-8-sig", newline="" if table else None) as handle:
            for row in csv.reader(handle) if table else ([line] for line in handle):
                cells = [cell.strip() for cell in row]
                if cells and cells[0] and not cells[0].startswith("#"):
                    yield cells
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"{path} is not a UTF-8 list of image paths, one per line") from None
    except OSError as error:
        raise UserError(f"cannot read the list {path}: {error.strerror}") from None


def is_heading(path: Path, first_row: list[str]) -> bool:
    """Whether the first row of a list names columns, which only a .csv's can."""
    return path.suffix.lower() == ".csv" and first_row[0].lower() in _LIST_HEADERS


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


def open_source(
    spec: str, *, image_size: tuple[int, int] | None = None, scaled_decode: bool = True
) -> ImageSource:
    """The source a run's config names.

    Args:
        spec: A folder; a list of files (.txt or .csv); or ``scenes`` or ``scenes:<split>``.
        image_size: (rows, columns) the images will be brought to; scenes are drawn in that size.
        scaled_decode: Decode large JPEGs at a fraction where ``image_size`` allows it. Crops that magnify a
            small part (random resized crop) want False.

    Raises:
        UserError: The source does not exist or holds no images.
    """
    head, colon, split = spec.partition(":")
    if head == "scenes":
        return _open_scenes(split if colon else "train", image_size)
    decode_size = image_size if scaled_decode else None
    path = Path(spec).expanduser()
    if path.suffix.lower() in _LIST_SUFFIXES and not path.is_dir():
        return FileListSource(path, decode_size)
    return FolderSource(path, decode_size)


def _open_scenes(split: str, image_size: tuple[int, int] | None) -> ImageSource:
    from localign.data.scenes import SceneConfig, SceneSource

    if image_size is None:
        return SceneSource(split=split)
    if image_size[0] != image_size[1]:
        raise UserError(f"scenes are square; the image size asked for is {image_size[0]} x {image_size[1]}")
    return SceneSource(SceneConfig(image_size=image_size[0]), split=split)
