"""Everything that a probing run's folder is given: CSV files, figures, and tables with published numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

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
from localign.report.figures.patches import predictions_drawing
from localign.report.figures.sizes import sizes_drawing
from localign.report.figures.views import views_drawing
from localign.report.gather import PICTURES_FILE, read_pictures
from localign.report.tables.csvfiles import write_csv
from localign.report.tables.latex import to_latex
from localign.report.tables.measures import (
    BackbonePair,
    Measured,
    comparisons,
    display_names,
    main_head,
    main_source,
)
from localign.report.tables.probe import comparison_table, recall_caption, recall_grid
from localign.report.tables.rows import Grid, measured, probe_runs, to_markdown

Results = Mapping[str, Any]
FIGURES = ("fig3", "fig4", "fig6", "fig7", "fig8", "fig9", "fig10")
MAX_DETAILED = 6
"""Comparisons that get figures by class and by size; all are in the CSV files."""


@dataclass
class ProbeReport:
    """What results were drawn as, and what was left out."""

    drawings: list[Drawing] = field(default_factory=list)
    tables: dict[str, tuple[str, Grid]] = field(default_factory=dict)
    """Name to caption and table."""
    left_out: list[str] = field(default_factory=list)
    """One line each: what, and why."""


def write_probe_report(folder: Path) -> list[Path]:
    """Write CSV files, figures and tables beside a probing run's results, and say what was left out.

    Args:
        folder: Holds ``results.json`` and maybe ``pictures.npz``.

    Returns:
        The files: ``recalls.csv``, ``classes.csv``, ``sizes.csv``, ``figures/*`` (PNG, SVG, and the data of each
        as CSV) and ``tables/*`` (Markdown and LaTeX).

    Raises:
        UserError: no results, or none of probing.
    """
    folder = Path(folder)
    results = read_results(folder)
    if not isinstance(results, dict) or not measured(probe_runs(results)):
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


def probe_report(results: Results, arrays: Mapping[str, NDArray[Any]] | None = None) -> ProbeReport:
    """Every figure and table that results of probing allow.

    Args:
        results: As in ``results.json``.
        arrays: As in ``pictures.npz``; empty for none.
    """
    head, source = main_head(results), main_source(results)
    report = ProbeReport()
    for what, drawing, reason in _drawings(results, head, source, arrays or {}):
        if drawing is not None:
            report.drawings.append(drawing)
        elif reason:
            report.left_out.append(f"{what}: {reason}")
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
    results: Results, head: str, source: str, arrays: Mapping[str, NDArray[Any]]
) -> Iterator[tuple[str, Drawing | None, str]]:
    """What, the figure or None, and why there is none."""
    yield "recall", tasks_drawing(results, head), "nothing was measured"
    yield "recall by head", heads_drawing(results), "it takes local recall of at least two heads"
    yield from _detailed(results, Measured(source, head, "local"))
    yield "local against global", locality_drawing(results, head), "it takes local and global recall"
    yield (
        "interventions",
        interventions_drawing(results),
        "it takes the heads transformer and transformer-anonymous or transformer-cls-only",
    )
    if arrays:
        yield (
            "predictions",
            predictions_drawing(arrays, display_names(results)),
            f"{PICTURES_FILE} holds none",
        )


def _detailed(results: Results, what: Measured) -> Iterator[tuple[str, Drawing | None, str]]:
    pairs = comparisons(results)
    if not pairs:
        yield "gains by class", None, "it takes two backbones"
        name = next(iter(probe_runs(results)))
        alone = BackbonePair(name, name, name, False)
        yield "recall by size", sizes_drawing(results, alone, what), "object sizes were not told apart"
        return
    names = _file_names(pairs)
    for pair, tail in list(zip(pairs, names, strict=True))[:MAX_DETAILED]:
        yield (
            f"gains by class, {pair.label}",
            classes_drawing(results, pair, what, f"classes{tail}"),
            "no local recall by class on both sides",
        )
        yield (
            f"recall by size, {pair.label}",
            sizes_drawing(results, pair, what, f"sizes{tail}"),
            "no local recall by size",
        )
    if len(pairs) > MAX_DETAILED:
        rest = ", ".join(p.label for p in pairs[MAX_DETAILED:])
        yield "gains by class and recall by size", None, f"drawn for the first {MAX_DETAILED}, not for {rest}"


def _file_names(pairs: Sequence[BackbonePair]) -> list[str]:
    """Tails of file names, different ones; none for a lone comparison."""
    if len(pairs) == 1:
        return [""]
    tails: list[str] = []
    for pair in pairs:
        tail = f"-{slug(pair.label)}"
        while tail in tails:
            tail += "-2"
        tails.append(tail)
    return tails


# -- figures of the paper --------------------------------------------------------------------------------


def write_figure(
    name: str,
    results: Results,
    folder: Path,
    *,
    arrays: Mapping[str, NDArray[Any]] | None = None,
    images: Any = None,
    grid: tuple[int, int] | None = None,
    seed: int = 0,
) -> list[Path]:
    """Write one of the paper's figures.

    Args:
        name: fig3 (predictions), fig4 (recall), fig6 (heads), fig7 (classes), fig8 (sizes), fig9 (trend and
            interventions) or fig10 (masks and crops).
        results: As in ``results.json``; fig10 needs none.
        folder: Where ``<name>*.png`` and the rest go.
        arrays: Of fig3, as in ``pictures.npz``; read from the folder where missing.
        images: Of fig10, uint8 ``(k, 3, H, W)``.
        grid: Of fig10, rows and columns of patches.
        seed: Of fig10's masks and crops.

    Returns:
        The files.

    Raises:
        UserError: unknown figure, or nothing to draw it from.
    """
    if name not in FIGURES:
        raise UserError(f"unknown figure {name!r}; known: {', '.join(FIGURES)}{did_you_mean(name, FIGURES)}")
    if name == "fig10":
        if images is None or grid is None:
            raise UserError("fig10 needs images and their grid of patches")
        found: list[Drawing | None] = [views_drawing(images, grid, seed=seed, name=name)]
    else:
        if name == "fig3" and arrays is None:
            arrays, _ = read_pictures(Path(folder))
        found = _figure(name, results, arrays or {})
    drawings = [drawing for drawing in found if drawing is not None]
    if not drawings:
        raise UserError(f"these results hold nothing that {name} could be drawn from")
    return [path for drawing in drawings for path in drawing.save(Path(folder))]


def _figure(name: str, results: Results, arrays: Mapping[str, NDArray[Any]]) -> list[Drawing | None]:
    head = main_head(results)
    what = Measured(main_source(results), head, "local")
    pairs = comparisons(results)
    tails = _file_names(pairs)
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
    return [draw(results, pair, what, name + tail) for pair, tail in zip(pairs, tails, strict=True)]


def _write_grid(folder: Path, name: str, caption: str, grid: Grid) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.md", folder / f"{name}.tex"]
    replace_text(paths[0], f"{caption}\n\n{to_markdown(grid)}")
    replace_text(paths[1], to_latex(grid, caption, f"tab:{name}"))
    return paths
