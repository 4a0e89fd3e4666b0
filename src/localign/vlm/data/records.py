"""Conversations in LLaVA's format, of which a million take a few megabytes of memory.

A record is ``{"id": ..., "image": path, "conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}``;
without ``image`` it is text alone. Other keys mean nothing.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from localign.data.sources import read_image
from localign.errors import RunFailure, UserError
from localign.vlm.data.imageroots import MISSING, ImageRoots, StrPath
from localign.vlm.data.jsonrecords import Span, scan

HUMAN = frozenset({"human", "user"})
ASSISTANT = frozenset({"gpt", "assistant"})
"""The names that the two roles go by."""

_NO_IMAGE = -2


@dataclass(frozen=True)
class Record:
    """One conversation, about one image or none."""

    id: str
    image: str | None
    """Its path as the file has it, relative to a folder of images."""
    turns: tuple[tuple[str, str], ...]
    """(question, answer) pairs, at least one."""


class MalformedRecord(Exception):
    """What is wrong with a record, on one line."""


@dataclass(frozen=True)
class ParsedRecord:
    """A record and what is counted of it."""

    record: Record
    words: int
    """Separated by white space, over all turns as they are written: the published measure of length."""
    characters: int
    """Of all turns that are used."""
    unanswered: bool
    """Whether a last question without an answer was left out; nothing would have been learned from it."""


def parse_record(value: Any) -> ParsedRecord:
    """A record from its JSON object.

    Raises:
        MalformedRecord: It is not of LLaVA's format.
    """
    if not isinstance(value, dict):
        raise MalformedRecord("not a JSON object")
    name = value.get("id")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise MalformedRecord(
            "it has no id" if name is None else "its id is neither a text nor a whole number"
        )
    image = value.get("image")
    if image is not None and not (isinstance(image, str) and image.strip("/")):
        raise MalformedRecord("its image is not the path of one file")
    conversation = value.get("conversations")
    if not isinstance(conversation, list):
        raise MalformedRecord("it has no list of conversations")
    texts = [_turn(turn, number) for number, turn in enumerate(conversation)]
    if len(texts) < 2:
        raise MalformedRecord("no question of its conversation is answered")
    turns = tuple(zip(texts[0::2], texts[1::2], strict=False))
    return ParsedRecord(
        Record(str(name), image, turns),
        words=sum(len(text.split()) for text in texts),
        characters=sum(len(question) + len(answer) for question, answer in turns),
        unanswered=len(texts) % 2 == 1,
    )


def _turn(turn: Any, number: int) -> str:
    for key in ("from", "value"):
        if not isinstance(turn, dict) or key not in turn:
            raise MalformedRecord(f"turn {number + 1} of its conversation has no {key!r}")
    role, text = turn["from"], turn["value"]
    expected = ASSISTANT if number % 2 else HUMAN
    if not isinstance(role, str) or role not in expected:
        raise MalformedRecord(f"turn {number + 1} of its conversation is by {role!r}, not {_names(expected)}")
    if not isinstance(text, str):
        raise MalformedRecord(f"the value of turn {number + 1} of its conversation is not a text")
    if text.isascii():
        return text
    # JSON can hold half a surrogate pair, which no tokenizer takes.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _names(roles: frozenset[str]) -> str:
    return " or ".join(repr(role) for role in sorted(roles))


@dataclass(frozen=True)
class RecordFile:
    """A file of records and where its images lie."""

    path: Path
    roots: ImageRoots
    state: tuple[int, int]
    """Its size and time of change."""

    def name(self, number: int, record_id: object = None) -> str:
        """A record by its number and id, for messages."""
        return f"{self.path}, record {number}" + ("" if record_id is None else f" (id {record_id!r})")


class Conversations:
    """The records of one or several files, read from the files as they are asked for.

    Picklable; processes that are forked share its memory. Make it with :meth:`open`.

    Attributes:
        words: int32 ``(records,)``, words of each record as they are written.
        characters: int32 ``(records,)``, of all its questions and answers.
        turns: int32 ``(records,)``, how many questions and answers it has.
        has_image: bool ``(records,)``.
        missing: The different images that are not there; their records are left out.
        skipped: How many records that are.
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
        """Go through the files once: check every record, and look for every image (without opening it).

        Args:
            paths: JSON lists or JSON lines; one after the other they are the data.
            image_roots: See :class:`ImageRoots`; without any, paths are relative to the folder of their file.
            skip_missing: Leave out records whose image is not there.

        Raises:
            UserError: A file is not there, is not JSON or holds nothing, a record is malformed, or an image is
                missing without ``skip_missing``; the line names file, record and id.
        """
        if not paths:
            raise UserError("which conversations? name at least one LLaVA-format JSON file")
        files = open_files(paths, image_roots)
        digest = blake2b(digest_size=8)
        gathered = _Gathered(skip_missing)
        for number, file in enumerate(files):
            for parsed, span in read_records(file, digest):
                gathered.add(number, file, parsed, span)
        for file in files:
            file.roots.forget()
        if not gathered.words:
            raise UserError(_nothing(paths, gathered))
        table = gathered.table()
        digest.update(table.number.tobytes())  # records left out change the data
        return cls(files, table, digest.hexdigest())

    def __len__(self) -> int:
        return len(self.words)

    def record(self, index: int) -> Record:
        """One record, read from its file.

        Raises:
            RunFailure: The file has changed since it was opened.
        """
        file = self._files[self._file[index]]
        begin, end = int(self._begin[index]), int(self._end[index])
        try:
            with open(file.path, "rb") as handle:
                if _state(handle.fileno()) != file.state:
                    raise RunFailure(f"{file.path} was changed while it was in use")
                handle.seek(begin)
                return parse_record(json.loads(handle.read(end - begin))).record
        except FileNotFoundError:
            raise RunFailure(f"{file.path} was removed while it was in use") from None

    def name(self, index: int) -> str:
        """File, number (from 1) and id of a record, for messages."""
        return self._files[self._file[index]].name(int(self._number[index]), self.record(index).id)

    def load_image(self, index: int, image: str) -> Image.Image:
        """The image of a record, RGB, its pixels as they are stored: boxes in conversations count those.

        Args:
            index: The record.
            image: Its ``image``.

        Raises:
            UnreadableImage: It gives no image.
        """
        path = self._files[self._file[index]].roots.path(image, int(self._root[index]))
        return read_image(path, image, upright=False)

    def fingerprint(self) -> str:
        """A short hash of the files' bytes and of which records are in; not of where they lie."""
        return self._fingerprint


def open_files(paths: Sequence[StrPath], image_roots: Sequence[StrPath]) -> list[RecordFile]:
    """The files with their image roots. Raises UserError if one of either is not there."""
    shared = ImageRoots(image_roots) if image_roots else None
    files = []
    for path in map(Path, paths):
        next(
            scan(path), None
        )  # that it is there and begins as JSON does, before a long look at the first file
        files.append(RecordFile(path, shared or ImageRoots([path.parent]), _state(path)))
    return files


def read_records(
    file: RecordFile, digest: blake2b | None = None, malformed: Callable[[str], None] | None = None
) -> Iterator[tuple[ParsedRecord, Span]]:
    """The records of a file, and where they are in it.

    Args:
        file: One of :func:`open_files`.
        digest: Is updated with the file's bytes.
        malformed: Called with what is wrong with a malformed record, instead of raising.

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
    """Columns of the records, as NumPy arrays over one copy of the memory."""

    def __init__(self, gathered: _Gathered) -> None:
        self.file = np.frombuffer(gathered.file, dtype=np.int16)
        self.root = np.frombuffer(gathered.root, dtype=np.int16)
        self.number = np.frombuffer(gathered.number, dtype=np.int32)
        self.begin = np.frombuffer(gathered.begin, dtype=np.int64)
        self.end = np.frombuffer(gathered.end, dtype=np.int64)
        self.words = np.frombuffer(gathered.words, dtype=np.int32)
        self.characters = np.frombuffer(gathered.characters, dtype=np.int32)
        self.turns = np.frombuffer(gathered.turns, dtype=np.int32)
        self.missing = tuple(gathered.missing)
        self.skipped = gathered.skipped


class _Gathered:
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
            where = f"{record.image} of {file.name(span.number, record.id)}"
            self.first_missing = self.first_missing or where
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
                f"{self.first_missing}. `localign vlm check` lists all, --skip-missing leaves their records out"
            )
        return _Table(self)


def _nothing(paths: Sequence[StrPath], gathered: _Gathered) -> str:
    names = ", ".join(map(str, paths))
    if gathered.missing:
        return f"none of the {len(gathered.missing)} images of {names} is there; the first is {gathered.first_missing}"
    return f"{names}: no conversations"
