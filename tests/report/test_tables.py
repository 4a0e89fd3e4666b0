"""What the numbers of a report mean: pairing, intervals, and text that can be pasted anywhere."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from localign.report.tables.rows import (
    before_after,
    class_grid,
    per_class,
    recall_grid,
    signed,
    to_html,
    to_markdown,
    to_terminal,
)
from localign.statistics.paired import PairedDifference as Difference
from localign.statistics.paired import paired_difference as paired


def metrics(recall: float | None, per_class: list[float | None]) -> dict[str, Any]:
    return {"macro_recall": recall, "class_recall": per_class, "class_positives": [50, 0, 20]}


def result(local: float, linear: float) -> dict[str, Any]:
    heads = {
        "linear": {
            "global": metrics(0.2, [0.1, None, 0.3]),
            "local": metrics(linear, [linear, None, linear]),
        },
        "transformer": {"local": metrics(local, [local, None, 1.0])},
    }
    return {"results": {"val": heads}, "classes": ["ground", "never", "cat"], "train": {"curve": []}}


@pytest.fixture
def results() -> dict[str, Any]:
    baseline = [result(v, 0.1) for v in (0.50, 0.52, 0.54)]
    aligned = [result(v, 0.1) for v in (0.60, 0.64, 0.62)]
    return {"probe": {"baseline": baseline, "aligned": aligned}}


def test_interval_of_three_paired_seeds_by_hand() -> None:
    # Differences 0.10, 0.12, 0.08: mean 0.10, standard deviation 0.02, t(2) = 4.3027.
    found = paired([0.50, 0.52, 0.54], [0.60, 0.64, 0.62])
    assert found.difference == pytest.approx(0.10)
    assert found.half_width == pytest.approx(4.3027 * 0.02 / math.sqrt(3))
    assert (found.baseline, found.aligned, found.seeds) == (pytest.approx(0.52), pytest.approx(0.62), 3)


def test_one_seed_has_a_difference_and_no_interval() -> None:
    assert paired([0.5], [0.4]) == Difference(0.5, 0.4, pytest.approx(-0.1), None, 1)


def test_a_single_baseline_is_held_against_every_seed() -> None:
    found = paired([0.5], [0.6, 0.7])
    assert (found.difference, found.seeds) == (pytest.approx(0.15), 2)


def test_seeds_that_lack_a_value_are_left_out_as_a_pair() -> None:
    found = paired([0.5, None, 0.7], [0.6, 0.9, math.nan])
    assert (found.baseline, found.aligned, found.seeds) == (0.5, 0.6, 1)


def test_nothing_to_compare_is_not_zero() -> None:
    assert paired([0.5, 0.6], []) == Difference(pytest.approx(0.55), None, None, None, 0)
    assert signed(paired([], [])) == "–"


def test_rows_come_local_first_and_transformer_first(results: dict[str, Any]) -> None:
    rows = before_after(results)
    assert [(r.task, r.head) for r in rows] == [
        ("local", "transformer"),
        ("local", "linear"),
        ("global", "linear"),
    ]
    assert recall_grid(rows).rows[0] == ("local (per patch)", "transformer", "52.0", "62.0", "+10.0 ± 5.0")


def test_classes_without_positives_have_no_row(results: dict[str, Any]) -> None:
    classes = per_class(results, before_after(results)[0])
    assert [(c.name, c.positives) for c in classes] == [("ground", 50), ("cat", 20)]
    assert class_grid(classes, "patches").rows[1] == ("cat", "20", "100.0", "100.0", "+0.0 ± 0.0")


def test_one_side_alone_is_a_table_without_a_difference(results: dict[str, Any]) -> None:
    del results["probe"]["aligned"]
    assert recall_grid(before_after(results)).header == ("macro recall, %", "head", "recall")


def test_no_probing_no_rows() -> None:
    assert before_after({"command": "align"}) == []


def test_names_cannot_break_out_of_a_table(results: dict[str, Any]) -> None:
    results["classes"] = ["<script>alert(1)</script>", "x", "a|b"]
    grid = class_grid(per_class(results, before_after(results)[0]), "patches")
    assert "<script>" not in to_html(grid)
    assert "&lt;script&gt;" in to_html(grid)
    assert "a\\|b" in to_markdown(grid)


def test_the_terminal_shows_the_same_numbers(results: dict[str, Any]) -> None:
    stream = io.StringIO()
    Console(width=120, file=stream).print(to_terminal(before_after(results)))
    assert "+10.0 ± 5.0" in stream.getvalue()


def test_the_test_set_comes_before_the_validation_set() -> None:
    def probe(recall: float) -> dict[str, object]:
        metrics = {"transformer": {"local": {"macro_recall": recall}}}
        return {
            "results": {"val": metrics, "test": {"transformer": {"local": {"macro_recall": recall + 0.1}}}}
        }

    rows = before_after({"probe": {"baseline": [probe(0.5)], "aligned": [probe(0.6)]}})
    assert [row.source for row in rows] == ["test", "val"]
    assert rows[0].recall.baseline == pytest.approx(0.6)
