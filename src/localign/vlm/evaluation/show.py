"""`localign vlm show`: questions and answers as pictures, to look at."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from localign.errors import UserError
from localign.files import replacing
from localign.options.vlm.evaluation import ShowConfig
from localign.vlm.benchmarks.table import benchmark_class
from localign.vlm.data.images import open_image
from localign.vlm.evaluation.results import ANSWERS_FILE, Record, read_answers
from localign.vlm.scoring.boxes import ORIGINAL, Box, Size

TRUE, ANSWERED = (20, 140, 60), (200, 30, 40)
_INK = (20, 20, 20)
_SIDE = 640
"""Pixels of the longer side of a picture."""
_LETTERS, _MARGIN = 16, 12
_LINES = 20
"""Lines of one text, at most."""


def run_show(config: ShowConfig) -> None:
    """Draw the chosen answers, in the order of the file.

    Raises:
        UserError: There are no such answers, or an image cannot be read.
    """
    path = Path(config.answers)
    records = read_answers(path / ANSWERS_FILE if path.is_dir() else path)
    for name in config.benchmarks:
        benchmark_class(name)
        if name not in records:
            raise UserError(f"{path} holds no answers to {name}; it holds {', '.join(records)}")
    chosen = [
        record
        for name, own in records.items()
        if name in (config.benchmarks or records)
        for record in own
        if not (config.wrong and record["score"] >= 1)
    ][: config.limit]
    if not chosen:
        raise UserError(f"{path} holds no {'wrong ' if config.wrong else ''}answers")
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    for record in chosen:
        with replacing(folder / file_name(record)) as temporary:
            drawn(record).save(temporary, format="PNG")
    print(f"pictures   {folder}: {len(chosen)}")


def file_name(record: Record) -> str:
    """Of the benchmark and the question's id; ids with other letters than those of file names get a hash."""
    name = str(record["id"])
    tidy = "".join(c if c.isascii() and (c.isalnum() or c in "._+-") else "-" for c in name)[-80:]
    if tidy != name:
        tidy += "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{record['benchmark']}-{tidy}.png"


def drawn(record: Record) -> Image.Image:
    """The picture with the true box (green) and the model's (red) where there are any; below it the words.

    Raises:
        UserError: The image cannot be read.
    """
    picture = open_image(record["image"])
    scale = _SIDE / max(picture.size)
    picture = picture.resize([max(1, round(scale * side)) for side in picture.size])
    boxes = isinstance(record["payload"].get("box"), list)
    if boxes:
        pen = ImageDraw.Draw(picture)
        for corners, colour in ((record["truth"], TRUE), (record["parsed"], ANSWERED)):
            if corners is not None:
                box = Box(tuple(corners), ORIGINAL, Size(*picture.size)).within_image()
                pen.rectangle(box.pixels(), outline="white", width=5)  # seen on any ground
                pen.rectangle(box.pixels(), outline=colour, width=3)
    return _with_words(picture, _words(record, boxes))


def _words(record: Record, boxes: bool) -> list[tuple[str, tuple[int, int, int]]]:
    answer = record["answer"]
    if record["choices"]:
        shares = ", ".join(
            f"{choice} {share:.1%}"
            for choice, share in sorted(
                zip(record["choices"], record["probabilities"], strict=True), key=lambda pair: -pair[1]
            )[:5]
        )
        answer = f"{record['parsed']} ({shares})"
    said = f"answer: {answer}" + (f" ({record['fault']})" if record.get("fault") else "")
    parsed = [] if boxes or record["choices"] else [(f"taken as: {record['parsed']}", ANSWERED)]
    figure = f", overlap {record['iou']:.2f}" if "iou" in record else ""
    return [
        (f"{record['benchmark']} {record['id']}", _INK),
        (record["message"], _INK),
        (said, ANSWERED),
        *parsed,
        (f"truth: {_as_text(record['truth'])}", TRUE),
        (f"score: {record['score']:.2f}{figure}", _INK),
    ]


def _as_text(truth: Any) -> str:
    if isinstance(truth, list):
        parts = [f"{part:.3f}" if isinstance(part, float) else str(part) for part in truth]
        return ", ".join(dict.fromkeys(parts) if all(isinstance(part, str) for part in truth) else parts)
    return str(truth)


def _with_words(picture: Image.Image, words: Sequence[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    width = max(picture.width, _SIDE) + 2 * _MARGIN
    lines = [(line, colour) for text, colour in words for line in _wrapped(text, width - 2 * _MARGIN)]
    step = _LETTERS + 5
    sheet = Image.new("RGB", (width, picture.height + 3 * _MARGIN + step * len(lines)), "white")
    sheet.paste(picture, (_MARGIN, _MARGIN))
    pen = ImageDraw.Draw(sheet)
    for number, (line, colour) in enumerate(lines):
        place = (_MARGIN, picture.height + 2 * _MARGIN + number * step)
        pen.text(place, line, fill=colour, font=_font())
    return sheet


def _wrapped(text: str, width: int) -> list[str]:
    """At most ``_LINES`` lines of at most ``width`` pixels, broken between words, within those that are too long, and
    where they break."""
    lines = list(islice(_lines(text, width), _LINES + 1))
    return lines if len(lines) <= _LINES else [*lines[: _LINES - 1], "…"]


def _lines(text: str, width: int) -> Iterator[str]:
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if _fits(longer, width):
                line = longer
                continue
            if line:
                yield line
            while not _fits(word, width):
                too_long = range(2, len(word) + 1)
                end = 1 + bisect_left(too_long, True, key=lambda n: not _fits(word[:n], width))
                yield word[:end]
                word = word[end:]
            line = word
        yield line


def _fits(text: str, width: int) -> bool:
    # To measure thousands of letters takes its time, and hardly any is narrower than a pixel.
    return len(text) <= width and _font().getlength(text) <= width


@cache
def _font() -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib, which has more letters than Pillow's own."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), _LETTERS)
