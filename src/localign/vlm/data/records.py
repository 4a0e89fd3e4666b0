"""Conversations in LLaVA's format; a million records take a few megabytes of memory.

See :mod:`localign.vlm.data.dialects` for what a record may look like.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import Image

from localign.data.sources import read_image
from localign.errors import RunFailure, UserError
from localign.files import is_inside
from localign.text.printing import printable
from localign.vlm.data.dialects import MalformedRecord, ParsedRecord, Record, parse_record
from localign.vlm.data.jsonrecords import Span, scan

StrPath = str | os.PathLike[str]

MISSING = -1
"""Returned instead of a root's index for an image that no root holds."""
_NO_IMAGE = -2

LLaVATurn = TypedDict("LLaVATurn", {"from": str, "value": str})


class LLaVARecord(TypedDict):
    """A record with an image, as JSON."""

    id: str
    image: str
    conversations: list[LLaVATurn]


MAX_EXAMPLES = 10
"""Records named per finding."""


@dataclass(frozen=True)
class Finding:
    """The number of records with some property, and the names of the first of them."""

    count: int
    first: tuple[str, ...]


class FindingCounter:
    """Counts records for a :class:`Finding`."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, name: str) -> None:
        """Count a record."""
        self.count += 1
        if self.count <= MAX_EXAMPLES:
            self.first.append(name)

    def finding(self) -> Finding:
        """What was counted so far."""
        return Finding(self.count, tuple(self.first))


class ImageRoots:
    """Folders that are searched for images, in order.

    Args:
        roots: Folders that the records' paths are relative to. ``PREFIX=FOLDER`` replaces a leading PREFIX of a
            path by FOLDER: ``coco/train2017=/data/coco`` finds ``coco/train2017/7.jpg`` at ``/data/coco/7.jpg``.
        allow_outside: Accept absolute paths, and paths with ``..``, that lead to none of the folders.

    Raises:
        UserError: A folder does not exist.
    """

    def __init__(self, roots: Sequence[StrPath], allow_outside: bool = False) -> None:
        self.roots = [_root(os.fspath(root)) for root in roots]
        self.allow_outside = allow_outside
        self._listings: dict[str, frozenset[str]] = {}

    def path(self, image: str, root: int) -> Path:
        """The path of an image in the root that :meth:`find` returned."""
        return Path(self._join(image, root))

    def _join(self, image: str, root: int) -> str:  # a str, because a million Path objects are slow
        prefix, folder = self.roots[root]
        return os.path.join(folder, image.removeprefix(prefix))

    def leaves(self, image: str) -> bool:
        """Whether a path leads out of all folders although it may not."""
        roots = [n for n, (prefix, _) in enumerate(self.roots) if image.startswith(prefix)]
        return bool(roots) and not any(self._may_read(image, number) for number in roots)

    def _may_read(self, image: str, root: int) -> bool:
        rest = image.removeprefix(self.roots[root][0])
        if self.allow_outside or not (os.path.isabs(rest) or ".." in rest):
            return True
        path = os.path.join(os.getcwd(), self._join(image, root))
        return any(is_inside(path, folder) for _, folder in self.roots)

    def find(self, image: str) -> int:
        """The index of the first root that has the image, or MISSING. Lists each folder once and opens no file."""
        for number, (prefix, _) in enumerate(self.roots):
            if image.startswith(prefix) and self._may_read(image, number):
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


@dataclass(frozen=True)
class RecordFile:
    """A file of records and its image roots."""

    path: Path
    roots: ImageRoots
    state: tuple[int, int]
    """Size in bytes and modification time in nanoseconds."""

    def name(self, number: int, record_id: object = None) -> str:
        """A record's file, number and id, for messages."""
        return f"{printable(self.path)}, record {number}" + (
            "" if record_id is None else f" (id {record_id!r:.80})"
        )


class Conversations:
    """The records of one or several files, read from disk on access.

    Create it with :meth:`open`. It is picklable, and forked processes share its memory.

    Attributes:
        words: int32 ``(records,)``, words of each record in the file.
        characters: int32 ``(records,)``, characters of its questions and answers.
        turns: int32 ``(records,)``, number of its (question, answer) pairs.
        has_image: bool ``(records,)``.
        missing: Distinct missing images, whose records were dropped.
        skipped: Number of records dropped for a missing image.
        malformed: The malformed records that were dropped.
    """

    def __init__(self, files: Sequence[RecordFile], table: _Table, digest: str, malformed: Finding) -> None:
        self._files, self._fingerprint = tuple(files), digest
        self._file, self._number, self._begin, self._end = table.file, table.number, table.begin, table.end
        self._root = table.root
        self.words, self.characters, self.turns = table.words, table.characters, table.turns
        self.has_image = table.root != _NO_IMAGE
        self.missing, self.skipped = table.missing, table.skipped
        self.malformed = malformed

    @classmethod
    def open(
        cls,
        paths: Sequence[StrPath],
        image_roots: Sequence[StrPath] = (),
        *,
        skip_missing: bool = False,
        skip_malformed: bool = False,
        allow_outside: bool = False,
    ) -> Conversations:
        """Read the files once: check every record, and that its image exists.

        Args:
            paths: JSON lists or JSON-lines files, concatenated in this order.
            image_roots: See :class:`ImageRoots`; by default paths are relative to the folder of their file.
            skip_missing: Drop records whose image is missing.
            skip_malformed: Drop records that cannot be read as a conversation.
            allow_outside: See :class:`ImageRoots`.

        Raises:
            UserError: A file is missing, empty or not JSON, a record is malformed, or an image is missing and
                it may not be dropped; the line names file, record and id.
        """
        if not paths:
            raise UserError("no conversations: give at least one LLaVA-format JSON file")
        files = open_files(paths, image_roots, allow_outside)
        digest = blake2b(digest_size=8)
        builder = _TableBuilder(skip_missing)
        malformed = FindingCounter()
        for number, file in enumerate(files):
            for parsed, span in read_records(file, digest, malformed.add if skip_malformed else None):
                builder.add(number, file, parsed, span)
        for file in files:
            file.roots.forget()
        if not builder.words:
            raise UserError(_no_records(paths, builder, malformed))
        table = builder.table()
        digest.update(table.number.tobytes())  # dropping records changes the data
        return cls(files, table, digest.hexdigest(), malformed.finding())

    def __len__(self) -> int:
        return len(self.words)

    def record(self, index: int) -> Record:
        """Read one record from its file.

        Raises:
            RunFailure: The file was changed or removed since :meth:`open`.
        """
        file = self._files[self._file[index]]
        begin, end = int(self._begin[index]), int(self._end[index])
        try:
            with open(file.path, "rb") as handle:
                if _state(handle.fileno()) != file.state:
                    raise RunFailure(f"{file.path} changed while it was in use")
                handle.seek(begin)
                return parse_record(json.loads(handle.read(end - begin))).record
        except FileNotFoundError:
            raise RunFailure(f"{file.path} was removed while it was in use") from None

    def name(self, index: int) -> str:
        """A record's file, number (from 1) and id, for messages."""
        file: RecordFile = self._files[self._file[index]]
        return file.name(int(self._number[index]), self.record(index).id or None)

    def load_image(self, index: int, image: str) -> Image.Image:
        """Load a record's image as RGB, without applying its EXIF orientation: boxes refer to stored pixels.

        Args:
            index: Index of the record.
            image: The record's ``image``.

        Raises:
            UnreadableImage: The file is missing or cannot be decoded.
        """
        path = self._files[self._file[index]].roots.path(image, int(self._root[index]))
        return read_image(path, image, upright=False)

    def fingerprint(self) -> str:
        """A short hash of the files' bytes and the selection of records, independent of paths."""
        return self._fingerprint


def open_files(
    paths: Sequence[StrPath], image_roots: Sequence[StrPath], allow_outside: bool = False
) -> list[RecordFile]:
    """Pair files with their image roots. Raises UserError if a file or a root is missing."""
    shared = ImageRoots(image_roots, allow_outside) if image_roots else None
    files = []
    for path in map(Path, paths):
        next(scan(path), None)  # fail on a missing or non-JSON file before reading the files in full
        files.append(RecordFile(path, shared or ImageRoots([path.parent], allow_outside), _state(path)))
    return files


def read_records(
    file: RecordFile, digest: blake2b | None = None, malformed: Callable[[str], None] | None = None
) -> Iterator[tuple[ParsedRecord, Span]]:
    """Yield the records of a file with their byte ranges.

    Args:
        file: A file from :func:`open_files`.
        digest: Updated with the file's bytes.
        malformed: Called with an error line for each malformed record, instead of raising.

    Raises:
        UserError: The file is not JSON, or a record is malformed.
    """
    for span in scan(file.path, digest):
        try:
            parsed = parse_record(span.value)
            _check_inside(parsed.record.image, file.roots)
            yield parsed, span
        except MalformedRecord as error:
            name = span.value.get("id") if isinstance(span.value, dict) else None
            line = f"{file.name(span.number, name)}: {error}"
            if malformed is None:
                raise UserError(line) from None
            malformed(line)


def _check_inside(image: str | None, roots: ImageRoots) -> None:
    if image is not None and roots.leaves(image):
        raise MalformedRecord(
            f"its image {printable(image)} is outside the image folders; give its folder with --images, or "
            "--allow-outside"
        )


def _state(path: StrPath | int) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


class _Table:
    """The columns of a :class:`_TableBuilder` as NumPy arrays that share its memory."""

    def __init__(self, builder: _TableBuilder) -> None:
        self.file = np.frombuffer(builder.file, dtype=np.int16)
        self.root = np.frombuffer(builder.root, dtype=np.int16)
        self.number = np.frombuffer(builder.number, dtype=np.int32)
        self.begin = np.frombuffer(builder.begin, dtype=np.int64)
        self.end = np.frombuffer(builder.end, dtype=np.int64)
        self.words = np.frombuffer(builder.words, dtype=np.int32)
        self.characters = np.frombuffer(builder.characters, dtype=np.int32)
        self.turns = np.frombuffer(builder.turns, dtype=np.int32)
        self.missing = tuple(builder.missing)
        self.skipped = builder.skipped


class _TableBuilder:
    def __init__(self, skip_missing: bool) -> None:
        self.skip_missing = skip_missing
        self.file, self.root = array("h"), array("h")
        self.number, self.words, self.characters, self.turns = (array("i") for _ in range(4))
        self.begin, self.end = array("q"), array("q")
        self.missing: dict[str, None] = {}
        self.skipped = 0
        self.first_missing = ""

    def add(self, file_number: int, file: RecordFile, parsed: ParsedRecord, span: Span) -> None:
        record = parsed.record
        root = _NO_IMAGE if record.image is None else file.roots.find(record.image)
        if record.image is not None and root == MISSING:
            self.first_missing = (
                self.first_missing
                or f"{printable(record.image)} of {file.name(span.number, record.id or None)}"
            )
            self.missing[record.image] = None
            self.skipped += 1
            return
        self.file.append(file_number)
        self.root.append(root)
        self.number.append(span.number)
        self.begin.append(span.begin)
        self.end.append(span.end)
        self.words.append(parsed.words)
        self.characters.append(parsed.characters)
        self.turns.append(len(record.turns))

    def table(self) -> _Table:
        if self.missing and not self.skip_missing:
            raise UserError(
                f"{len(self.missing)} images of {self.skipped} records are missing; the first is "
                f"{self.first_missing}. `localign vlm check` lists them all; --skip-missing drops their records"
            )
        return _Table(self)


def _no_records(paths: Sequence[StrPath], builder: _TableBuilder, malformed: FindingCounter) -> str:
    names = ", ".join(map(printable, paths))
    if builder.missing:
        return (
            f"all {len(builder.missing)} images of {names} are missing; the first is {builder.first_missing}"
        )
    if malformed.count:
        return f"all {malformed.count} records of {names} are malformed; the first is {malformed.first[0]}"
    return f"{names}: no conversations"
