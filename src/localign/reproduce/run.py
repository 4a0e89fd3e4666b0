"""`localign reproduce`: run the missing runs, then write the table or figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table

from localign.engine import run_folder
from localign.engine.distributed import DistributedContext, distributed_context
from localign.engine.log import say
from localign.errors import UserError
from localign.files import replace_text
from localign.files.lock import lock
from localign.options.reproduce import ReproduceConfig
from localign.probing.datasets import open_labelled
from localign.probing.suite import differences
from localign.report import write_figure, write_table
from localign.report.tables.recalls import recall_table
from localign.reproduce.backbones import QUICK, write_backbones
from localign.reproduce.pieces import Alignment, LabelledData, Probing
from localign.reproduce.plan import Planner, ReproductionPlan
from localign.reproduce.views import write_views
from localign.reproduce.worlds import DataScale, open_world
from localign.results import RecallDifference, Results, RunFolders
from localign.text.printing import console, printable


def run_reproduce(config: ReproduceConfig) -> list[Path]:
    """Plan, run the missing runs, and write the results.

    Returns:
        The paths of the table or figure; none for a dry run.

    Raises:
        UserError: Bad options or data.
        RunFailure: A run failed; the next call continues it.
    """
    world = open_world(config.world, quick=config.quick)
    if config.target == "fig10":
        return _reproduce_views(config, world)
    with distributed_context(config.device) as context:
        data = open_data(config, world)
        plan = Planner(config, world, data).plan()
        pieces = plan.pieces()
        # All ranks use what rank 0 found: another rank may look after rank 0 has begun to write.
        done = context.all_gather_object([piece.steps_done() for piece in pieces])[0]
        if context.is_main:
            show_plan(config, pieces, done)
            for line in plan.left_out:
                print(line[0].lower() + line[1:])
        if config.dry_run:
            return []
        lock_file = lock_runs(Path(config.out) / config.world, context)
        missing = [piece for piece, steps in zip(pieces, done, strict=True) if steps < piece.steps]
        for number, piece in enumerate(missing, start=1):
            if context.is_main:
                say(f"{number} of {len(missing)}: {_kind(piece)} {piece.label}")
            piece.run() if isinstance(piece, Alignment) else piece.run(data, context)
            context.barrier()
        files = write_target(config, plan) if context.is_main else []
        if lock_file is not None:
            lock_file.close()
    return files


def _reproduce_views(config: ReproduceConfig, world: DataScale) -> list[Path]:
    if config.dry_run:
        print("to do      nothing to run: fig10 is drawn from images alone")
        return []
    return _print_paths(write_views(config, world, open_data(config, world), result_folder(config)))


def open_data(config: ReproduceConfig, world: DataScale) -> LabelledData:
    """The labelled images of a target."""
    name = config.data or "scenes"
    train = open_labelled(name, "train", scenes=world.scenes.get("train", 0))
    return LabelledData(train, open_labelled(name, "test", scenes=world.scenes.get("test", 0)))


def lock_runs(folder: Path, context: DistributedContext) -> TextIO | None:
    """Lock the folder of all runs for this command.

    Returns:
        The open lock file on the main rank; None on other ranks.

    Raises:
        UserError: Another process works in the folder; raised on all ranks.
    """
    lock_file, problem = None, None
    if context.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock_file = lock(folder)
        except UserError as error:
            problem = error
    problem = context.all_gather_object(problem)[0]
    if problem is not None:
        raise problem
    return lock_file


def _kind(piece: Alignment | Probing) -> str:
    return "aligning" if isinstance(piece, Alignment) else "probing"


def show_plan(config: ReproduceConfig, pieces: Sequence[Alignment | Probing], done: Sequence[int]) -> None:
    """Print the runs with their steps and state, and the number of steps to do.

    Args:
        config: The options.
        pieces: The runs.
        done: Steps done of each run.
    """
    table = Table(title=f"{config.target} in the world {config.world}{', quick' if config.quick else ''}")
    for column in ("run", "of", "steps", "state"):
        table.add_column(column, justify="right" if column == "steps" else "left", no_wrap=column == "of")
    to_do = {"aligning": [0, 0], "probing": [0, 0]}
    for piece, steps in zip(pieces, done, strict=True):
        state = "done" if steps >= piece.steps else f"at step {steps:,}" if steps else "missing"
        table.add_row(_kind(piece), piece.label, f"{piece.steps:,}", state)
        if steps < piece.steps:
            to_do[_kind(piece)][0] += 1
            to_do[_kind(piece)][1] += piece.steps - steps
    console(110).print(table)
    (aligning, align_steps), (probing, probe_steps) = to_do.values()
    if aligning or probing:
        print(
            f"to do      {aligning} alignments ({align_steps:,} steps), {probing} probings ({probe_steps:,} steps)"
        )
    else:
        print("to do      nothing: all runs are done")


# -- results ---------------------------------------------------------------------------------------------


def write_target(config: ReproduceConfig, plan: ReproductionPlan) -> list[Path]:
    """Write ``results.json``, ``backbones.csv`` and the table or figure; returns the paths of the latter."""
    folder = result_folder(config)
    results = _results(config, plan)
    run_folder.write_results(folder, results)
    write_backbones(open_world(config.world), folder.parent)
    console().print(recall_table(results))
    if config.target.startswith("table"):
        return _print_paths(_write_table(config, results, folder))
    arrays: dict[str, Any] = {}
    if plan.target.pictures:
        for name, (first, *_) in plan.probings.items():
            arrays |= first.pictures(name)
    return _print_paths(write_figure(config.target, results, folder, arrays=arrays))


def _results(config: ReproduceConfig, plan: ReproductionPlan) -> Results:
    probed = {name: [probing.read() for probing in seeds] for name, seeds in plan.probings.items()}
    outcomes = {name: [p.outcome for p in seeds] for name, seeds in probed.items()}
    gains: list[RecallDifference] = [
        entry
        for row in plan.rows
        if row.against in probed
        for entry in differences(row.name, probed[row.name], row.against, probed[row.against])
    ]
    any_outcome = next(iter(outcomes.values()))[0]
    return {
        "command": "reproduce",
        "config": run_folder.to_dict(config),
        "versions": run_folder.provenance(),
        "probe": outcomes,
        "differences": gains,
        "notes": plan.notes,
        "runs": {name: [_folders(probing) for probing in seeds] for name, seeds in plan.probings.items()},
        "classes": any_outcome["classes"],
        "class_kinds": any_outcome["class_kinds"],
        "protocol": any_outcome["protocol"],
    }


def _folders(probing: Probing) -> RunFolders:
    alignment = probing.alignment
    return {
        "probing": str(probing.folder),
        "alignment": None if alignment is None else str(alignment.folder),
    }


def _print_paths(files: list[Path]) -> list[Path]:
    for path in files:
        print(f"{path.suffix[1:]:<10} {printable(path)}")
    return files


def result_folder(config: ReproduceConfig) -> Path:
    """The folder of a target's results; it is made if it is missing."""
    folder = Path(config.out) / config.world / (config.target + (QUICK if config.quick else ""))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_table(config: ReproduceConfig, results: Results, folder: Path) -> list[Path]:
    def key(name: str) -> str:
        return f"{config.target}/{name}"

    files = write_table(
        config.target,
        {key(name): outcomes for name, outcomes in results["probe"].items()},
        folder,
        data=config.world,
        differences=[
            {**entry, "name": key(entry["name"]), "against": key(entry["against"])}
            for entry in results["differences"]
        ],
    )
    markdown = files[0]
    notes = "\n".join(f"- {note}" for note in results["notes"])
    replace_text(markdown, f"{markdown.read_text(encoding='utf-8').rstrip()}\n\n{notes}\n")
    return files
