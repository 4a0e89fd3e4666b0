"""``report.html`` of a run folder, from the files that the folder has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from matplotlib.figure import Figure

from localign.engine.log import LOG_FILE, read_log
from localign.engine.run_folder import CONFIG_FILE, RESULTS_FILE, read_config, read_results
from localign.errors import UserError
from localign.files import replace_text
from localign.options.export import ReportConfig
from localign.report import captions, html, probepage
from localign.report.curves import heads_figure, training_figure
from localign.report.dumbbells import dumbbells
from localign.report.figures.predictions import predictions_figure
from localign.report.figures.tokens import features_figure, has_joint_basis, reconstructions_figure
from localign.report.picture_file import read_pictures
from localign.report.probing import probe_report
from localign.report.style import data_uri, png, svg
from localign.report.tables import rows as tables
from localign.report.tables.probe import convergence_grid
from localign.report.titles import title
from localign.results import PICTURES_FILE, LogEntry, Pictures, Results
from localign.text.printing import printable

REPORT_FILE = "report.html"
_FOLD_ABOVE = 40
"""Tables with more classes than this start folded."""
_MAX_TILES = 8
_FACTS = (
    "seeds", "world", "backbone", "soft_cap", "target_scale", "parameters", "trainable_parameters",
    "world_size", "final", "best", "skipped_steps", "samples_digest", "teacher_sha256",
)  # fmt: skip
_PREDICTIONS = ("truth", "class_names", "probability_baseline", "probability_aligned")
_FEATURES = ("pca_baseline", "pca_aligned", "pca_baseline_share", "pca_aligned_share")
_RECONSTRUCTIONS = ("keep_masks", "target", "reconstruction", "view_error", "mean_colour", "patch_size")
_COMMON = ("images", "grid")


@dataclass
class Run:
    """The content of a run folder."""

    folder: Path
    results: Results
    """``results.json``; the saved config of an unfinished run."""
    log: list[LogEntry]
    alignment: Results
    """Results of the alignment whose log is shown: of the run itself, or of the first alignment of a demo."""
    alignment_name: str
    """Folder of that alignment in a demo; empty if it is the run itself."""
    arrays: Pictures
    missing: list[str] = field(default_factory=list)
    """Parts that the report lacks, each with its reason, one line each."""


def run_report(config: ReportConfig) -> None:
    """Write the report of a run folder again.

    Raises:
        UserError: See :func:`build_report`.
    """
    print(f"report     {printable(build_report(Path(config.run)))}")


def build_report(run_folder: str | Path) -> Path:
    """Write ``report.html`` into a run folder. The page names the files that the folder lacks.

    Args:
        run_folder: A folder of ``localign demo``, ``align``, ``probe`` or ``reproduce``, with any of
            ``results.json``, ``log.jsonl``, ``align-seed<k>/`` and ``pictures.npz``.

    Returns:
        The path of the report.

    Raises:
        UserError: The folder holds no run, or its results are not JSON.
    """
    run = read_run(Path(run_folder))
    parts = _probing(run) if _is_probe(run) else [_recall(run), _pictures(run), _training(run), _classes(run)]
    body = [_head(run), *parts, _heads(run), _notes(run), _record(run)]
    path = run.folder / REPORT_FILE
    replace_text(path, html.page(title(run.results, run.folder.resolve().name), body))
    return path


def read_run(folder: Path) -> Run:
    """Read a run folder; see :func:`build_report`."""
    missing: list[str] = []
    if (folder / RESULTS_FILE).is_file():
        results = cast(Results, read_results(folder))
    elif (folder / CONFIG_FILE).is_file():
        results = cast(Results, read_config(folder))
        missing.append(f"{RESULTS_FILE}: the run has not finished, or it failed")
    else:
        raise UserError(f"{folder} is not a run folder: it has neither {RESULTS_FILE} nor {CONFIG_FILE}")
    aligned = folder if (folder / LOG_FILE).is_file() else _first_alignment(folder)
    log = cast("list[LogEntry]", read_log(aligned)) if aligned else []
    if not log and results.get("command") != "probe":
        missing.append(f"{LOG_FILE}: no curves of training")
    alignment, name = (results, "") if aligned == folder else (Results(), aligned.name if aligned else "")
    if aligned and name and (aligned / RESULTS_FILE).is_file():
        alignment = cast(Results, read_results(aligned))
    arrays, reason = read_pictures(folder)
    if reason:
        missing.append(f"{reason}: no pictures")
    return Run(folder, results, log, alignment, name, arrays, missing)


def _first_alignment(folder: Path) -> Path | None:
    def seed(path: Path) -> int:
        digits = path.name.removeprefix("align-seed")
        return int(digits) if digits.isdigit() else 1 << 30

    found = sorted((p for p in folder.glob("align-seed*") if p.is_dir()), key=seed)
    return found[0] if found else None


def _is_probe(run: Run) -> bool:
    return run.results.get("command") in ("probe", "reproduce") and bool(
        tables.measured(tables.probe_runs(run.results))
    )


# -- parts of the page -----------------------------------------------------------------------------------


def _head(run: Run) -> str:
    heading = f"<h1>{html.text(title(run.results, run.folder.resolve().name))}</h1>"
    further: list[str] = []
    if _is_probe(run):
        lead, tiles = probepage.headline(run.results), probepage.tiles(run.results)
        further = probepage.other_heads(run.results)
    else:
        rows = tables.before_after(run.results)
        lead = headline(run.results, rows, run.log)
        further = (
            [_sentence(row) for row in _main_rows(rows) if row.key.head != rows[0].key.head] if rows else []
        )
        tiles = [_tile(row) for row in _main_rows(rows)] if rows else _alignment_tiles(run)
    return heading + html.paragraph(lead, "lead") + html.bullets(further) + html.tiles(tiles[:_MAX_TILES])


def _probing(run: Run) -> list[str]:
    report = probe_report(run.results, run.arrays)
    run.missing += report.left_out
    return probepage.sections(report)


def headline(results: Results, rows: Sequence[tables.RecallRow], log: Sequence[LogEntry] = ()) -> str:
    """One or two sentences: what changed, by how much, and whether the change may be chance."""
    if rows:
        main = [row for row in _main_rows(rows) if row.key.head == rows[0].key.head]
        if main:
            return " ".join(_sentence(row) for row in main)
    losses = [e["loss"] for e in log if isinstance(e.get("loss"), (int, float))]
    final = (results.get("final") or {}).get("val_loss")
    parts = []
    if losses:
        parts.append(
            f"Training loss went from {losses[0]:.4g} to {losses[-1]:.4g} over {log[-1]['step']:,} steps."
        )
    if isinstance(final, (int, float)):
        parts.append(f"The loss on held-out images is {final:.4g} at the end.")
    return " ".join(parts) or "A run without results yet."


def _sentence(row: tables.RecallRow) -> str:
    recall = row.recall
    where = f"{row.key.task} macro recall ({row.key.head} head)"
    if recall.difference is None:
        return f"{where[0].upper()}{where[1:]} is {tables.percent(recall.baseline)}\u00a0%."
    points = f"{abs(100 * recall.difference):.1f} points"
    change = f"{'rose' if recall.difference >= 0 else 'fell'} by {points}"
    numbers = f"from {tables.percent(recall.baseline)}\u00a0% to {tables.percent(recall.aligned)}\u00a0%"
    chance = "one seed, so it may be chance"
    if recall.half_width is not None:
        over = f"{recall.seeds} seeds" if recall.seeds > 1 else "over images, one seed"
        chance = f"95\u00a0% interval ±\u00a0{100 * recall.half_width:.1f}, {over}"
        if abs(recall.difference) <= recall.half_width:
            chance += ", which includes no change"
    return f"{where[0].upper()}{where[1:]} {change}, {numbers} ({chance})."


def _main_rows(rows: Sequence[tables.RecallRow]) -> list[tables.RecallRow]:
    """Rows of the first source, for local and global recall."""
    source = rows[0].key.source
    return [row for row in rows if row.key.source == source and row.key.task in ("local", "global")]


def _tile(row: tables.RecallRow) -> html.Tile:
    recall, title = row.recall, f"{row.key.task} recall, {row.key.head}"
    if recall.difference is None:
        return html.Tile(title, f"{tables.percent(recall.baseline)} %", "macro recall")
    value = f"{tables.percent(recall.baseline)} → {tables.percent(recall.aligned)} %"
    return html.Tile(title, value, f"{tables.signed(recall)} points")


def _alignment_tiles(run: Run) -> list[html.Tile]:
    results = run.results
    facts = (
        (results.get("steps"), "steps", "{:,}", "optimizer steps"),
        (results.get("images"), "images", "{:,}", "samples seen"),
        (results.get("images_per_second"), "images per second", "{:,.0f}", "mean over training"),
        (results.get("seconds"), "training time", "{:,.0f} s", "without validation and saving"),
    )
    return [
        html.Tile(title, form.format(value), remark)
        for value, title, form, remark in facts
        if isinstance(value, (int, float))
    ]


def _recall(run: Run) -> str:
    rows = tables.before_after(run.results)
    if not rows:
        return ""
    both = any(row.recall.aligned is not None for row in rows)
    return html.section(
        "Before and after" if both else "Recall",
        tables.to_html(tables.recall_grid(rows)),
        html.paragraph(f"{captions.RECALL} {tables.interval_sentence(rows)}", "muted"),
    )


def _pictures(run: Run) -> str:
    if not run.arrays:
        return ""
    names = [str(n) for n in run.arrays.get("class_names", ())]
    loss = str((run.alignment.get("config") or {}).get("loss", "mse"))
    one_token = "target" in run.arrays and run.arrays["target"].ndim == 3
    parts = (
        ("predictions per patch", _PREDICTIONS, predictions_figure, captions.predictions(names)),
        (
            "maps of patch features",
            _FEATURES,
            features_figure,
            captions.features(has_joint_basis(run.arrays)),
        ),
        (
            "reconstructions",
            _RECONSTRUCTIONS,
            reconstructions_figure,
            captions.reconstructions(loss, one_token),
        ),
    )
    return html.section("Pictures", *(_picture(run, *part) for part in parts))


def _picture(
    run: Run,
    subject: str,
    needed: Sequence[str],
    draw: Callable[[Pictures], Figure],
    words: captions.Words,
) -> str:
    lacking = [name for name in (*_COMMON, *needed) if name not in run.arrays]
    if lacking:
        run.missing.append(f"{subject}: {PICTURES_FILE} has no {', '.join(lacking)}")
        return ""
    return html.figure(data_uri(png(draw(run.arrays)), "image/png"), *words)


def _training(run: Run) -> str:
    cap = run.alignment.get("soft_cap")
    figure = training_figure(run.log, float(cap) if isinstance(cap, (int, float)) else None)
    if figure is None:
        return ""
    uri = data_uri(svg(figure), "image/svg+xml")
    return html.section("Alignment", html.figure(uri, *captions.training(run.alignment_name)))


def _heads(run: Run) -> str:
    runs = tables.probe_runs(run.results)
    curves = {
        name: [outcome.get("train", {}).get("curve") or [] for outcome in outcomes]
        for name, outcomes in runs.items()
    }
    figure = heads_figure(curves)
    if figure is None:
        return ""
    uri = data_uri(svg(figure), "image/svg+xml")
    outcomes = [outcome for seeds in runs.values() for outcome in seeds]
    until = any(outcome.get("config", {}).get("until_converged") for outcome in outcomes)
    verdicts = convergence_grid(run.results)
    table = [tables.to_html(verdicts)] if verdicts.rows else []
    words = captions.heads(until_converged=until)
    return html.section("Did the heads converge?", *table, html.figure(uri, *words))


def _classes(run: Run) -> str:
    rows = tables.before_after(run.results)
    parts = []
    for task, unit in (("local", "patches"), ("global", "images"), ("majority", "patches")):
        row = next((row for row in rows if row.key.task == task), None)
        classes = tables.per_class(run.results, row) if row else []
        if row and classes:
            heading = f"{tables.TASK_NAMES[task]}, {row.key.head} head, {len(classes)} classes: recall in %"
            content = dumbbells(classes) + tables.to_html(tables.class_grid(classes, unit))
            parts.append(
                html.folded(heading, content, is_open=task == "local" and len(classes) <= _FOLD_ABOVE)
            )
    return html.section("Class by class", *parts)


def _notes(run: Run) -> str:
    notes = [str(n) for n in run.results.get("notes") or []]
    missing = [html.paragraph("Not in this report:"), html.bullets(run.missing)] if run.missing else []
    return html.section("Notes", html.bullets(notes), *missing)


def _record(run: Run) -> str:
    results = run.results
    timings = {name: f"{seconds:.1f} s" for name, seconds in (results.get("timings") or {}).items()}
    facts = {name: results.get(name) for name in _FACTS if results.get(name) is not None}
    parts: tuple[tuple[str, Mapping[str, Any], bool], ...] = (
        ("Timings", timings, True),
        ("Facts", facts, False),
        ("Configuration", results.get("config") or {}, False),
        (f"Configuration of {run.alignment_name}", _inner_config(run), False),
        ("Versions", results.get("versions") or {}, True),
    )
    folded = (html.folded(title, html.facts(values), is_open) for title, values, is_open in parts if values)
    return html.section("Record", *folded)


def _inner_config(run: Run) -> dict[str, Any]:
    return dict(run.alignment.get("config") or {}) if run.alignment_name else {}
