"""Rows of a report: order, pairing, and text that no format breaks on."""

from __future__ import annotations

import io

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
from localign.results import Metrics, ProbeOutcome, Results
from localign.statistics.paired import paired_difference


def metrics(recall: float | None, per_class: list[float | None]) -> Metrics:
    return {"macro_recall": recall, "class_recall": per_class, "class_positives": [50, 0, 20]}


def result(local: float, linear: float) -> ProbeOutcome:
    heads: dict[str, dict[str, Metrics]] = {
        "linear": {
            "global": metrics(0.2, [0.1, None, 0.3]),
            "local": metrics(linear, [linear, None, linear]),
        },
        "transformer": {"local": metrics(local, [local, None, 1.0])},
    }
    return {"results": {"val": heads}, "classes": ["ground", "never", "cat"], "train": {"curve": []}}


@pytest.fixture
def results() -> Results:
    baseline = [result(v, 0.1) for v in (0.50, 0.52, 0.54)]
    aligned = [result(v, 0.1) for v in (0.60, 0.64, 0.62)]
    return {"probe": {"baseline": baseline, "aligned": aligned}}


def test_a_difference_that_was_not_measured_is_a_dash() -> None:
    assert signed(paired_difference([], [])) == "–"


def test_rows_come_local_first_and_transformer_first(results: Results) -> None:
    rows = before_after(results)
    assert [(r.key.task, r.key.head) for r in rows] == [
        ("local", "transformer"),
        ("local", "linear"),
        ("global", "linear"),
    ]
    assert recall_grid(rows).rows[0] == ("local (per patch)", "transformer", "52.0", "62.0", "+10.0 ± 5.0")


def test_classes_without_positives_have_no_row(results: Results) -> None:
    classes = per_class(results, before_after(results)[0])
    assert [(c.name, c.positives) for c in classes] == [("ground", 50), ("cat", 20)]
    assert class_grid(classes, "patches").rows[1] == ("cat", "20", "100.0", "100.0", "+0.0 ± 0.0")


def test_one_side_alone_is_a_table_without_a_difference(results: Results) -> None:
    del results["probe"]["aligned"]
    assert recall_grid(before_after(results)).header == ("macro recall, %", "head", "recall")


def test_no_probing_no_rows() -> None:
    assert before_after(Results(command="align")) == []


def test_names_cannot_break_out_of_a_table(results: Results) -> None:
    results["classes"] = ["<script>alert(1)</script>", "x", "a|b"]
    grid = class_grid(per_class(results, before_after(results)[0]), "patches")
    assert "<script>" not in to_html(grid)
    assert "&lt;script&gt;" in to_html(grid)
    assert "a\\|b" in to_markdown(grid)


def test_the_terminal_shows_the_same_numbers(results: Results) -> None:
    stream = io.StringIO()
    Console(width=120, file=stream).print(to_terminal(before_after(results)))
    assert "+10.0 ± 5.0" in stream.getvalue()


def test_the_test_set_comes_before_the_validation_set() -> None:
    def probe(recall: float) -> ProbeOutcome:
        def heads(value: float) -> dict[str, dict[str, Metrics]]:
            return {"transformer": {"local": {"macro_recall": value}}}

        return {"results": {"val": heads(recall), "test": heads(recall + 0.1)}}

    rows = before_after({"probe": {"baseline": [probe(0.5)], "aligned": [probe(0.6)]}})
    assert [row.key.source for row in rows] == ["test", "val"]
    assert rows[0].recall.baseline == pytest.approx(0.6)
