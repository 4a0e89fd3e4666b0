"""Titles, the dots of each class, patches fixed and broken, a shared basis, and the results of all heads."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from probe_results import results as probe_results

from localign.pictures import joint_basis, joint_components
from localign.report import probepage
from localign.report.captions import features
from localign.report.dumbbells import dumbbells
from localign.report.figures.predictions import predictions_figure
from localign.report.figures.tokens import features_figure, has_joint_basis
from localign.report.html import CSS
from localign.report.tables.measures import comparisons, heads_of
from localign.report.tables.rows import ClassRow
from localign.report.titles import amount, title
from localign.statistics.paired import paired_difference


@pytest.mark.parametrize(
    ("results", "said"),
    [
        (
            {
                "command": "align",
                "config": {"backbone": "clip-vit-b", "data": "/x/photographs"},
                "images": 1_281_167,
            },
            "Alignment of clip-vit-b on photographs, 1.28 M samples seen",
        ),
        (
            {"command": "align", "config": {"backbone": "/models/mine/", "data": "scenes:train"}},
            "Alignment of mine on drawn scenes",
        ),
        ({"command": "align", "config": {"backbone": "org/model"}}, "Alignment of org/model"),
        (
            {"command": "probe", "config": {"data": "coco"}, "probe": {"a": [{}], "b": [{}]}},
            "Probing of a, b on coco",
        ),
        (
            {"command": "probe", "config": {}, "probe": {n: [{}] for n in "abcd"}},
            "Probing of 4 backbones",
        ),
        ({"command": "reproduce", "config": {"target": "table1"}}, "Reproduction of table1"),
        ({"command": "finetune", "config": {}}, "localign finetune: run7"),
        ({}, "localign run: run7"),
    ],
)
def test_a_title_says_what_was_run(results: Any, said: str) -> None:
    assert title(results, "run7") == said


def test_amounts_are_for_people() -> None:
    assert [amount(n) for n in (7, 9_876, 57_300, 999_600, 1_281_167, 12_800_000, 3_000_000_000)] == [
        "7", "9,876", "57 k", "1 M", "1.28 M", "12.8 M", "3 G",
    ]  # fmt: skip


def class_row(name: str, before: list[float | None], after: list[float | None]) -> ClassRow:
    return ClassRow(name, 10, paired_difference(before, after))


def test_dots_lie_at_the_recalls_and_the_whisker_is_the_interval() -> None:
    rows = [class_row("<b>&cat", [0.25, 0.25], [0.5, 0.52]), class_row("dog", [1.0], [0.0])]
    drawn = ElementTree.fromstring(dumbbells(rows))
    lines = [group for group in drawn if group.find("title") is not None]
    assert len(lines) == 2
    x0, x100 = (float(line.get("x1", "")) for line in (drawn[0][0], drawn[0][-2]))
    shares = []
    for group in lines:
        before, after = group.find("circle"), group.find("rect")
        assert before is not None
        assert after is not None
        places = float(before.get("cx", "")), float(after.get("x", "")) + 5
        shares.append([(x - x0) / (x100 - x0) for x in places])
    assert np.allclose(shares, [[0.25, 0.51], [1.0, 0.0]], atol=1e-3)
    whisker = next(line for line in lines[0] if line.get("class") == "whisker")
    half = rows[0].recall.half_width
    assert half is not None
    ends = [(float(whisker.get(name, "")) - x0) / (x100 - x0) for name in ("x1", "x2")]
    assert np.allclose(ends, [0.51 - half, 0.51 + half], atol=1e-3)
    assert not [line for line in lines[1] if line.get("class") == "whisker"]  # one seed: no interval
    assert "<b>&cat" in "".join(drawn.itertext())


def test_classes_without_both_recalls_have_no_dots() -> None:
    assert dumbbells([class_row("cat", [None], [0.5]), class_row("dog", [0.5], [])]) == ""


def test_fixed_and_broken_patches_are_marked_and_counted() -> None:
    truth = np.zeros((1, 4, 2), dtype=bool)
    truth[0, :, 0] = True
    right, wrong = [0.9, 0.1], [0.1, 0.9]
    arrays = {
        "images": np.zeros((1, 3, 8, 8), dtype=np.uint8),
        "grid": np.array([2, 2]),
        "truth": truth,
        "class_names": np.array(["a", "b"]),
        "probability_baseline": np.array([[right, right, wrong, wrong]]),
        "probability_aligned": np.array([[right, wrong, right, right]]),
    }
    axes = predictions_figure(arrays).get_axes()
    assert axes[2].get_xlabel() == "2 of 4 patches wrong"
    assert axes[3].get_xlabel() == "1 of 4 patches wrong\n2 fixed, 1 broken"
    marks = [np.asarray(drawn.get_offsets()).round().tolist() for drawn in axes[3].collections]
    assert [[0.0, 1.0], [1.0, 1.0]] in marks
    assert [[1.0, 0.0]] in marks


def test_a_shared_basis_gives_equal_directions_equal_colours_whatever_the_shift_and_scale() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(2, 40, 6) * torch.tensor([3.0, 2.0, 1.5, 0.2, 0.1, 0.1])
    arrays = joint_components({"baseline": tokens, "aligned": 7 * tokens + 100})
    assert np.allclose(arrays["joint_baseline"], arrays["joint_aligned"], atol=1e-4)
    assert np.allclose(arrays["joint_baseline_share"], arrays["joint_aligned_share"])
    assert arrays["joint_baseline_share"].sum() > 0.95
    total = (arrays["joint_baseline"] ** 2).reshape(-1, 3).mean(0)
    assert np.allclose(total, arrays["joint_baseline_share"], rtol=1e-4)


def test_each_model_counts_with_the_same_variance() -> None:
    first, second = np.diag([4.0, 0.0, 0.0, 1.0]), np.diag([0.0, 400.0, 90.0, 0.0])
    basis = joint_basis([first, second])
    assert np.abs(basis).round(6).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_the_maps_of_both_models_share_their_colours() -> None:
    draw = np.random.default_rng(0)
    arrays = {
        "images": np.zeros((1, 3, 8, 8), dtype=np.uint8),
        "grid": np.array([2, 2]),
        **{
            f"{kind}_{side}": draw.random((1, 4, 3))
            for kind in ("pca", "joint")
            for side in ("baseline", "aligned")
        },
        **{f"{k}_{s}_share": np.full(3, 0.2) for k in ("pca", "joint") for s in ("baseline", "aligned")},
    }
    arrays["joint_aligned"][0, 0] = arrays["joint_baseline"][0, 0]
    assert has_joint_basis(arrays)
    axes = features_figure(arrays).get_axes()
    before, after = (np.asarray(ax.images[0].get_array()) for ax in axes[1:])
    assert np.allclose(before[0, 0], after[0, 0])
    assert not np.allclose(before, after)
    old = {name: array for name, array in arrays.items() if not name.startswith("joint")}
    assert not has_joint_basis(old)
    assert features_figure(old).get_axes()
    assert "comparable between rows, too" in features(joint=True)[1]
    assert "not between rows" in features(joint=False)[1]


def test_the_results_of_all_heads_are_told() -> None:
    results = probe_results({"a-baseline": (0.4, 0.5), "a": (0.5, 0.45)}, seeds=2)
    lines = probepage.other_heads(results)
    wanted = sum(len(heads_of(results, task)) for task in ("local", "global", "majority")) - 1
    assert len(lines) == wanted * len(comparisons(results)) > 0
    assert all(re.search(r"points \(", line) for line in lines)


def test_the_page_has_colours_for_dark_screens_and_fits_a_phone() -> None:
    assert "prefers-color-scheme: dark" in CSS
    assert "max-width: 620px" in CSS
