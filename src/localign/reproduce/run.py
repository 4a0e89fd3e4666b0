"""`localign reproduce`: run what is missing, then write the table or figure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table

from localign.backbones import create_backbone
from localign.engine import run_folder
from localign.engine.distributed import DistributedContext, distributed_context
from localign.engine.lock import lock
from localign.engine.log import say
from localign.errors import UserError
from localign.files import replace_text
from localign.options.reproduce import ReproduceConfig
from localign.probing.datasets import Split, open_labelled
from localign.probing.segmentation import labelled_batches
from localign.probing.suite import TEST_SOURCE, differences
from localign.report import write_figure, write_table
from localign.report.tables.recalls import recall_table
from localign.reproduce.pieces import Alignment, Heads, Probing
from localign.reproduce.plan import Planner, ReproductionPlan
from localign.reproduce.worlds import DataScale, open_world

VIEWS_BACKBONE = "clip-vit-b"
"""Whose grid fig. 10 shows."""
VIEWS = 4
"""Images of fig. 10."""
SPLITS: tuple[Split, Split] = ("train", "test")


def run_reproduce(config: ReproduceConfig) -> list[Path]:
    """Plan, run what is missing, write; returns the files, none of a dry run.

    Raises:
        UserError: Bad options or data.
        RunFailure: A run that cannot go on; the next call continues.
    """
    world = open_world(config.world, quick=config.quick)
    if config.target == "fig10":
        return write_views(config, world)
    with distributed_context(config.device) as here:
        heads = open_heads(config, world)
        plan = Planner(config, world, heads).plan()
        pieces = plan.pieces()
        # One rank looks: the others may come when it has begun to write.
        done = here.all_gather_object([piece.steps_done() for piece in pieces])[0]
        if here.is_main:
            show_plan(config, pieces, done)
            for line in plan.left_out:
                print(line[0].lower() + line[1:])
        if config.dry_run:
            return []
        held = hold(Path(config.out) / config.world, here)
        missing = [piece for piece, steps in zip(pieces, done, strict=True) if steps < piece.steps]
        for number, piece in enumerate(missing, start=1):
            if here.is_main:
                say(f"{number} of {len(missing)}: {_kind(piece)} {piece.label}")
            piece.run() if isinstance(piece, Alignment) else piece.run(heads, here)
            here.barrier()
        files = write_target(config, plan) if here.is_main else []
        if held is not None:
            held.close()
    return files


def hold(folder: Path, here: DistributedContext) -> TextIO | None:
    """Lock the folder of all runs for this command; every rank takes part in a refusal.

    Raises:
        UserError: Another process works there.
    """
    held, problem = None, None
    if here.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held = lock(folder)
        except UserError as error:
            problem = error
    problem = here.all_gather_object(problem)[0]
    if problem is not None:
        raise problem
    return held


def _kind(piece: Alignment | Probing) -> str:
    return "aligning" if isinstance(piece, Alignment) else "probing"


def show_plan(config: ReproduceConfig, pieces: Sequence[Alignment | Probing], done: Sequence[int]) -> None:
    """The runs with their steps and how far they are, and what is left to do."""
    table = Table(title=f"{config.target} in the world {config.world}{', quick' if config.quick else ''}")
    for column in ("run", "of", "steps", "state"):
        table.add_column(column, justify="right" if column == "steps" else "left", no_wrap=column == "of")
    left = {"aligning": [0, 0], "probing": [0, 0]}
    for piece, steps in zip(pieces, done, strict=True):
        state = "done" if steps >= piece.steps else f"at step {steps:,}" if steps else "missing"
        table.add_row(_kind(piece), piece.label, f"{piece.steps:,}", state)
        if steps < piece.steps:
            left[_kind(piece)][0] += 1
            left[_kind(piece)][1] += piece.steps - steps
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    (aligning, align_steps), (probing, probe_steps) = left.values()
    if aligning or probing:
        print(
            f"to do      {aligning} alignments ({align_steps:,} steps), {probing} probings ({probe_steps:,} steps)"
        )
    else:
        print("to do      nothing: all runs are done")


# -- results ---------------------------------------------------------------------------------------------


def write_target(config: ReproduceConfig, plan: ReproductionPlan) -> list[Path]:
    """Write results.json and the table or figure."""
    folder = result_folder(config)
    probed = {name: [p.read() for p in probings] for name, probings in plan.probings.items()}
    outcomes = {name: [p.outcome for p in seeds] for name, seeds in probed.items()}
    results = {
        "command": "reproduce",
        "config": run_folder.to_dict(config),
        "versions": run_folder.provenance(),
        "probe": outcomes,
        "differences": [
            entry
            for row in plan.rows
            if row.against in probed
            for entry in differences(row.name, probed[row.name], row.against, probed[row.against])
        ],
        "notes": plan.notes,
        "runs": {name: [_run_of(p) for p in probings] for name, probings in plan.probings.items()},
    }
    any_outcome = next(iter(outcomes.values()))[0]
    results |= {name: any_outcome[name] for name in ("classes", "class_kinds", "protocol")}
    run_folder.write_results(folder, results)
    Console().print(recall_table(results))
    if config.target.startswith("table"):
        files = _write_table(config, results, folder)
    else:
        arrays: dict[str, Any] = {}
        if plan.target.pictures:
            for name, (first, *_) in plan.probings.items():
                arrays |= first.pictures(name)
        files = write_figure(config.target, results, folder, arrays=arrays)
    return _say(files)


def _say(files: list[Path]) -> list[Path]:
    for path in files:
        print(f"{path.suffix[1:]:<10} {path}")
    return files


def result_folder(config: ReproduceConfig) -> Path:
    """Where a target's results go."""
    folder = Path(config.out) / config.world / (config.target + ("-quick" if config.quick else ""))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run_of(probing: Probing) -> dict[str, Any]:
    """Where a number comes from."""
    aligned = probing.aligned
    return {"probing": str(probing.folder), "alignment": None if aligned is None else str(aligned.folder)}


def _write_table(config: ReproduceConfig, results: dict[str, Any], folder: Path) -> list[Path]:
    def key(name: str) -> str:
        return f"{config.target}/{name}"

    files = write_table(
        config.target,
        {key(name): outcomes for name, outcomes in results["probe"].items()},
        folder,
        data=config.world,
        differences=[
            {**d, "name": key(d["name"]), "against": key(d["against"])} for d in results["differences"]
        ],
    )
    markdown = files[0]
    notes = "\n".join(f"- {note}" for note in results["notes"])
    replace_text(markdown, f"{markdown.read_text(encoding='utf-8').rstrip()}\n\n{notes}\n")
    return files


def write_views(config: ReproduceConfig, world: DataScale) -> list[Path]:
    """Fig. 10, which takes images and a grid of patches, and no training."""
    if config.dry_run:
        print("to do      nothing but the drawing: fig10 takes no runs")
        return []
    if world.backbone is None:  # its geometry is wanted, not its weights
        with torch.device("meta"):
            backbone = create_backbone(VIEWS_BACKBONE, weights="none")
    else:
        backbone = create_backbone(world.backbone)
    (source,) = open_heads(config, world).judged.values()
    images, _ = next(labelled_batches(source, backbone.image_size, VIEWS))
    return _say(write_figure(config.target, {}, result_folder(config), images=images, grid=backbone.grid))


# -- data ------------------------------------------------------------------------------------------------


def open_heads(config: ReproduceConfig, world: DataScale) -> Heads:
    """What heads are trained and judged on."""
    data = config.data or "scenes"
    train, test = (open_labelled(data, split, scenes=world.scenes.get(split, 0)) for split in SPLITS)
    return Heads(train, {TEST_SOURCE: test})
