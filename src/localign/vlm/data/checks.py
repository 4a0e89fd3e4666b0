"""What is wrong with conversations, found before a run: `localign vlm check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localign.files import replace_text
from localign.vlm.data.examples import ConversationTokenizer, NothingToLearn
from localign.vlm.data.imageroots import MISSING, StrPath
from localign.vlm.data.records import ParsedRecord, RecordFile, open_files, read_records

SHOWN = 10
"""Examples that are kept of each finding."""

BIN_EDGES = (0, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384)


@dataclass(frozen=True)
class Finding:
    """How many records something is true of, and the first of them by name."""

    count: int
    first: tuple[str, ...]


@dataclass(frozen=True)
class LengthBin:
    """Records of ``at_least`` tokens, and fewer than the next bin's."""

    at_least: int
    records: int


@dataclass(frozen=True)
class CheckResult:
    """What :func:`check` found."""

    records: int
    """Well-formed ones, those whose image is missing included."""
    turns: int
    """Questions with their answers."""
    images: int
    """Different images that the records name."""
    text_only: int
    """Records without an image."""
    malformed: Finding
    """Records that cannot be read, each with what is wrong. Training refuses to start with one."""
    missing: tuple[str, ...]
    """The different images that are not there."""
    missing_records: int
    """Records that name one of them."""
    empty_answers: Finding
    """Records with an answer of nothing but white space, which is learned as a single space."""
    unanswered: Finding
    """Records whose last question has no answer and is left out."""
    repeated_ids: Finding
    """Ids that several records have, which is usual where data sets were merged."""
    lengths: tuple[LengthBin, ...] | None
    """Tokens of the records with their images', before they are cut; None without an encoder."""
    over_long: Finding
    """Records that are cut at the limit; none without an encoder."""
    nothing_to_learn: Finding
    """Those of them that are cut before their first answer: training replaces them by others."""

    @property
    def ready(self) -> bool:
        """Whether training would start without leaving out records."""
        return self.records > 0 and not self.malformed.count and not self.missing


def check(
    paths: Sequence[StrPath],
    image_roots: Sequence[StrPath] = (),
    *,
    encoder: ConversationTokenizer | None = None,
    missing_list: StrPath | None = None,
) -> CheckResult:
    """Go through all records of a data set.

    Args:
        paths: JSON lists or JSON lines, as :meth:`localign.vlm.data.records.Conversations.open` takes them.
        image_roots: Likewise.
        encoder: Also count tokens, which takes longer than the rest.
        missing_list: Gets the missing images, one a line, if there are any.

    Raises:
        UserError: A file is not there or is not JSON.
    """
    counts = _Counts(encoder)
    for file in open_files(paths, image_roots):
        for parsed, span in read_records(file, malformed=counts.malformed.add):
            counts.add(file, parsed, span.number)
    if missing_list is not None and counts.missing:
        replace_text(Path(missing_list), "".join(f"{image}\n" for image in counts.missing))
    return counts.result()


class _Found:
    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, name: str) -> None:
        self.count += 1
        if self.count <= SHOWN:
            self.first.append(name)

    def finding(self) -> Finding:
        return Finding(self.count, tuple(self.first))


class _Counts:
    def __init__(self, encoder: ConversationTokenizer | None) -> None:
        self.encoder = encoder
        self.records = self.turns = self.text_only = self.missing_records = 0
        self.images: set[str] = set()
        self.missing: dict[str, None] = {}
        self.ids: Counter[str] = Counter()
        self.malformed, self.empty, self.unanswered = _Found(), _Found(), _Found()
        self.over_long, self.nothing = _Found(), _Found()
        self.lengths: list[int] = []

    def add(self, file: RecordFile, parsed: ParsedRecord, number: int) -> None:
        record = parsed.record
        name = file.name(number, record.id)
        self.records += 1
        self.turns += len(record.turns)
        self.ids[record.id] += 1
        if any(not answer.strip() for _, answer in record.turns):
            self.empty.add(name)
        if parsed.unanswered:
            self.unanswered.add(name)
        if record.image is None:
            self.text_only += 1
        else:
            self.images.add(record.image)
            if file.roots.find(record.image) == MISSING:
                self.missing[record.image] = None
                self.missing_records += 1
        if self.encoder is not None:
            self._add_length(self.encoder, parsed, name)

    def _add_length(self, encoder: ConversationTokenizer, parsed: ParsedRecord, name: str) -> None:
        length = encoder.length(parsed.record)
        self.lengths.append(length)
        if length <= encoder.limit(parsed.record.image is not None):
            return
        self.over_long.add(name)
        try:
            encoder(parsed.record)
        except NothingToLearn:
            self.nothing.add(name)

    def result(self) -> CheckResult:
        repeated = [name for name, count in self.ids.items() if count > 1]
        return CheckResult(
            records=self.records,
            turns=self.turns,
            images=len(self.images),
            text_only=self.text_only,
            malformed=self.malformed.finding(),
            missing=tuple(self.missing),
            missing_records=self.missing_records,
            empty_answers=self.empty.finding(),
            unanswered=self.unanswered.finding(),
            repeated_ids=Finding(len(repeated), tuple(repeated[:SHOWN])),
            lengths=_histogram(self.lengths) if self.encoder is not None else None,
            over_long=self.over_long.finding(),
            nothing_to_learn=self.nothing.finding(),
        )


def _histogram(lengths: Sequence[int]) -> tuple[LengthBin, ...]:
    counts, _ = np.histogram(lengths, bins=[*BIN_EDGES, np.inf])
    last = max((i for i, count in enumerate(counts) if count), default=-1)
    return tuple(
        LengthBin(edge, int(count)) for edge, count in zip(BIN_EDGES, counts[: last + 1], strict=False)
    )
