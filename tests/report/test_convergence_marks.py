"""Readers are told which heads had not converged, and nothing of results that do not say."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.text import Text
from probe_results import results
from rich.console import Console

from localign.report.figures.bars import tasks_drawing
from localign.report.probepage import headline
from localign.report.tables.measures import NOT_CONVERGED, NOT_CONVERGED_NOTE, change, unconverged
from localign.report.tables.probe import comparison_table, convergence_grid, recall_caption
from localign.report.tables.recalls import recall_table
from localign.report.tables.rows import MetricKey, before_after, interval_sentence
from localign.results import Results, all_converged

KEY = MetricKey("test", "linear", "local")


def judged(*verdicts: bool | None) -> Results:
    """Two backbones with two seeds; the verdicts are of linear heads on the local task, first of all of ``before``."""
    content = results({"baseline": (0.4, 0.5), "aligned": (0.45, 0.52)}, seeds=2, heads=("linear",))
    content["protocol"] = "fixed"
    outcomes: list[Any] = [*content["probe"]["baseline"], *content["probe"]["aligned"]]
    for outcome, verdict in zip(outcomes, verdicts, strict=False):
        facts = {"converged": verdict, "steps": 9, "reported_step": 9}
        outcome["train"]["convergence"] = {"linear": {"local": facts, "global": {**facts, "converged": True}}}
    return content


def shown(content: Results) -> str:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(recall_table(content))
    return captured.get()


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ((True, True, True, True), True),
        ((True, True, True, False), False),
        ((False, None, True, True), False),
        ((None, True, True, True), None),
        ((True, True), None),
        ((), None),
    ],
)
def test_one_head_that_has_not_converged_marks_the_difference(
    verdicts: tuple[bool | None, ...], expected: bool | None
) -> None:
    content = judged(*verdicts)
    difference = change(content, "baseline", "aligned", KEY)
    assert difference is not None
    assert difference.converged is expected
    marked = expected is False
    caption, grid = comparison_table(content)
    assert (NOT_CONVERGED_NOTE in caption) is marked
    assert sum(NOT_CONVERGED in cell for row in grid.rows for cell in row) == marked, (
        "the global task is not marked"
    )
    assert ("so this tells how fast they learn" in headline(content)) is marked
    assert (NOT_CONVERGED in shown(content)) is marked
    sentence = interval_sentence(before_after(content))
    assert sentence.startswith("± is half the 95 % t-interval")
    assert (
        "not converged when their training of a fixed length ended: linear (local)." in sentence
    ) is marked


def test_the_backbone_with_the_unconverged_head_is_named() -> None:
    content = judged(True, True, False, True)
    assert unconverged(content) == ["aligned: linear (local)"]
    assert "Heads that had not converged: aligned: linear (local)." in recall_caption(content)
    verdicts = [row[1:] for row in convergence_grid(content).rows]
    assert verdicts.count(("linear head", "local", "no", "9")) == 1
    assert verdicts.count(("linear head", "local", "yes", "9")) == 1
    lines = shown(content).splitlines()
    assert sum("converged: no" in line for line in lines) == 1
    assert sum("converged: yes" in line for line in lines) == 3


def test_old_results_show_as_before() -> None:
    content = judged()
    assert unconverged(content) == []
    assert "converged" not in shown(content)
    assert convergence_grid(content).rows == ()
    assert all_converged([], "linear", "local") is None


@pytest.mark.parametrize("converged", [True, False])
def test_the_figure_marks_the_difference(converged: bool) -> None:
    drawing = tasks_drawing(judged(True, True, True, converged), "linear")
    assert drawing is not None
    texts = [text.get_text() for text in drawing.figure.findobj(Text)]
    assert sum(text.endswith("*") and text[0] in "+−" for text in texts) == int(not converged)
    assert ("*: heads not converged" in texts) is not converged
