"""Building the published training mixtures beyond LLaVA-1.5 from the files of their data sets.

Records come in the order of the published scripts: base and additions are concatenated and shuffled three times by
Python's generator with seed 7. Records in LLaVA's format are copied byte for byte.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from localign.data.sources import UnreadableImage, read_image
from localign.errors import UserError
from localign.files import replacing
from localign.vlm.data.jsonrecords import scan
from localign.vlm.data.records import (
    MISSING,
    ImageRoots,
    LLaVARecord,
    LLaVATurn,
    StrPath,
    open_files,
    read_records,
)

PUBLISHED_RECORDS = {
    "llava_v1_5_mix665k.json": 665_298,
    "llava_v1_5_lvis4v_mix888k.json": 888_009,
    "llava_v1_5_lrv_mix1008k.json": 1_008_097,
    "llava_v1_5_lvis4v_lrv_mix1231k.json": 1_230_808,
    "llava_v1_5_stripped625k.json": 624_610,
}
"""Name of a mixture's file -> number of records."""

LRV_PHOTO_FILES = ("filter_cap1.json", "filter_cap_more1.json")
LRV_CHART_FILE = "chart_release_update.json"
LRV_PHOTOS, LRV_CHARTS = "lrv/lrv-vg", "lrv/lrv-chart"

_LRV_KEYS = ("image_id", "question", "answer")
_SEED, _SHUFFLES = 7, 3
_JPEG = (".jpg", ".jpeg")
_QUALITY = 95


class WrittenMixture(NamedTuple):
    """A mixture on disk."""

    file: Path
    records: int


class PreparedImages(NamedTuple):
    """The result of :func:`prepare_ocr_vqa`."""

    written: int
    """JPEG images written."""
    present: int
    """Images that already had a JPEG."""
    unreadable: tuple[UnreadableImage, ...]


def merge_lvis_instruct(
    base: StrPath, lvis: StrPath, images: Sequence[StrPath], out: StrPath
) -> WrittenMixture:
    """Write the mixture of LLaVA-1.5 and LVIS-Instruct-4V.

    Args:
        base: ``llava_v1_5_mix665k.json``.
        lvis: ``lvis_instruct4v_220k.json``, which is in LLaVA's format.
        images: Image roots; they must hold every image of LVIS-Instruct-4V.
        out: File to write, atomically.

    Raises:
        UserError: A file is missing or malformed, or an image is missing.
    """
    parts = (_FileRecords(base), _FileRecords(lvis, images))
    return _shuffle_and_write(Path(out), parts, random.Random(_SEED))


def merge_lrv_instruct(
    base: StrPath, lrv: StrPath, images: Sequence[StrPath], out: StrPath, *, before: StrPath | None = None
) -> WrittenMixture:
    """Write the mixture of LRV-Instruct and either LLaVA-1.5 or its mixture with LVIS-Instruct-4V.

    The published script writes both mixtures in one run without reseeding its generator, so the order of the
    second mixture depends on the number of records in the first.

    Args:
        base: The file that LRV-Instruct is added to.
        lrv: Folder with ``filter_cap1.json``, ``filter_cap_more1.json`` and ``chart_release_update.json``.
        images: Image roots; they must hold every image of LRV-Instruct, in ``lrv/lrv-vg`` and ``lrv/lrv-chart``.
        out: File to write, atomically.
        before: If ``base`` contains LVIS-Instruct-4V, the plain LLaVA-1.5 file, whose mixture was written first.

    Raises:
        UserError: A file is missing or malformed, or an image is missing.
    """
    added = _NewRecords(lrv_records(lrv))
    added.check_images(ImageRoots(images))
    generator = random.Random(_SEED)
    if before is not None:
        _shuffled(sum(1 for _ in scan(Path(before))) + len(added), generator)
    return _shuffle_and_write(Path(out), (_FileRecords(base), added), generator)


def strip_text_only(base: StrPath, out: StrPath) -> WrittenMixture:
    """Write a data set without its text-only records, in order.

    Raises:
        UserError: The file is missing or malformed, or no record has an image.
    """
    records = _FileRecords(base, with_image=True)
    if not len(records):
        raise UserError(f"no record of {base} has an image")
    return _write(Path(out), [records], range(len(records)))


def lrv_records(folder: StrPath) -> list[LLaVARecord]:
    """LRV-Instruct in LLaVA's format: two files of photographs, then charts.

    Args:
        folder: Contains ``filter_cap1.json``, ``filter_cap_more1.json`` and ``chart_release_update.json``.

    Raises:
        UserError: A file is missing, or a record lacks ``image_id``, ``question`` or ``answer``.
    """
    records = []
    for name in LRV_PHOTO_FILES:
        for image, question, answer in _lrv_questions(Path(folder) / name):
            records.append(_lrv_record(image, f"{LRV_PHOTOS}/{image}.jpg", question, answer))
    for image, question, answer in _lrv_questions(Path(folder) / LRV_CHART_FILE):
        records.append(_lrv_record(Path(image).stem, f"{LRV_CHARTS}/{image}", question, answer))
    return records


def _lrv_questions(path: Path) -> Iterable[tuple[str, str, str]]:
    for span in scan(path):
        record = span.value if isinstance(span.value, dict) else {}
        texts = [str(v) if isinstance(v := record.get(key), int) else v for key in _LRV_KEYS]
        for key, text in zip(_LRV_KEYS, texts, strict=True):
            if not isinstance(text, str):
                raise UserError(f"{path}, record {span.number}: {key!r} is missing or not a string")
        image, question, answer = map(str, texts)
        yield image, question, answer


def _lrv_record(name: str, image: str, question: str, answer: str) -> LLaVARecord:
    turns = [("human", f"<image>\n{question.strip()}"), ("gpt", answer.strip())]
    conversations: list[LLaVATurn] = [{"from": role, "value": value} for role, value in turns]
    return {"id": name, "image": image, "conversations": conversations}


class _Part(Protocol):
    """A sequence of records, each as JSON bytes."""

    def __len__(self) -> int: ...

    def raw(self, index: int) -> bytes: ...


class _FileRecords:
    """The records of a file: checked on opening, read again on access, since a million may not fit in memory."""

    def __init__(
        self, path: StrPath, images: Sequence[StrPath] | None = None, *, with_image: bool = False
    ) -> None:
        (file,) = open_files([path], images or ())
        self._begin, self._end = array("q"), array("q")
        missing: list[str] = []
        for parsed, span in read_records(file):
            image = parsed.record.image
            if with_image and image is None:
                continue
            if images is not None and image is not None and file.roots.find(image) == MISSING:
                missing.append(f"{image} of {file.name(span.number, parsed.record.id or None)}")
            self._begin.append(span.begin)
            self._end.append(span.end)
        _refuse_missing(missing, path)
        self._handle = open(file.path, "rb")  # noqa: SIM115

    def __len__(self) -> int:
        return len(self._begin)

    def raw(self, index: int) -> bytes:
        self._handle.seek(self._begin[index])
        return self._handle.read(self._end[index] - self._begin[index])


class _NewRecords:
    """Records in memory."""

    def __init__(self, records: Sequence[LLaVARecord]) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def raw(self, index: int) -> bytes:
        return json.dumps(self._records[index]).encode()

    def check_images(self, roots: ImageRoots) -> None:
        """Raise a UserError if an image is missing."""
        images = dict.fromkeys(record["image"] for record in self._records)
        _refuse_missing([image for image in images if roots.find(image) == MISSING], "LRV-Instruct")


def _refuse_missing(missing: Sequence[str], data: StrPath) -> None:
    if missing:
        raise UserError(f"{len(missing)} images of {data} are missing; the first is {missing[0]}")


def _shuffle_and_write(out: Path, parts: Sequence[_Part], generator: random.Random) -> WrittenMixture:
    return _write(out, parts, _shuffled(sum(map(len, parts)), generator))


def _shuffled(length: int, generator: random.Random) -> list[int]:
    """The published order of ``length`` records; the scripts' shuffles depend on the length alone."""
    order = list(range(length))
    for _ in range(_SHUFFLES):
        generator.shuffle(order)
    return order


def _write(out: Path, parts: Sequence[_Part], order: Sequence[int]) -> WrittenMixture:
    """Write a JSON list with one record per line; ``order`` holds indices into the concatenated parts."""
    first = len(parts[0])
    with replacing(out) as temporary, open(temporary, "wb") as file:
        for number, index in enumerate(order):
            raw = parts[0].raw(index) if index < first else parts[1].raw(index - first)
            file.write((b",\n" if number else b"[") + raw)
        file.write(b"]\n")
    return WrittenMixture(out, len(order))


def prepare_ocr_vqa(folder: StrPath) -> PreparedImages:
    """Convert OCR-VQA's GIF (first frame) and PNG images to JPEG, since its records name JPEG files.

    Args:
        folder: Image folder. The originals stay, and existing JPEG files are not overwritten.

    Raises:
        UserError: The folder does not exist, or contains a file of another type.
    """
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}")
    files = sorted(path for path in Path(folder).iterdir() if not path.name.startswith("."))
    for path in files:
        if path.suffix.lower() not in (*_JPEG, ".gif", ".png"):
            raise UserError(f"{path} is not a GIF, PNG or JPEG file")
    names = {path.name for path in files}
    written, present, unreadable = 0, 0, []
    for path in (path for path in files if path.suffix.lower() not in _JPEG):
        if f"{path.stem}.jpg" in names:
            present += 1
            continue
        try:
            image = read_image(path, str(path), upright=False)
        except UnreadableImage as error:
            unreadable.append(error)
            continue
        with replacing(path.with_suffix(".jpg")) as temporary:
            image.save(temporary, format="JPEG", quality=_QUALITY)
        names.add(f"{path.stem}.jpg")
        written += 1
    return PreparedImages(written, present, tuple(unreadable))
