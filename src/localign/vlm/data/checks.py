"""Checking conversations before a run: `localign vlm check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localign.files import replace_text
from localign.vlm.data.dialects import ParsedRecord
from localign.vlm.data.examples import ConversationTokenizer, NothingToLearn
from localign.vlm.data.records import (
    MAX_EXAMPLES,
    MISSING,
    Finding,
    FindingCounter,
    RecordFile,
    StrPath,
    open_files,
    read_records,
)

BIN_EDGES = (0, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384)


@dataclass(frozen=True)
class LengthBin:
    """Number of records with ``at_least`` tokens but fewer than the next bin."""

    at_least: int
    records: int


@dataclass(frozen=True)
class CheckResult:
    """The result of :func:`check`."""

    records: int
    """Well-formed records, including records with a missing image."""
    turns: int
    """Answered questions."""
    images: int
    """Distinct images that the records name."""
    text_only: int
    """Records without an image."""
    malformed: Finding
    """Records that cannot be read, with the reason. Training refuses to start with any."""
    missing: tuple[str, ...]
    """Distinct missing images."""
    missing_records: int
    """Records whose image is missing."""
    empty_answers: Finding
    """Records with an answer of only white space, which is learned as a single space."""
    unanswered: Finding
    """Records whose last question has no answer and is dropped."""
    repeated_ids: Finding
    """Ids of more than one record, which is normal in merged data sets."""
    unused_keys: dict[str, int]
    """Keys of records that have no meaning here, with the number of records that have them."""
    lengths: tuple[LengthBin, ...] | None
    """Tokens per record, image tokens included, before truncation; None without an encoder."""
    over_long: Finding
    """Records that are truncated at the limit; none without an encoder."""
    nothing_to_learn: Finding
    """Records that are truncated before their first answer, which training replaces by others."""

    @property
    def ready(self) -> bool:
        """Whether training would start without dropping records."""
        return self.records > 0 and not self.malformed.count and not self.missing


def check(
    paths: Sequence[StrPath],
    image_roots: Sequence[StrPath] = (),
    *,
    allow_outside: bool = False,
    encoder: ConversationTokenizer | None = None,
    missing_list: StrPath | None = None,
) -> CheckResult:
    """Check all records of a data set.

    Args:
        paths, image_roots, allow_outside: As for :meth:`localign.vlm.data.records.Conversations.open`.
        encoder: Count tokens too, which takes longer than all other checks.
        missing_list: File for the paths of missing images, one per line; written only if there are any.

    Raises:
        UserError: A file is missing or not JSON.
    """
    counts = _Counts(encoder)
    for file in open_files(paths, image_roots, allow_outside):
        for parsed, span in read_records(file, malformed=counts.malformed.add):
            counts.add(file, parsed, span.number)
    if missing_list is not None and counts.missing:
        replace_text(Path(missing_list), "".join(f"{image}\n" for image in counts.missing))
    return counts.result()


class _Counts:
    def __init__(self, encoder: ConversationTokenizer | None) -> None:
        self.encoder = encoder
        self.records = self.turns = self.text_only = self.missing_records = 0
        self.images: set[str] = set()
        self.missing: dict[str, None] = {}
        self.ids: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()
        self.malformed, self.empty_answers, self.unanswered = (FindingCounter() for _ in range(3))
        self.over_long, self.nothing_to_learn = FindingCounter(), FindingCounter()
        self.lengths: list[int] = []

    def add(self, file: RecordFile, parsed: ParsedRecord, number: int) -> None:
        record = parsed.record
        name = file.name(number, record.id or None)
        self.records += 1
        self.turns += len(record.turns)
        self.unused.update(parsed.unused)
        if record.id:
            self.ids[record.id] += 1
        if any(not answer.strip() for _, answer in record.turns):
            self.empty_answers.add(name)
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
            self.nothing_to_learn.add(name)

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
            empty_answers=self.empty_answers.finding(),
            unanswered=self.unanswered.finding(),
            repeated_ids=Finding(len(repeated), tuple(repeated[:MAX_EXAMPLES])),
            unused_keys=dict(self.unused.most_common()),
            lengths=_histogram(self.lengths) if self.encoder is not None else None,
            over_long=self.over_long.finding(),
            nothing_to_learn=self.nothing_to_learn.finding(),
        )


def _histogram(lengths: Sequence[int]) -> tuple[LengthBin, ...]:
    counts, _ = np.histogram(lengths, bins=[*BIN_EDGES, np.inf])
    last = max((i for i, count in enumerate(counts) if count), default=-1)
    return tuple(
        LengthBin(edge, int(count)) for edge, count in zip(BIN_EDGES, counts[: last + 1], strict=False)
    )
