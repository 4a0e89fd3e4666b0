"""`localign vlm show`: draw questions and answers as pictures."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from localign.errors import UserError
from localign.files import replacing
from localign.files.output import SHOWN, png_mark
from localign.options.vlm.evaluation import ShowConfig
from localign.text.printing import printable
from localign.vlm.benchmarks.table import benchmark_class
from localign.vlm.data.images import open_image
from localign.vlm.evaluation.results import ANSWERS_FILE, AnswerRecord, read_answers
from localign.vlm.scoring.boxes import ORIGINAL, Box, Size

TRUE, ANSWERED = (20, 140, 60), (200, 30, 40)
"""Colours of the true box and of the model's box."""
_INK = (20, 20, 20)
_SIDE = 640
"""Longer side of the image, pixels."""
_FONT_SIZE, _MARGIN = 16, 12
"""Pixels."""
_MAX_LINES = 20
"""Lines per text."""


def run_show(config: ShowConfig) -> None:
    """Draw the chosen answers in the order of the file.

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
            draw_record(record).save(temporary, format="PNG", pnginfo=png_mark(SHOWN))
    print(f"pictures   {printable(folder)}: {len(chosen)}")


def file_name(record: AnswerRecord) -> str:
    """A file name from the benchmark and the question's id. Ids with unsafe characters get a hash."""
    name = str(record["id"])
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "._+-") else "-" for c in name)[-80:]
    if safe != name:
        safe += "-" + hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()[:8]
    return f"{record['benchmark']}-{safe}.png"


def draw_record(record: AnswerRecord) -> Image.Image:
    """The image with the true box (green) and the model's box (red), if any, above the texts.

    Raises:
        UserError: The image cannot be read.
    """
    picture = open_image(record["image"])
    scale = _SIDE / max(picture.size)
    picture = picture.resize([max(1, round(scale * side)) for side in picture.size])
    has_boxes = isinstance(record["payload"].get("box"), list)
    if has_boxes:
        pen = ImageDraw.Draw(picture)
        for corners, colour in ((record["truth"], TRUE), (record["parsed"], ANSWERED)):
            if corners is not None:
                x1, y1, x2, y2 = (float(number) for number in corners)
                box = Box((x1, y1, x2, y2), ORIGINAL, Size(*picture.size)).within_image()
                pen.rectangle(box.pixels(), outline="white", width=5)  # visible on any background
                pen.rectangle(box.pixels(), outline=colour, width=3)
    return _with_texts(picture, _texts(record, has_boxes))


def _texts(record: AnswerRecord, has_boxes: bool) -> list[tuple[str, tuple[int, int, int]]]:
    """Texts with their colours."""
    answer = record["answer"]
    if record["choices"]:
        shares = ", ".join(
            f"{choice} {share:.1%}"
            for choice, share in sorted(
                zip(record["choices"], record["probabilities"], strict=True), key=lambda pair: -pair[1]
            )[:5]
        )
        answer = f"{record['parsed']} ({shares})"
    fault = f" ({record['fault']})" if record.get("fault") else ""
    parsed = [] if has_boxes or record["choices"] else [(f"taken as: {record['parsed']}", ANSWERED)]
    overlap = f", overlap {record['iou']:.2f}" if "iou" in record else ""
    return [
        (f"{record['benchmark']} {record['id']}", _INK),
        (record["message"], _INK),
        (f"answer: {answer}{fault}", ANSWERED),
        *parsed,
        (f"truth: {_truth_text(record['truth'])}", TRUE),
        (f"score: {record['score']:.2f}{overlap}", _INK),
    ]


def _truth_text(truth: str | Sequence[str] | Sequence[float]) -> str:
    """Annotators' answers without repetitions, or the numbers of a box."""
    if isinstance(truth, str):
        return truth
    if all(isinstance(part, str) for part in truth):
        return ", ".join(dict.fromkeys(map(str, truth)))
    return ", ".join(f"{part:.3f}" if isinstance(part, float) else str(part) for part in truth)


def _with_texts(picture: Image.Image, texts: Sequence[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    width = max(picture.width, _SIDE) + 2 * _MARGIN
    lines = [(line, colour) for text, colour in texts for line in _wrap(text, width - 2 * _MARGIN)]
    line_height = _FONT_SIZE + 5
    sheet = Image.new("RGB", (width, picture.height + 3 * _MARGIN + line_height * len(lines)), "white")
    sheet.paste(picture, (_MARGIN, _MARGIN))
    pen = ImageDraw.Draw(sheet)
    for number, (line, colour) in enumerate(lines):
        position = (_MARGIN, picture.height + 2 * _MARGIN + number * line_height)
        pen.text(position, line, fill=colour, font=_font())
    return sheet


def _wrap(text: str, width: int) -> list[str]:
    """At most ``_MAX_LINES`` lines of at most ``width`` pixels."""
    lines = list(islice(_lines(text, width), _MAX_LINES + 1))
    return lines if len(lines) <= _MAX_LINES else [*lines[: _MAX_LINES - 1], "…"]


def _lines(text: str, width: int) -> Iterator[str]:
    """Break a text at its line ends, between words, and within words that are wider than a line."""
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
                lengths = range(2, len(word) + 1)
                end = 1 + bisect_left(lengths, True, key=lambda n: not _fits(word[:n], width))
                yield word[:end]
                word = word[end:]
            line = word
        yield line


def _fits(text: str, width: int) -> bool:
    # Measuring thousands of letters is slow, and hardly any letter is narrower than a pixel.
    return len(text) <= width and _font().getlength(text) <= width


@cache
def _font() -> ImageFont.FreeTypeFont:
    """Matplotlib's font, which has more letters than Pillow's own."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), _FONT_SIZE)
