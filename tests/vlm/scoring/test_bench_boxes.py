"""Boxes: parsing, frames, overlap, and refusals."""

from __future__ import annotations

import itertools
import random
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from localign.errors import UserError
from localign.vlm.data.images import ImageTransform
from localign.vlm.scoring.boxes import (
    ORIGINAL,
    SCALES,
    Box,
    BoxFrame,
    Layout,
    Size,
    iou,
    overlap,
    parse_box,
    parse_published,
    published_truth,
)

FRAMES = [
    BoxFrame(layout, scale, (336, 448) if layout == "letterboxed" else None)
    for layout, scale in itertools.product(get_args(Layout), SCALES)
]
WIDE = Size(200, 100)


@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_round_trips_are_exact(frame: BoxFrame) -> None:
    draw = random.Random(0)
    for _ in range(200):
        size = Size(draw.randint(1, 5000), draw.randint(1, 5000))
        pixels = tuple(draw.uniform(0, side) for side in (*size, *size))
        back = frame.to_pixels(frame.from_pixels(pixels, size), size)
        assert np.abs(np.subtract(back, pixels)).max() < 1e-6
        first, second = draw.sample(FRAMES, 2)
        box = Box.of_pixels(pixels, size, frame)
        assert np.abs(np.subtract(box.to(first).to(second).to(frame).corners, box.corners)).max() < 1e-6


@pytest.mark.parametrize(
    ("frame", "corners"),
    [
        # 200 x 100: a square gets 50 rows above and below, so y = 25 is at 75 of 200
        ("original:0-1", (0.1, 0.25, 0.5, 1.0)),
        ("padded-square:0-1", (0.1, 0.375, 0.5, 0.75)),
        ("padded-square:0-1000", (100, 375, 500, 750)),
        ("letterboxed:336x336:0-1", (0.1, 0.375, 0.5, 0.75)),
        # an input twice as wide as high needs no padding
        ("letterboxed:100x200:0-100", (10, 25, 50, 100)),
        # an input four times as wide as high adds 100 columns on either side: x = 20 is at 120 of 400
        ("letterboxed:100x400:0-1", (0.3, 0.25, 0.5, 1.0)),
    ],
)
def test_where_a_box_lies_in_each_frame(frame: str, corners: tuple[float, ...]) -> None:
    box = Box.of_pixels((20, 25, 100, 100), WIDE, BoxFrame.parse(frame))
    assert box.corners == pytest.approx(corners)
    assert str(box.frame) == frame
    assert box.pixels() == pytest.approx((20, 25, 100, 100))


@pytest.mark.parametrize("seen", [(448, 448), (224, 448), (448, 224)], ids=str)
@pytest.mark.parametrize("size", [(200, 100), (60, 140), (97, 31)], ids=str)
def test_boxes_in_letterboxed_images_are_found_where_the_object_is(
    size: tuple[int, int], seen: tuple[int, int]
) -> None:
    width, height = size
    truth = (width // 4, height // 3, width // 2, height // 2)
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), truth)
    bright = ImageTransform(seen, "letterbox", (0, 0, 0))(image)[0].numpy() > 127
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    across, down = seen[::-1]
    answered = (columns[0] / across, rows[0] / down, (columns[-1] + 1) / across, (rows[-1] + 1) / down)
    box = Box(answered, BoxFrame("letterboxed", 1, seen), Size(*size))
    assert box.pixels() == pytest.approx(truth, abs=0.4)


def test_boxes_of_different_frames_or_images_are_not_compared() -> None:
    truth = Box.of_pixels((20, 25, 100, 100), WIDE)
    answered = Box.of_pixels((20, 25, 100, 100), WIDE, BoxFrame("padded-square"))
    with pytest.raises(UserError, match="padded-square:0-1 of an image of 200 x 100 cannot be compared"):
        iou(answered, truth)
    with pytest.raises(UserError, match="original:0-1000"):
        iou(Box.of_pixels((20, 25, 100, 100), WIDE, BoxFrame(scale=1000)), truth)
    with pytest.raises(UserError, match="100 x 100"):
        iou(truth, Box.of_pixels((20, 25, 100, 100), Size(100, 100)))
    assert iou(answered.to(ORIGINAL), truth) == pytest.approx(1)
    assert overlap(answered.corners, truth.corners) < 0.6  # the score without the conversion


def test_padding_is_cut_off() -> None:
    # rows -50..50 of a 200 x 100 image in a square: the upper half lies on padding
    box = Box((0.0, 0.0, 1.0, 0.5), BoxFrame("padded-square"), WIDE)
    assert box.pixels() == pytest.approx((0, -50, 200, 50))
    assert box.within_image().pixels() == pytest.approx((0, 0, 200, 50))
    on_padding = Box((0.0, 0.0, 1.0, 0.2), BoxFrame("padded-square"), WIDE).within_image()
    assert iou(on_padding, Box.of_pixels((0, 0, 9, 9), WIDE, on_padding.frame)) == 0


def test_intersection_over_union_by_hand() -> None:
    assert overlap((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert overlap((0, 0, 1, 1), (1, 0, 2, 1)) == 0
    assert overlap((0, 0, 4, 4), (1, 1, 3, 3)) == pytest.approx(4 / 16)
    assert overlap((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)) == 0  # two empty boxes


@pytest.mark.parametrize(
    "text", ["[0.1, 0.2, 0.3, 0.4]", "[0,0,1,1]", "[0.1,0.2,\n0.3,0.4,]", " [.1, .2, .3, .4]"]
)
def test_published_boxes(text: str) -> None:
    assert parse_published(text, ORIGINAL) is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[0.1, 0.2, 0.3, 0.4].",
        "(0.1, 0.2, 0.3, 0.4)",
        "0.1, 0.2, 0.3, 0.4",
        "It is at [0.1, 0.2, 0.3, 0.4]",
        "[0.1, 0.2, 0.3]",
        "[0.1, 0.2, 0.3, 1.1]",
        "[-0.1, 0.2, 0.3, 0.4]",
        "[0.3, 0.2, 0.3, 0.4]",
        "[0.1, 0.4, 0.3, 0.2]",
        "['0.1', 0.2, 0.3, 0.4]",
        "[0.1, 0.2, 0.3, None]",
        "[0.1, 0.2, 0.3, 1e999]",
        "[[0.1, 0.2, 0.3, 0.4]]",
        "0x1is",
        "[" * 10_000,
        "{",
        "\u00e4",
        "\x00",
    ],
)
def test_other_texts_are_not_published_boxes(text: str) -> None:
    assert parse_published(text, ORIGINAL) is None


def test_published_scoring_refuses_boxes_of_another_frame() -> None:
    for frame in FRAMES[1:]:
        with pytest.raises(UserError, match=f"but the answers are in the frame {frame}"):
            parse_published("[0.1, 0.2, 0.3, 0.4]", frame)


def test_the_published_truth_is_rounded() -> None:
    assert published_truth((3.2, 3.1, 3.8, 3.6), WIDE) == (0.02, 0.03, 0.02, 0.04)
    assert published_truth((25, 12.5, 125, 62.5), WIDE) == (0.12, 0.12, 0.62, 0.62)  # halves to even


@pytest.mark.parametrize(
    "text",
    [
        "[0.1, 0.2, 0.3, 0.4]",
        "[0.1, 0.2, 0.3, 0.4].",
        "(0.1 0.2 0.3 0.4)",
        "0.1, 0.2, 0.3, 0.4",
        "The 2nd man is at [.1,.2,.3,.4] or so, 3 m away",
        "[0.1, 0.2, 0.3, 0.4] and [0.5, 0.5, 0.6, 0.6]",
        '{"bbox_2d": [0.1, 2e-1, 0.3, 0.4]}',
        "<box>(0.1,0.2),(0.3,0.4)</box>",
    ],
)
def test_declared_boxes_are_found_in_sentences(text: str) -> None:
    assert parse_box(text, ORIGINAL, WIDE) == Box((0.1, 0.2, 0.3, 0.4), ORIGINAL, WIDE)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "no box"),
        ("on the left", "no box"),
        ("[0.1, 0.2, 0.3]", "no box"),
        ("0.1 0.2 0.3 0.4 0.5", "no box"),
        ("[10, 20, 30, 40]", "outside the frame"),
        ("[-0.1, 0.2, 0.3, 0.4]", "outside the frame"),
        ("[0.1, 0.2, 0.3, 1e999]", "outside the frame"),
        ("[0.3, 0.2, 0.1, 0.4]", "corners out of order"),
        ("[0.3, 0.2, 0.3, 0.4]", "corners out of order"),
    ],
)
def test_why_an_answer_names_no_box(text: str, fault: str) -> None:
    assert parse_box(text, ORIGINAL, WIDE) == fault


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("letterboxed:0-1", "need the height and width"),
        ("original:336x336:0-1", "and no others"),
        ("original:0-255", "0..1, 0..100 or 0..1000, not 0..255"),
        ("cropped:0-1", "unknown box layout 'cropped'"),
        ("letterboxed:0x9:0-1", "must be at least 1 x 1, not 0 x 9"),
        ("0-1", "is not a box frame"),
    ],
)
def test_bad_frames_are_refused(text: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        BoxFrame.parse(text)
