"""One CSV file with a line per backbone, head and task: what every alignment of a world gained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from localign.engine import run_folder
from localign.files import replace_text
from localign.options.reproduce import BACKBONES_FILE, BACKBONES_HEADER
from localign.recipes.catalogue import CATALOGUE
from localign.report.figures.drawing import to_csv
from localign.reproduce.targets import TARGETS
from localign.reproduce.worlds import DataScale
from localign.results import ProbeOutcome, RecallDifference, Results

QUICK = "-quick"
"""Ends the names of folders of quick runs."""
_SEEDS = BACKBONES_HEADER.index("seeds")


def write_backbones(world: DataScale, folder: Path) -> Path:
    """Write ``backbones.csv`` of all finished targets of a world; recalls are shares, 0..1.

    Args:
        world: The world of the targets.
        folder: The folder of the world, whose subfolders are those of the targets.

    Returns:
        The path of the file. An alignment that several targets have in common has one line per head and task, that of
        the target with the most seeds.

    Raises:
        UserError: A target's ``results.json`` is damaged.
    """
    lines: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for target in sorted(TARGETS):
        for suffix in ("", QUICK):
            own = folder / f"{target}{suffix}"
            if (own / run_folder.RESULTS_FILE).is_file():
                results = cast(Results, run_folder.read_results(own))
                for line in _lines(world, target, results, bool(suffix)):
                    key = (line[0], *line[3:6], line[-1])
                    if key not in lines or line[_SEEDS] > lines[key][_SEEDS]:
                        lines[key] = line
    path = folder / BACKBONES_FILE
    replace_text(path, to_csv(BACKBONES_HEADER, [lines[key] for key in sorted(lines, key=str)]))
    return path


def _lines(world: DataScale, target: str, results: Results, quick: bool) -> Iterator[tuple[Any, ...]]:
    rows = {row.name: row for row in world.rows_of(target)}
    probed = results.get("probe", {})
    for gain in results.get("differences", []):
        row = rows.get(gain["name"])
        if row is None or gain["against"] not in probed:
            continue
        entry = CATALOGUE.get(row.backbone)
        described = (row.backbone, entry and entry.timm_name, entry and entry.image_size, row.recipe)
        recalls = (_recall(probed[name], gain) for name in (gain["against"], gain["name"]))
        interval = gain["interval"] or (None, None)
        yield (
            *described, gain["head"], gain["task"], *recalls, gain["difference"], *interval,
            len(probed[gain["name"]]), gain.get("converged"), target, quick,
        )  # fmt: skip


def _recall(outcomes: list[ProbeOutcome], gain: RecallDifference) -> float | None:
    """The macro recall that a difference is taken of, mean over seeds."""
    found = []
    for outcome in outcomes:
        heads = cast(Mapping[str, Any], outcome["results"][gain["source"]])
        found.append(heads[gain["head"]][gain["task"]]["macro_recall"])
    return None if not found or None in found else sum(found) / len(found)
