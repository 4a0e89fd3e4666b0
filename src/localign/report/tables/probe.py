"""Tables of a probing run: all recalls, and comparisons beside the published numbers of the same backbone."""

from __future__ import annotations

from collections.abc import Sequence

from localign.report.tables.measures import (
    NOT_CONVERGED_NOTE,
    BackbonePair,
    change,
    comparisons,
    display_names,
    estimate,
    main_head,
    main_source,
    percent_cell,
    unconverged,
)
from localign.report.tables.published import TABLE5
from localign.report.tables.rows import (
    HEAD_NAMES,
    TASK_NAMES,
    Grid,
    MetricKey,
    class_names,
    measured,
    percent,
    probe_runs,
)
from localign.results import ProbeResults, all_converged

_PUBLISHED_CLASSES = 183
"""Classes of COCO-Stuff, the data set of the published numbers."""


def recall_grid(results: ProbeResults) -> Grid:
    """Macro recall of every backbone, head and task of the main source, in percent with intervals."""
    keys, names = _main_keys(results), display_names(results)
    body = []
    for name, outcomes in probe_runs(results).items():
        body.append((names[name], *(percent_cell(estimate(outcomes, key)) for key in keys)))
    header = ("backbone", *(f"{key.task}, {HEAD_NAMES.get(key.head, key.head)}" for key in keys))
    return Grid(header, tuple(body))


def _main_keys(results: ProbeResults) -> list[MetricKey]:
    source = main_source(results)
    return [key for key in measured(probe_runs(results)) if key.source == source]


def recall_caption(results: ProbeResults) -> str:
    """The caption of the recall table: units, source, seeds, intervals and protocol."""
    runs, keys = probe_runs(results), _main_keys(results)
    seeds = max(len(outcomes) for outcomes in runs.values())
    over = f", means over {seeds} seeds" if seeds > 1 else ""
    estimates = [estimate(outcomes, key) for outcomes in runs.values() for key in keys]
    has_intervals = any(recall is not None and recall.interval for recall in estimates)
    brackets = "; in brackets 95 % bootstrap intervals over images" if has_intervals else ""
    published = any(o.get("protocol") == "published" for outcomes in runs.values() for o in outcomes)
    protocol = (
        " Published protocol: each head's best epoch on this split is reported, which overstates recall."
        if published
        else ""
    )
    return f"Macro recall in %, {main_source(results)} split{over}{brackets}.{protocol}{_still_learning(results)}"


def _still_learning(results: ProbeResults) -> str:
    names = unconverged(results)
    return f" Heads that had not converged: {', '.join(names)}." if names else ""


def convergence_grid(results: ProbeResults) -> Grid:
    """Whether each head has converged, and its optimizer steps; no rows where results do not say."""
    names, body = display_names(results), []
    for name, outcomes in probe_runs(results).items():
        for key in (key for key in _main_keys(results) if key in measured({name: outcomes})):
            verdict = all_converged(outcomes, key.head, key.task)
            if verdict is None:
                continue
            steps = [o["train"]["convergence"][key.head][key.task]["steps"] for o in outcomes]
            head = HEAD_NAMES.get(key.head, key.head)
            body.append((names[name], head, key.task, "yes" if verdict else "no", f"{max(steps):,}"))
    return Grid(("backbone", "head", "task", "converged", "steps"), tuple(body), texts=4)


def comparison_table(results: ProbeResults) -> tuple[str, Grid]:
    """Caption and table of all comparisons: both backbones, the difference, and published numbers by name."""
    source, head = main_source(results), main_head(results)
    runs, pairs = probe_runs(results), comparisons(results)
    known_keys = set(measured(runs))
    keys = [key for task in TASK_NAMES if (key := MetricKey(source, head, task)) in known_keys]
    tasks = [key.task for key in keys]
    coco = len(class_names(results)) == _PUBLISHED_CLASSES
    known = [TABLE5.get(pair.label) if coco and pair.aligned else None for pair in pairs]
    body = []
    for pair, paper in zip(pairs, known, strict=True):
        row = [pair.label]
        for key in keys:
            for name in (pair.before, pair.after):
                recall = estimate(runs[name], key)
                row.append(percent(recall.value if recall else None))
            row.append(percent_cell(change(results, pair.before, pair.after, key)))
        if any(known):
            row += [f"{paper.baseline[i]:.2f} → {paper.aligned[i]:.2f}" if paper else "–" for i in range(2)]
        body.append(tuple(row))
    sides = ("before", "after") if pairs[0].aligned else (pairs[0].before, "backbone")
    header = ["backbone", *(f"{task}, {column}" for task in tasks for column in (*sides, "difference"))]
    header += ["published local", "published global"] if any(known) else []
    caption = (
        f"Macro recall in %, {HEAD_NAMES.get(head, head)}, {source} split; differences in points, "
        f"{_intervals_sentence(results, pairs, keys)}."
    )
    if unconverged(results):
        caption += f" {NOT_CONVERGED_NOTE}"
    return caption, Grid(tuple(header), tuple(body))


def _intervals_sentence(
    results: ProbeResults, pairs: Sequence[BackbonePair], keys: Sequence[MetricKey]
) -> str:
    differences = [change(results, pair.before, pair.after, key) for pair in pairs for key in keys]
    kinds = {d.over for d in differences if d is not None and d.over}
    methods = {"images": "paired bootstrap over images", "seeds": "paired t over seeds"}
    if not kinds:
        return "without intervals (one seed, and no bootstrap)"
    return f"in brackets their 95 % intervals ({' or '.join(methods[kind] for kind in sorted(kinds))})"
