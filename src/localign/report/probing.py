"""The files of a probing run: CSV files, figures, and tables with published numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from localign.engine.log import say
from localign.engine.run_folder import read_results
from localign.errors import UserError, did_you_mean
from localign.files import replace_text
from localign.report.figures import Drawing
from localign.report.figures.bars import heads_drawing, tasks_drawing
from localign.report.figures.classes import classes_drawing
from localign.report.figures.drawing import slug
from localign.report.figures.interventions import interventions_drawing
from localign.report.figures.locality import (
    locality_drawing,
    locality_grid,
    measure_locality,
    trend_sentence,
)
from localign.report.figures.most_probable import predictions_drawing
from localign.report.figures.sizes import sizes_drawing
from localign.report.figures.views import Views, views_drawing
from localign.report.picture_file import read_pictures
from localign.report.tables.csvfiles import write_csv
from localign.report.tables.latex import to_latex
from localign.report.tables.measures import (
    BackbonePair,
    comparisons,
    display_names,
    main_head,
    main_source,
)
from localign.report.tables.probe import comparison_table, recall_caption, recall_grid
from localign.report.tables.rows import Grid, MetricKey, measured, probe_runs, to_markdown
from localign.results import PICTURES_FILE, Pictures, ProbeResults, Results

FIGURES = ("fig3", "fig4", "fig6", "fig7", "fig8", "fig9", "fig10")
MAX_DETAILED = 6
"""Comparisons that get figures by class and by size; the CSV files hold all."""


@dataclass
class ProbeReport:
    """The figures and tables of probing results."""

    drawings: list[Drawing] = field(default_factory=list)
    tables: dict[str, tuple[str, Grid]] = field(default_factory=dict)
    """Name to caption and table."""
    left_out: list[str] = field(default_factory=list)
    """Figures and tables that could not be made, and why, one line each."""


def write_probe_report(folder: Path) -> list[Path]:
    """Write CSV files, figures and tables into the folder of a probing run, and print what was left out.

    Args:
        folder: Folder with ``results.json`` and, optionally, ``pictures.npz``.

    Returns:
        The paths of the files: ``recalls.csv``, ``classes.csv``, ``sizes.csv``, ``figures/*`` (PNG, SVG, and data as
        CSV) and ``tables/*`` (Markdown and LaTeX).

    Raises:
        UserError: There are no results, or no results of probing.
    """
    folder = Path(folder)
    results = cast(Results, read_results(folder))
    if not measured(probe_runs(results)):
        raise UserError(f"{folder} holds no results of probing")
    arrays, reason = read_pictures(folder)
    report = probe_report(results, arrays)
    if reason:
        report.left_out.append(f"predictions: {reason}")
    paths = write_csv(results, folder)
    for drawing in report.drawings:
        paths += drawing.save(folder / "figures")
    for name, (caption, grid) in report.tables.items():
        paths += _write_grid(folder / "tables", name, caption, grid)
    for line in report.left_out:
        say(f"left out: {line}")
    return paths


def probe_report(results: ProbeResults, arrays: Pictures | None = None) -> ProbeReport:
    """Every figure and table that can be made from results of probing.

    Args:
        results: The content of ``results.json``.
        arrays: The content of ``pictures.npz``; None leaves the predictions out.
    """
    head, source = main_head(results), main_source(results)
    report = ProbeReport()
    for subject, drawing, reason in _drawings(results, head, source, arrays or {}):
        if drawing is not None:
            report.drawings.append(drawing)
        elif reason:
            report.left_out.append(f"{subject}: {reason}")
    report.tables["recall"] = (recall_caption(results), recall_grid(results))
    if comparisons(results):
        report.tables["comparison"] = comparison_table(results)
    locality = measure_locality(results, head)
    if locality.trend is not None:
        report.tables["relative_locality"] = (trend_sentence(locality), locality_grid(locality))
    else:
        reason = trend_sentence(locality).removeprefix("No trend: ").rstrip(".")
        report.left_out.append(f"relative locality: {reason}")
    return report


def _drawings(
    results: ProbeResults, head: str, source: str, arrays: Pictures
) -> Iterator[tuple[str, Drawing | None, str]]:
    """Subject, figure or None, and the reason for None."""
    yield "recall", tasks_drawing(results, head), "nothing was measured"
    yield "recall by head", heads_drawing(results), "it needs local recall of at least two heads"
    yield from _detailed(results, MetricKey(source, head, "local"))
    yield "local against global", locality_drawing(results, head), "it needs local and global recall"
    yield (
        "interventions",
        interventions_drawing(results),
        "it needs the heads transformer and transformer-anonymous or transformer-cls-only",
    )
    if arrays:
        yield (
            "predictions",
            predictions_drawing(arrays, display_names(results)),
            f"{PICTURES_FILE} has none",
        )


def _detailed(results: ProbeResults, key: MetricKey) -> Iterator[tuple[str, Drawing | None, str]]:
    pairs = comparisons(results)
    if not pairs:
        yield "gains by class", None, "it needs two backbones"
        name = next(iter(probe_runs(results)))
        single = BackbonePair(name, name, name, False)
        yield "recall by size", sizes_drawing(results, single, key), "object sizes were not measured"
        return
    for pair, suffix in list(zip(pairs, _file_suffixes(pairs), strict=True))[:MAX_DETAILED]:
        yield (
            f"gains by class, {pair.label}",
            classes_drawing(results, pair, key, f"classes{suffix}"),
            "no local recall by class on both sides",
        )
        yield (
            f"recall by size, {pair.label}",
            sizes_drawing(results, pair, key, f"sizes{suffix}"),
            "no local recall by size",
        )
    if len(pairs) > MAX_DETAILED:
        rest = ", ".join(pair.label for pair in pairs[MAX_DETAILED:])
        yield "gains by class and recall by size", None, f"drawn for the first {MAX_DETAILED}, not for {rest}"


def _file_suffixes(pairs: Sequence[BackbonePair]) -> list[str]:
    """Different endings for the file names of the pairs; an empty one if there is a single pair."""
    if len(pairs) == 1:
        return [""]
    suffixes: list[str] = []
    for pair in pairs:
        suffix = f"-{slug(pair.label)}"
        while suffix in suffixes:
            suffix += "-2"
        suffixes.append(suffix)
    return suffixes


# -- figures of the paper --------------------------------------------------------------------------------


def write_figure(
    name: str,
    results: ProbeResults,
    folder: Path,
    *,
    arrays: Pictures | None = None,
    views: Views | None = None,
) -> list[Path]:
    """Write one of the paper's figures.

    Args:
        name: fig3 (predictions), fig4 (recall), fig6 (heads), fig7 (classes), fig8 (sizes), fig9 (trend and
            interventions) or fig10 (masks and crops).
        results: The content of ``results.json``; fig10 uses none of it.
        folder: Folder of the files ``<name>*``.
        arrays: For fig3, the content of ``pictures.npz``; None reads the file in ``folder``.
        views: For fig10, images with masks and crops.

    Returns:
        The paths of the files.

    Raises:
        UserError: Unknown figure, or no data for it.
    """
    if name not in FIGURES:
        raise UserError(f"unknown figure {name!r}; known: {', '.join(FIGURES)}{did_you_mean(name, FIGURES)}")
    if name == "fig10":
        if views is None:
            raise UserError("fig10 needs images with masks and crops")
        candidates: list[Drawing | None] = [views_drawing(views, name)]
    else:
        if name == "fig3" and arrays is None:
            arrays, _ = read_pictures(Path(folder))
        candidates = _figure(name, results, arrays or {})
    drawings = [drawing for drawing in candidates if drawing is not None]
    if not drawings:
        raise UserError(f"the results hold no data for {name}")
    return [path for drawing in drawings for path in drawing.save(Path(folder))]


def _figure(name: str, results: ProbeResults, arrays: Pictures) -> list[Drawing | None]:
    head = main_head(results)
    key = MetricKey(main_source(results), head, "local")
    pairs = comparisons(results)
    suffixes = _file_suffixes(pairs)
    if name == "fig3":
        return [predictions_drawing(arrays, display_names(results), name)]
    if name == "fig4":
        return [tasks_drawing(results, head, name)]
    if name == "fig6":
        return [heads_drawing(results, name)]
    if name == "fig9":
        return [
            locality_drawing(results, head, "fig9-locality"),
            interventions_drawing(results, "fig9-interventions"),
        ]
    draw = classes_drawing if name == "fig7" else sizes_drawing
    return [draw(results, pair, key, name + suffix) for pair, suffix in zip(pairs, suffixes, strict=True)]


def _write_grid(folder: Path, name: str, caption: str, grid: Grid) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.md", folder / f"{name}.tex"]
    replace_text(paths[0], f"{caption}\n\n{to_markdown(grid)}")
    replace_text(paths[1], to_latex(grid, caption, f"tab:{name}"))
    return paths
