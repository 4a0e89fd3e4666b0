"""Tables 1, 4 and 5 of the paper: our rows with intervals, and the published numbers in columns of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localign.errors import UserError, did_you_mean
from localign.files import replace_text
from localign.report.figures.drawing import to_csv
from localign.report.tables.latex import to_latex
from localign.report.tables.measures import (
    BASELINE_SUFFIX,
    Change,
    Estimate,
    change,
    estimate,
    main_head,
    main_source,
    percent_cell,
)
from localign.report.tables.published import TABLE1, TABLE4, TABLE5, PaperRow, Recall
from localign.report.tables.rows import HEAD_NAMES, Grid, MetricKey, probe_runs, to_markdown
from localign.results import ProbeOutcome, ProbeResults, RecallDifference

CsvLine = tuple[Any, ...]
TABLES = ("table1", "table4", "table5")
_TITLES = {
    "table1": "MaskEmbed and CLIPSelf",
    "table4": "Ablations of MaskEmbed",
    "table5": "Local and global probing before and after locality alignment",
}
_TASKS = ("local", "global")
_NONE = "–"
_CSV = (
    "row", "label", "block", "task", "seeds", "macro_recall", "low", "high", "against", "difference",
    "difference_low", "difference_high", "difference_over", "published_percent", "published_remark",
)  # fmt: skip


def write_table(
    name: str,
    rows: Mapping[str, Sequence[ProbeOutcome]],
    folder: Path,
    *,
    data: str = "coco",
    differences: Sequence[RecallDifference] = (),
    note: str = "",
) -> list[Path]:
    """Write one of the paper's tables as Markdown, LaTeX and CSV.

    Args:
        name: table1, table4 or table5.
        rows: Row key (``table1/clipself``) to probe outcomes, one per seed. Rows of the paper that are missing here
            show their published numbers only; rows that are not in the paper are added.
        folder: Folder of ``<name>.md``, ``.tex`` and ``.csv``.
        data: Name of the data the rows were probed on; the caption says that published numbers are on COCO.
        differences: Paired bootstrap differences as in ``results.json``, with row keys as names. Other differences
            are paired over seeds.
        note: A sentence to end the caption with.

    Returns:
        The paths of the files.

    Raises:
        UserError: Unknown table, or a row of another table.
    """
    if name not in TABLES:
        raise UserError(f"unknown table {name!r}; known: {', '.join(TABLES)}{did_you_mean(name, TABLES)}")
    for key in rows:
        if not key.startswith(f"{name}/"):
            raise UserError(f"{key!r} is no row of {name}; rows of {name} are named {name}/...")
    results: ProbeResults = {
        "probe": {key: list(outcomes) for key, outcomes in rows.items()},
        "differences": list(differences),
    }
    grid, lines = _table5(results) if name == "table5" else _method_table(name, results)
    text = caption(name, results, data, note)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("md", "tex", "csv")]
    replace_text(paths[0], f"{text}\n\n{to_markdown(grid)}")
    replace_text(paths[1], to_latex(grid, text, f"tab:{name}"))
    replace_text(paths[2], to_csv(_CSV, lines))
    return paths


def caption(name: str, results: ProbeResults, data: str, note: str = "") -> str:
    """The caption of a table: title, unit, data, seeds, intervals, and the source of the published numbers."""
    head = main_head(results) or "transformer"
    source = main_source(results)
    split = f" ({source} split)" if source else ""
    seeds = sorted({len(side) for side in results["probe"].values() if side})
    over = ""
    if seeds[-1:] > [1]:
        over = f", means over {' to '.join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1])))} seeds"
    ours = (
        f"{_TITLES[name]}. Macro recall in %, {HEAD_NAMES.get(head, head)}; ours: {data}{split}{over}. "
        "In brackets 95 % bootstrap intervals over images; "
    )
    changes = [c for c in _changes(name, results) if c.interval]
    sampled = {c.over for c in changes}
    kinds = {"images": "of the paired bootstrap over images", "seeds": "of the paired t over seeds"}
    if sampled:
        ours += f"intervals of differences (points) are {' or '.join(kinds[o] for o in sorted(sampled))}. "
    else:
        ours += "differences are in points. "
    published = "Published: COCO-Stuff, 183 classes, one run each, without intervals"
    if data != "coco":
        published += (
            "; our data differ from COCO-Stuff, so only signs and orders compare, and rows are named after the "
            "paper's settings"
        )
    return f"{ours}{published}.{' ' + note if note else ''}"


def _changes(name: str, results: ProbeResults) -> list[Change]:
    """All differences of the table."""
    cells = (_ours(results, key, _against(name, key), task) for key in results["probe"] for task in _TASKS)
    return [difference for _, difference in cells if difference is not None]


def _against(name: str, key: str) -> str:
    """The row to which a row's difference is taken; a row of table 5 before alignment gives itself."""
    slug = key.split("/", 1)[1]
    if name == "table5":
        return key if slug.endswith(BASELINE_SUFFIX) else key + BASELINE_SUFFIX
    known = {"table1": TABLE1, "table4": TABLE4}[name].get(slug)
    return f"{name}/{known.teacher if known else 'teacher'}"


# -- tables 1 and 4 --------------------------------------------------------------------------------------


def _method_table(name: str, results: ProbeResults) -> tuple[Grid, list[CsvLine]]:
    paper = {"table1": TABLE1, "table4": TABLE4}[name]
    runs = results["probe"]
    slugs = [s for s, row in paper.items() if f"{name}/{s}" in runs or not row.optional]
    slugs += [key.split("/", 1)[1] for key in runs if key.split("/", 1)[1] not in paper]
    body: list[tuple[str, ...]] = []
    lines: list[CsvLine] = []
    groups: list[int] = []
    block: str | None = None
    for slug in slugs:
        row = paper.get(slug, PaperRow(slug, "not in the paper"))
        key = f"{name}/{slug}"
        against = _against(name, key)
        ours = [_ours(results, key, against, task) for task in _TASKS]
        if row.block != block:
            groups.append(len(body))
        body.append(
            (
                row.block if row.block != block else "",
                row.label,
                *(percent_cell(recall, 2) for recall, _ in ours),
                *(percent_cell(difference, 2) for _, difference in ours),
                *_published(row.recall, row.remark),
            )
        )
        block = row.block
        for i, (task, (recall, difference)) in enumerate(zip(_TASKS, ours, strict=True)):
            start = (slug, row.label, row.block, task)
            number = row.recall[i] if row.recall else None
            lines.append(_csv_line(start, recall, against, difference, number, row.remark))
    header = (
        {"table1": "views", "table4": "ablated"}[name], "row",
        "local", "global", "local, to teacher", "global, to teacher", "published local", "published global",
    )  # fmt: skip
    return Grid(header, tuple(body), texts=2, groups=tuple(groups)), lines


def _published(recall: Recall | None, remark: str) -> tuple[str, str]:
    if recall is None:
        return (remark or _NONE, remark or _NONE)
    return (f"{recall.local:.2f}", f"{recall.global_:.2f}")


# -- table 5 ---------------------------------------------------------------------------------------------


def _table5(results: ProbeResults) -> tuple[Grid, list[CsvLine]]:
    named = [key.split("/", 1)[1].removesuffix(BASELINE_SUFFIX) for key in results["probe"]]
    slugs = [*(s for s in dict.fromkeys(named) if s not in TABLE5), *TABLE5]
    body: list[tuple[str, ...]] = []
    lines: list[CsvLine] = []
    groups: list[int] = []
    block: str | None = None
    for slug in slugs:
        paper = TABLE5.get(slug)
        label, supervision = (paper.label, paper.supervision) if paper else (slug, "not in the paper")
        baseline_key, aligned_key = f"table5/{slug}{BASELINE_SUFFIX}", f"table5/{slug}"
        ours: list[str] = []
        published: list[str] = []
        for i, task in enumerate(_TASKS):
            before, _ = _ours(results, baseline_key, baseline_key, task)
            after, difference = _ours(results, aligned_key, baseline_key, task)
            ours += [percent_cell(recall, 2) for recall in (before, after, difference)]
            published += (
                _published_pair(paper.baseline[i], paper.aligned[i], paper.difference[i])
                if paper
                else [_NONE] * 2
            )
            for row, recall, to_baseline, number in (
                (slug + BASELINE_SUFFIX, before, None, paper.baseline[i] if paper else None),
                (slug, after, difference, paper.aligned[i] if paper else None),
            ):
                start = (row, label, supervision, task)
                lines.append(_csv_line(start, recall, baseline_key, to_baseline, number, ""))
        if supervision != block:
            groups.append(len(body))
        body.append((supervision if supervision != block else "", label, *ours, *published))
        block = supervision
    header = (
        "supervision", "backbone",
        *(f"{task} {column}" for task in _TASKS for column in ("before", "after", "difference")),
        *(f"published {task}{column}" for task in _TASKS for column in (", before to after", " difference")),
    )  # fmt: skip
    return Grid(header, tuple(body), texts=2, groups=tuple(groups)), lines


def _published_pair(before: float, after: float, difference: float) -> list[str]:
    return [f"{before:.2f} → {after:.2f}", f"{difference:+.2f}".replace("-", "\u2212")]


# -- cells -----------------------------------------------------------------------------------------------


def _ours(results: ProbeResults, row: str, against: str, task: str) -> tuple[Estimate | None, Change | None]:
    """Recall of a row and its difference to another row; None where a row was not run."""
    key = MetricKey(main_source(results), main_head(results), task)
    runs = probe_runs(results)
    recall = estimate(runs.get(row, ()), key)
    if recall is None or row == against or against not in runs:
        return recall, None
    return recall, change(results, against, row, key)


def _csv_line(
    start: tuple[str, str, str, str],
    recall: Estimate | None,
    against: str,
    difference: Change | None,
    number: float | None,
    remark: str,
) -> CsvLine:
    ours: CsvLine = (0, None, None, None)
    if recall is not None:
        ours = (len(recall.seeds), recall.value, *(recall.interval or (None, None)))
    gain: CsvLine = (None, None, None, None, None)
    if difference is not None:
        gain = (against, difference.value, *(difference.interval or (None, None)), difference.over)
    return (*start, *ours, *gain, number, remark)
