"""Tables 1, 4 and 5 of the paper: our rows with intervals, the published numbers in columns of their own."""

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
    Measured,
    change,
    estimate,
    main_head,
    main_source,
)
from localign.report.tables.published import TABLE1, TABLE4, TABLE5, PaperRow, Recall
from localign.report.tables.rows import HEAD_NAMES, Grid, to_markdown

Rows = Mapping[str, Sequence[Mapping[str, Any]]]
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
    rows: Rows,
    folder: Path,
    *,
    data: str = "coco",
    differences: Sequence[Mapping[str, Any]] = (),
    note: str = "",
) -> list[Path]:
    """Write one of the paper's tables as Markdown, LaTeX and CSV.

    Args:
        name: table1, table4 or table5.
        rows: Row key (``table1/clipself``) to probe outcomes, one per seed. Rows of the paper that are missing
            show their published numbers alone; rows unknown to the paper are appended.
        folder: Where ``<name>.md``, ``.tex`` and ``.csv`` go.
        data: What the rows were probed on; the caption says that published numbers are of COCO.
        differences: Paired bootstrap differences as in ``results.json``, with row keys as names; where there
            are none, differences are paired over seeds.
        note: What else a reader should know; ends the caption.

    Returns:
        The files.

    Raises:
        UserError: unknown table, or a row of another table.
    """
    if name not in TABLES:
        raise UserError(f"unknown table {name!r}; known: {', '.join(TABLES)}{did_you_mean(name, TABLES)}")
    for key in rows:
        if not key.startswith(f"{name}/"):
            raise UserError(f"{key!r} is no row of {name}; its rows are called {name}/...")
    results = {"probe": dict(rows), "differences": list(differences)}
    make = _table5 if name == "table5" else _method_table
    grid, lines = make(name, results)
    text = caption(name, results, data, note)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("md", "tex", "csv")]
    replace_text(paths[0], f"{text}\n\n{to_markdown(grid)}")
    replace_text(paths[1], to_latex(grid, text, f"tab:{name}"))
    replace_text(paths[2], to_csv(_CSV, lines))
    return paths


def caption(name: str, results: Mapping[str, Any], data: str, note: str = "") -> str:
    """What the numbers of a table are."""
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
        ours += f"those of differences (points) are {' or '.join(kinds[o] for o in sorted(sampled))}. "
    else:
        ours += "differences are in points. "
    published = "Published: COCO-Stuff, 183 classes, one run each, without intervals"
    if data != "coco":
        published += (
            "; those are other data than ours, so only signs and orders compare, and rows are named after the "
            "paper's settings"
        )
    return f"{ours}{published}.{' ' + note if note else ''}"


def _changes(name: str, results: Mapping[str, Any]) -> list[Change]:
    source, head = main_source(results), main_head(results)
    found = []
    for key in results["probe"]:
        against = _against(name, key)
        for task in _TASKS:
            one = change(results, against, key, Measured(source, head, task)) if against != key else None
            found += [one] if one else []
    return found


def _against(name: str, key: str) -> str:
    """The row that a row's difference is taken to."""
    slug = key.split("/", 1)[1]
    if name == "table5":
        return key if slug.endswith(BASELINE_SUFFIX) else key + BASELINE_SUFFIX
    known = {"table1": TABLE1, "table4": TABLE4}[name].get(slug)
    return f"{name}/{known.teacher if known else 'teacher'}"


# -- tables 1 and 4 --------------------------------------------------------------------------------------


def _method_table(name: str, results: Mapping[str, Any]) -> tuple[Grid, list[tuple[Any, ...]]]:
    paper = {"table1": TABLE1, "table4": TABLE4}[name]
    runs = results["probe"]
    slugs = [s for s, row in paper.items() if f"{name}/{s}" in runs or not row.optional]
    slugs += [key.split("/", 1)[1] for key in runs if key.split("/", 1)[1] not in paper]
    body: list[tuple[str, ...]] = []
    lines: list[tuple[Any, ...]] = []
    groups: list[int] = []
    block: str | None = None
    for slug in slugs:
        row = paper.get(slug, PaperRow(slug, "not in the paper"))
        key = f"{name}/{slug}"
        ours = [_ours(results, key, _against(name, key), task) for task in _TASKS]
        if row.block != block:
            groups.append(len(body))
        body.append(
            (
                row.block if row.block != block else "",
                row.label,
                *(_estimate(e) for e, _ in ours),
                *(_change(c) for _, c in ours),
                *_published(row.recall, row.remark),
            )
        )
        block = row.block
        for i, (task, (found, moved)) in enumerate(zip(_TASKS, ours, strict=True)):
            number = row.recall[i] if row.recall else None
            against = _against(name, key) if moved else None
            lines.append(
                _csv_line((slug, row.label, row.block, task), found, against, moved, number, row.remark)
            )
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


def _table5(name: str, results: Mapping[str, Any]) -> tuple[Grid, list[tuple[Any, ...]]]:
    runs = results["probe"]
    named = [key.split("/", 1)[1].removesuffix(BASELINE_SUFFIX) for key in runs]
    slugs = [*(s for s in dict.fromkeys(named) if s not in TABLE5), *TABLE5]
    body: list[tuple[str, ...]] = []
    lines: list[tuple[Any, ...]] = []
    groups: list[int] = []
    block: str | None = None
    for slug in slugs:
        paper = TABLE5.get(slug)
        label, supervision = (paper.label, paper.supervision) if paper else (slug, "not in the paper")
        keys = (f"{name}/{slug}{BASELINE_SUFFIX}", f"{name}/{slug}")
        cells: list[str] = []
        theirs: list[str] = []
        for i, task in enumerate(_TASKS):
            before, _ = _ours(results, keys[0], keys[0], task)
            after, moved = _ours(results, keys[1], keys[0], task)
            cells += [_estimate(before), _estimate(after), _change(moved)]
            theirs += (
                _pair(paper.baseline[i], paper.aligned[i], paper.difference[i]) if paper else [_NONE] * 2
            )
            for key, found, step, number in (
                (keys[0], before, None, paper.baseline[i] if paper else None),
                (keys[1], after, moved, paper.aligned[i] if paper else None),
            ):
                against = keys[0] if step else None
                start = (key.split("/", 1)[1], label, supervision, task)
                lines.append(_csv_line(start, found, against, step, number, ""))
        if supervision != block:
            groups.append(len(body))
        body.append((supervision if supervision != block else "", label, *cells, *theirs))
        block = supervision
    header = (
        "supervision", "backbone",
        *(f"{task} {column}" for task in _TASKS for column in ("before", "after", "difference")),
        *(f"published {task}{column}" for task in _TASKS for column in (", before to after", " difference")),
    )  # fmt: skip
    return Grid(header, tuple(body), texts=2, groups=tuple(groups)), lines


def _pair(before: float, after: float, difference: float) -> list[str]:
    return [f"{before:.2f} → {after:.2f}", f"{difference:+.2f}".replace("-", "\u2212")]


# -- cells -----------------------------------------------------------------------------------------------


def _ours(
    results: Mapping[str, Any], key: str, against: str, task: str
) -> tuple[Estimate | None, Change | None]:
    what = Measured(main_source(results), main_head(results), task)
    runs = results["probe"]
    found = estimate(runs.get(key, ()), what)
    moved = change(results, against, key, what) if found and key != against and runs.get(against) else None
    return found, moved


def _estimate(found: Estimate | None) -> str:
    if found is None:
        return _NONE
    text = f"{100 * found.value:.2f}"
    if found.interval is None:
        return text
    low, high = found.interval
    return f"{text} [{100 * low:.2f}, {100 * high:.2f}]"


def _change(found: Change | None) -> str:
    if found is None:
        return _NONE
    text = f"{100 * found.value:+.2f}"
    if found.interval is not None:
        low, high = found.interval
        text += f" [{100 * low:+.2f}, {100 * high:+.2f}]"
    return text.replace("-", "\u2212")


def _csv_line(
    start: tuple[str, str, str, str],
    found: Estimate | None,
    against: str | None,
    moved: Change | None,
    number: float | None,
    remark: str,
) -> tuple[Any, ...]:
    low, high = (found.interval if found else None) or (None, None)
    ours = (len(found.seeds), found.value, low, high) if found else (0, None, None, None)
    bounds = (moved.interval if moved else None) or (None, None)
    step = (moved.value, *bounds, moved.over) if moved else (None, None, None, None)
    return (*start, *ours, against, *step, number, remark)
