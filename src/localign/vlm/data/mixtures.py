"""The training mixtures beyond LLaVA-1.5, made from the files that their data sets are published as.

The order of a mixture is that of the published scripts: base and additions one after the other, shuffled three
times by Python's generator seeded with 7. Records of LLaVA's format are copied byte for byte.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from localign.data.sources import UnreadableImage, read_image
from localign.errors import UserError
from localign.files import replacing
from localign.vlm.data.imageroots import MISSING, ImageRoots, StrPath
from localign.vlm.data.jsonrecords import scan
from localign.vlm.data.records import open_files, read_records

PUBLISHED_RECORDS = {
    "llava_v1_5_mix665k.json": 665_298,
    "llava_v1_5_lvis4v_mix888k.json": 888_009,
    "llava_v1_5_lrv_mix1008k.json": 1_008_097,
    "llava_v1_5_lvis4v_lrv_mix1231k.json": 1_230_808,
    "llava_v1_5_stripped625k.json": 624_610,
}
"""Records of the mixtures, by the names of their files."""

LRV_PHOTO_FILES = ("filter_cap1.json", "filter_cap_more1.json")
LRV_CHART_FILE = "chart_release_update.json"
LRV_PHOTOS, LRV_CHARTS = "lrv/lrv-vg", "lrv/lrv-chart"

_LRV_KEYS = ("image_id", "question", "answer")
_SEED, _SHUFFLES = 7, 3
_JPEG = (".jpg", ".jpeg")
_QUALITY = 95


class WrittenMixture(NamedTuple):
    """A data set that was written."""

    file: Path
    records: int


class PreparedImages(NamedTuple):
    """What :func:`prepare_ocr_vqa` did."""

    written: int
    present: int
    """Images whose JPEG was there before."""
    unreadable: tuple[UnreadableImage, ...]


def merge_lvis_instruct(
    base: StrPath, lvis: StrPath, images: Sequence[StrPath], out: StrPath
) -> WrittenMixture:
    """LLaVA-1.5 with LVIS-Instruct-4V.

    Args:
        base: ``llava_v1_5_mix665k.json``.
        lvis: ``lvis_instruct4v_220k.json``, of LLaVA's format already.
        images: Image roots; every image of LVIS-Instruct-4V must be there.
        out: File to write; an interrupted call leaves none.

    Raises:
        UserError: A file is not there or malformed, or an image is missing.
    """
    parts = (_FileRecords(base), _FileRecords(lvis, images))
    return _shuffle_and_write(Path(out), parts, random.Random(_SEED))


def merge_lrv_instruct(
    base: StrPath, lrv: StrPath, images: Sequence[StrPath], out: StrPath, *, before: StrPath | None = None
) -> WrittenMixture:
    """LLaVA-1.5, or its mixture with LVIS-Instruct-4V, with LRV-Instruct.

    The published script makes both mixtures in one go, and the second is shuffled with the generator as the first
    left it. So the order of the second depends on how many records the first had.

    Args:
        base: What LRV-Instruct is added to.
        lrv: Folder with ``filter_cap1.json``, ``filter_cap_more1.json`` and ``chart_release_update.json``.
        images: Image roots; every image of LRV-Instruct must be there, in ``lrv/lrv-vg`` and ``lrv/lrv-chart``.
        out: File to write; an interrupted call leaves none.
        before: Where ``base`` holds LVIS-Instruct-4V: LLaVA-1.5 by itself, whose mixture came before.

    Raises:
        UserError: A file is not there or malformed, or an image is missing.
    """
    added = _NewRecords(lrv_records(lrv))
    added.check_images(ImageRoots(images))
    generator = random.Random(_SEED)
    if before is not None:
        _shuffled(sum(1 for _ in scan(Path(before))) + len(added), generator)
    return _shuffle_and_write(Path(out), (_FileRecords(base), added), generator)


def strip_text_only(base: StrPath, out: StrPath) -> WrittenMixture:
    """A data set without its records that have no image, in order.

    Raises:
        UserError: The file is not there or malformed, or no record has an image.
    """
    records = _FileRecords(base, with_image=True)
    if not len(records):
        raise UserError(f"no record of {base} has an image")
    return _write(Path(out), [records], range(len(records)))


def lrv_records(folder: StrPath) -> list[dict[str, Any]]:
    """LRV-Instruct in LLaVA's format: photographs, more photographs, charts.

    Args:
        folder: Holds ``filter_cap1.json``, ``filter_cap_more1.json`` and ``chart_release_update.json``.

    Raises:
        UserError: A file is not there, or a record lacks ``image_id``, ``question`` or ``answer``.
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
                raise UserError(f"{path}, record {span.number}: it has no text {key!r}")
        image, question, answer = map(str, texts)
        yield image, question, answer


def _lrv_record(name: str, image: str, question: str, answer: str) -> dict[str, Any]:
    turns = [("human", f"<image>\n{question.strip()}"), ("gpt", answer.strip())]
    conversations = [{"from": role, "value": value} for role, value in turns]
    return {"id": name, "image": image, "conversations": conversations}


class _Part(Protocol):
    """Records as the bytes of their JSON."""

    def __len__(self) -> int: ...

    def raw(self, index: int) -> bytes: ...


class _FileRecords:
    """Checked records of a file, read again as they are written: a million would not fit in every memory."""

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
                missing.append(f"{image} of {file.name(span.number, parsed.record.id)}")
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
    """Records that no file has yet."""

    def __init__(self, records: Sequence[dict[str, Any]]) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def raw(self, index: int) -> bytes:
        return json.dumps(self._records[index]).encode()

    def check_images(self, roots: ImageRoots) -> None:
        """Raises UserError if one is missing."""
        images = dict.fromkeys(record["image"] for record in self._records)
        _refuse_missing([image for image in images if roots.find(image) == MISSING], "LRV-Instruct")


def _refuse_missing(missing: Sequence[str], data: StrPath) -> None:
    if missing:
        raise UserError(f"{len(missing)} images of {data} are missing; the first is {missing[0]}")


def _shuffle_and_write(out: Path, parts: Sequence[_Part], generator: random.Random) -> WrittenMixture:
    return _write(out, parts, _shuffled(sum(map(len, parts)), generator))


def _shuffled(length: int, generator: random.Random) -> list[int]:
    """How the published scripts order ``length`` records; their shuffles depend on the length alone."""
    order = list(range(length))
    for _ in range(_SHUFFLES):
        generator.shuffle(order)
    return order


def _write(out: Path, parts: Sequence[_Part], order: Sequence[int]) -> WrittenMixture:
    """The records of all parts, counted through, in the given order, as a JSON list of one record a line."""
    first = len(parts[0])
    with replacing(out) as temporary, open(temporary, "wb") as file:
        for place, index in enumerate(order):
            raw = parts[0].raw(index) if index < first else parts[1].raw(index - first)
            file.write((b",\n" if place else b"[") + raw)
        file.write(b"]\n")
    return WrittenMixture(out, len(order))


def prepare_ocr_vqa(folder: StrPath) -> PreparedImages:
    """Save every GIF (its first frame) and PNG of OCR-VQA's images as a JPEG too, as the records name them.

    Args:
        folder: The images. A JPEG that is there is left as it is.

    Raises:
        UserError: There is no such folder, or an image of another kind in it.
    """
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}")
    files = sorted(path for path in Path(folder).iterdir() if not path.name.startswith("."))
    for path in files:
        if path.suffix.lower() not in (*_JPEG, ".gif", ".png"):
            raise UserError(f"{path} is no GIF, PNG or JPEG")
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
