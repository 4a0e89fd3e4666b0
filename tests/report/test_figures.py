"""Figures are readable with few backbones and with many: names do not overlap, and nothing leaves the paper."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import cache

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from probe_results import class_list, pictures, results, twenty_pairs

from localign.report.figures.bars import heads_drawing, tasks_drawing
from localign.report.figures.classes import classes_drawing, compact
from localign.report.figures.drawing import Drawing, points, short_names, slug
from localign.report.figures.interventions import interventions_drawing
from localign.report.figures.locality import free_offset, locality_drawing
from localign.report.figures.most_probable import predictions_drawing, region_centres
from localign.report.figures.sizes import sizes_drawing
from localign.report.figures.views import Views, crop, masked, views_drawing
from localign.report.tables.measures import comparisons
from localign.report.tables.rows import MetricKey
from localign.results import Results

LOCAL = MetricKey("test", "transformer", "local")
TWO = {"vit_small_patch16_224": (0.2, 0.3), "runs/a/long/path/to/a/run/export-step-20000": (0.5, 0.6)}
CASES = {
    "two": results(TWO, seeds=2),
    "twenty": results(twenty_pairs()),
    "many classes": results(TWO, classes=183, kinds=True, heads=("transformer", "transformer-anonymous")),
}


@cache
def drawings(case: str) -> list[Drawing]:
    content = CASES[case]
    pair = comparisons(content)[0]
    found = [
        tasks_drawing(content, "transformer"),
        heads_drawing(content),
        classes_drawing(content, pair, LOCAL),
        sizes_drawing(content, pair, LOCAL),
        locality_drawing(content, "transformer"),
        interventions_drawing(content),
    ]
    return [d for d in found if d is not None]


def boxes(texts: Iterable[Text]) -> list[Bbox]:
    return [t.get_window_extent() for t in texts if t.get_visible() and t.get_text().strip()]


def overlap(found: list[Bbox]) -> bool:
    shrunk = [b.padded(-0.5) for b in found]  # touching is no overlap
    return any(a.overlaps(b) for a, b in itertools.combinations(shrunk, 2))


def titles(ax: Axes) -> list[Text]:
    return [ax.title, ax._left_title, ax._right_title]  # type: ignore[attr-defined]


def shown_ticks(ax: Axes) -> tuple[list[Text], list[Text]]:
    """Labels of ticks within the axes; matplotlib keeps a few beyond their ends and does not draw them."""
    found = []
    for axis, (low, high) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim()))):
        slack = 1e-6 * (high - low)
        ticks = [t for t in axis.get_major_ticks() if low - slack <= t.get_loc() <= high + slack]
        found.append([t.label1 for t in ticks if t.label1.get_visible()])
    return found[0], found[1]


def assert_readable(figure: Figure) -> None:
    figure.draw_without_rendering()
    paper = figure.bbox.padded(1)
    for ax in figure.get_axes():
        x, y = shown_ticks(ax)
        assert not overlap(boxes(x))
        assert not overlap(boxes(y))
        assert not overlap(boxes([*titles(ax), ax.xaxis.label]))
        words = boxes([*x, *y, *titles(ax), ax.xaxis.label, ax.yaxis.label])
        assert all(paper.contains(*corner) for b in words for corner in (b.min, b.max))
    for legend in figure.legends:
        assert not overlap(boxes(legend.get_texts()))
        assert all(paper.contains(*corner) for b in boxes(legend.get_texts()) for corner in (b.min, b.max))


@pytest.mark.parametrize("case", CASES)
def test_names_neither_overlap_nor_leave_the_paper(case: str) -> None:
    found = drawings(case)
    assert len(found) >= 5
    for drawing in found:
        assert_readable(drawing.figure)


@pytest.mark.parametrize("case", CASES)
def test_axes_tell_what_they_are(case: str) -> None:
    for drawing in drawings(case):
        labels = " ".join(f"{a.get_xlabel()} {a.get_ylabel()}" for a in drawing.figure.get_axes())
        assert "%" in labels or "points" in labels, drawing.name
        assert all(len(words) > 30 for words in drawing.words)


def test_each_name_is_drawn_once_per_line() -> None:
    names = [t.get_text() for t in drawings("twenty")[0].figure.get_axes()[0].get_yticklabels()]
    assert len(names) == len(set(names)) == 10
    assert all(len(n) <= 30 for n in names)


def test_unknown_kinds_are_said_and_known_ones_split() -> None:
    def words(content: Results) -> str:
        drawing = classes_drawing(content, comparisons(content)[0], LOCAL)
        assert drawing is not None
        texts = [t.get_text() for ax in drawing.figure.get_axes() for t in titles(ax)]
        return " ".join(
            [*texts, *(t.get_text() for legend in drawing.figure.legends for t in legend.get_texts())]
        )

    known = words(CASES["many classes"])
    assert "most improved things" in known
    assert "most improved stuff" in known
    unknown = words(results(TWO, classes=60))
    assert "kinds of classes unknown" in unknown
    assert "most improved classes" in unknown
    assert "all 9 classes" in words(results(TWO))


def test_a_trend_takes_three_backbones() -> None:
    drawing = locality_drawing(results(TWO), "transformer")
    assert drawing is not None
    assert len(drawing.figure.get_axes()) == 1
    assert any("No trend" in t.get_text() for t in titles(drawing.figure.get_axes()[0]))
    more = locality_drawing(results(TWO | {"third": (0.4, 0.45)}), "transformer")
    assert more is not None
    relative = [row[-1] for row in more.rows]
    assert sum(relative) == pytest.approx(0, abs=1e-12)


def test_a_text_goes_where_nothing_is() -> None:
    point = np.array([0.0, 0.0])
    own = (-4.0, -4.0, 4.0, 4.0)
    first = free_offset(point, (5, 8), [own])
    taken = (first[0] - 3, first[1] - 4, first[0] + 3, first[1] + 4)
    second = free_offset(point, (5, 8), [own, taken])
    assert not np.allclose(first, second)


def test_long_names_are_cut_where_they_stay_different() -> None:
    assert short_names(["short", "a" * 20 + "b" * 20], 21) == ["short", "a" * 10 + "…" + "b" * 10]
    middle = [f"{'a' * 20}{i}{'b' * 12}" for i in range(2)]  # they differ where the middle is
    assert short_names(middle, 21) == [f"…{'a' * 7}{i}{'b' * 12}" for i in range(2)]
    alike = short_names(["c" * 40, "c" * 40, "d"], 21)
    assert len(set(alike)) == 3
    assert all(len(n) <= 21 for n in alike)
    assert short_names(["a$b"]) == [r"a\$b"]


def test_file_names_hold_nothing_that_a_path_would_mind() -> None:
    assert slug("runs/../a b:c") == "runs-a-b-c"
    assert slug("../..") == "backbone"


def test_small_differences_are_not_minus_zero() -> None:
    assert [points(v) for v in (-0.0001, 0.017, -0.017)] == ["0.0", "+1.7", "\u22121.7"]
    assert [compact(v) for v in (9_876, 12_345, 3_400_000)] == ["9,876", "12k", "3.4M"]


# -- patches and views -----------------------------------------------------------------------------------


def test_regions_are_connected_patches_of_one_class() -> None:
    classes = np.array([[1, 1, 2], [1, 3, 2], [3, 3, 2]])
    assert region_centres(classes, 3) == [(1, (0, 0)), (2, (1, 2)), (3, (2, 1))]
    assert region_centres(classes, 4) == []


def test_the_legend_holds_only_classes_that_appear() -> None:
    names = [f"thing number {i}" for i in range(183)]
    arrays = pictures(["a", "b"], names)
    for side in "ab":
        arrays[f"probability_{side}"][:] = 0
        arrays[f"probability_{side}"][..., 7] = 1
    arrays["majority"] = np.full((2, 16), 5)
    drawing = predictions_drawing(arrays, {"a": "first", "b": "second", "gone": "third"})
    assert drawing is not None
    assert_readable(drawing.figure)
    labels = [t.get_text() for t in drawing.figure.legends[0].get_texts()]
    assert [label.split("  ")[-1] for label in labels[:-1]] == ["thing number 7", "thing number 5"]
    assert [ax.get_title() for ax in drawing.figure.get_axes()[:4]] == ["image", "truth", "first", "second"]
    right = arrays["truth"][..., 7].sum(1)
    assert [row[3] for row in drawing.rows] == [right[0], right[0], right[1], right[1]]


def test_more_classes_than_looks_share_the_grey() -> None:
    names = [f"thing number {i}" for i in range(183)]
    drawing = predictions_drawing(pictures(["a"], names, side=8))
    assert drawing is not None
    labels = [t.get_text() for t in drawing.figure.legends[0].get_texts()]
    assert len(labels) <= 23
    assert labels[-2].endswith("other classes")


def test_classes_of_colours_and_shapes_share_a_patch() -> None:
    drawing = predictions_drawing(pictures(["baseline", "aligned"], ["ground", "red", "circle"]))
    assert drawing is not None
    assert any("stripes" in words for words in drawing.words)
    assert predictions_drawing({"images": np.zeros((1, 3, 4, 4))}) is None


def test_backbones_may_differ_in_their_grids() -> None:
    arrays = pictures(["a"], class_list(10), side=4)
    finer = pictures(["b"], class_list(10), side=8)
    arrays |= {"probability_b": finer["probability_b"], "truth_b": finer["truth"], "grid_b": finer["grid"]}
    drawing = predictions_drawing(arrays)
    assert drawing is not None
    assert [row[2] for row in drawing.rows] == [16, 64, 16, 64]


def test_hidden_patches_are_grey_and_the_others_untouched() -> None:
    picture = np.random.default_rng(0).integers(0, 120, (9, 9, 3), dtype=np.uint8)
    keep = np.array([True, False, False, True])
    shown = masked(picture, keep, (2, 2))
    assert (shown[:4, :4] == picture[:4, :4]).all()
    assert (shown[4:8, 4:8] == picture[4:8, 4:8]).all()
    assert (shown[:4, 4:8] == 128).all()
    assert (shown[8] == 128).all()  # beyond the last whole patch


def test_a_crop_of_everything_is_the_picture_and_of_one_colour_that_colour() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert (crop(picture, (0, 0, 2, 2), (2, 2)) == picture).all()
    picture[:4, 4:] = (9, 8, 7)
    assert (crop(picture, (0, 1, 1, 1), (2, 2)) == (9, 8, 7)).all()


def test_views_of_given_windows_are_recorded() -> None:
    images = np.zeros((1, 3, 16, 16), dtype=np.uint8)
    keep = np.arange(16) < 4
    masks = {"a quarter": np.stack([keep, ~keep])[None]}
    drawing = views_drawing(Views(images, (4, 4), masks, windows=[[(0, 1, 2, 3)]]))
    assert [row[:3] for row in drawing.rows[:2]] == [
        (0, "a quarter, mask", 0.25),
        (0, "a quarter, complement", 0.75),
    ]
    assert drawing.rows[-1] == (0, "crop", 6 / 16, 0, 1, 2, 3)
    assert_readable(drawing.figure)
