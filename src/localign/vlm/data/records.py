"""Conversations in LLaVA's format; a million records take a few megabytes of memory.

A record is ``{"id": ..., "image": path, "conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}``;
text-only records have no ``image``. Other keys are ignored.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from PIL import Image

from localign.data.sources import read_image
from localign.errors import RunFailure, UserError
from localign.vlm.data.imageroots import MISSING, ImageRoots, StrPath
from localign.vlm.data.jsonrecords import Span, scan

HUMAN = frozenset({"human", "user"})
ASSISTANT = frozenset({"gpt", "assistant"})
"""Names of the two roles."""

_NO_IMAGE = -2

LLaVATurn = TypedDict("LLaVATurn", {"from": str, "value": str})


class LLaVARecord(TypedDict):
    """A record with an image, as JSON."""

    id: str
    image: str
    conversations: list[LLaVATurn]


@dataclass(frozen=True)
class Record:
    """One conversation, about one image or none."""

    id: str
    image: str | None
    """Path as written in the file, relative to an image root."""
    turns: tuple[tuple[str, str], ...]
    """(question, answer) pairs, at least one."""


class MalformedRecord(Exception):
    """A record is not in LLaVA's format; the message gives the reason on one line."""


@dataclass(frozen=True)
class ParsedRecord:
    """A record and its size."""

    record: Record
    words: int
    """Words, separated by white space, of all turns in the file: the published measure of length."""
    characters: int
    """Characters of all (question, answer) pairs."""
    unanswered: bool
    """Whether the last question had no answer and was dropped."""


def parse_record(value: Any) -> ParsedRecord:
    """Parse a record's JSON object.

    Raises:
        MalformedRecord: The object is not in LLaVA's format.
    """
    if not isinstance(value, dict):
        raise MalformedRecord("not a JSON object")
    name = value.get("id")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise MalformedRecord("it has no id" if name is None else "its id is neither a string nor an integer")
    image = value.get("image")
    if image is not None and not (isinstance(image, str) and image.strip("/")):
        raise MalformedRecord("its image is not the path of one file")
    conversation = value.get("conversations")
    if not isinstance(conversation, list):
        raise MalformedRecord("it has no list of conversations")
    texts = [_turn_text(turn, number) for number, turn in enumerate(conversation)]
    if len(texts) < 2:
        raise MalformedRecord("its conversation has no answered question")
    turns = tuple(zip(texts[0::2], texts[1::2], strict=False))
    return ParsedRecord(
        Record(str(name), image, turns),
        words=sum(len(text.split()) for text in texts),
        characters=sum(len(question) + len(answer) for question, answer in turns),
        unanswered=len(texts) % 2 == 1,
    )


def _turn_text(turn: Any, number: int) -> str:
    for key in ("from", "value"):
        if not isinstance(turn, dict) or key not in turn:
            raise MalformedRecord(f"turn {number + 1} of its conversation has no {key!r}")
    role, text = turn["from"], turn["value"]
    expected = ASSISTANT if number % 2 else HUMAN
    if not isinstance(role, str) or role not in expected:
        raise MalformedRecord(f"turn {number + 1} of its conversation is by {role!r}, not {_names(expected)}")
    if not isinstance(text, str):
        raise MalformedRecord(f"the value of turn {number + 1} of its conversation is not a string")
    if text.isascii():
        return text
    # JSON can contain half a surrogate pair, which tokenizers refuse.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _names(roles: frozenset[str]) -> str:
    return " or ".join(repr(role) for role in sorted(roles))


@dataclass(frozen=True)
class RecordFile:
    """A file of records and its image roots."""

    path: Path
    roots: ImageRoots
    state: tuple[int, int]
    """Size in bytes and modification time in nanoseconds."""

    def name(self, number: int, record_id: object = None) -> str:
        """A record's file, number and id, for messages."""
        return f"{self.path}, record {number}" + ("" if record_id is None else f" (id {record_id!r})")


class Conversations:
    """The records of one or several files, read from disk on access.

    Create it with :meth:`open`. It is picklable, and forked processes share its memory.

    Attributes:
        words: int32 ``(records,)``, words of each record in the file.
        characters: int32 ``(records,)``, characters of its questions and answers.
        turns: int32 ``(records,)``, number of its (question, answer) pairs.
        has_image: bool ``(records,)``.
        missing: Distinct missing images, whose records were dropped.
        skipped: Number of dropped records.
    """

    def __init__(self, files: Sequence[RecordFile], table: _Table, digest: str) -> None:
        self._files, self._fingerprint = tuple(files), digest
        self._file, self._number, self._begin, self._end = table.file, table.number, table.begin, table.end
        self._root = table.root
        self.words, self.characters, self.turns = table.words, table.characters, table.turns
        self.has_image = table.root != _NO_IMAGE
        self.missing, self.skipped = table.missing, table.skipped

    @classmethod
    def open(
        cls, paths: Sequence[StrPath], image_roots: Sequence[StrPath] = (), skip_missing: bool = False
    ) -> Conversations:
        """Read the files once: check every record, and that its image exists.

        Args:
            paths: JSON lists or JSON-lines files, concatenated in this order.
            image_roots: See :class:`ImageRoots`; by default paths are relative to the folder of their file.
            skip_missing: Drop records whose image is missing.

        Raises:
            UserError: A file is missing, empty or not JSON, a record is malformed, or an image is missing and
                ``skip_missing`` is False; the line names file, record and id.
        """
        if not paths:
            raise UserError("no conversations: give at least one LLaVA-format JSON file")
        files = open_files(paths, image_roots)
        digest = blake2b(digest_size=8)
        builder = _TableBuilder(skip_missing)
        for number, file in enumerate(files):
            for parsed, span in read_records(file, digest):
                builder.add(number, file, parsed, span)
        for file in files:
            file.roots.forget()
        if not builder.words:
            raise UserError(_no_records(paths, builder))
        table = builder.table()
        digest.update(table.number.tobytes())  # dropping records changes the data
        return cls(files, table, digest.hexdigest())

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
        return file.name(int(self._number[index]), self.record(index).id)

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


def open_files(paths: Sequence[StrPath], image_roots: Sequence[StrPath]) -> list[RecordFile]:
    """Pair files with their image roots. Raises UserError if a file or a root is missing."""
    shared = ImageRoots(image_roots) if image_roots else None
    files = []
    for path in map(Path, paths):
        next(scan(path), None)  # fail on a missing or non-JSON file before reading the files in full
        files.append(RecordFile(path, shared or ImageRoots([path.parent]), _state(path)))
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
            yield parse_record(span.value), span
        except MalformedRecord as error:
            name = span.value.get("id") if isinstance(span.value, dict) else None
            line = f"{file.name(span.number, name)}: {error}"
            if malformed is None:
                raise UserError(line) from None
            malformed(line)


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
                self.first_missing or f"{record.image} of {file.name(span.number, record.id)}"
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


def _no_records(paths: Sequence[StrPath], builder: _TableBuilder) -> str:
    names = ", ".join(map(str, paths))
    if builder.missing:
        return (
            f"all {len(builder.missing)} images of {names} are missing; the first is {builder.first_missing}"
        )
    return f"{names}: no conversations"
