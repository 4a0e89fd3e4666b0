"""Figures of the published vision-language models: which runs they need, what these cost, and what can be drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from localign.backbones.export import find_export
from localign.engine import run_folder
from localign.engine.schedule import total_steps
from localign.errors import UserError
from localign.gpus import gpu
from localign.options.plan import PlanConfig
from localign.options.reproduce import ReproduceConfig
from localign.options.vlm.train import VLMConfig
from localign.planning.counting import CountedAlignment
from localign.planning.vlm import plan_vlm
from localign.planning.vlm_compute import TEXT_TOKENS, flops_per_conversation
from localign.recipes import read_recipe
from localign.text.printing import console, printable
from localign.vlm.evaluation.compare.panels import PanelModel
from localign.vlm.evaluation.score import is_evaluated, without_missing
from localign.vlm.figures.drawing import write_figure
from localign.vlm.figures.models import published_models

BENCHMARKS = ("refcoco", "ocid-ref", "tallyqa", "vsr", "ai2d", "textvqa", "vqav2", "vizwiz", "pope")
"""The benchmarks of the figures."""
EVALUATIONS = "runs/eval"
_ALIGNED, _TRAINED = Path("runs/align"), Path("runs/vlm")
"""Folders of runs, named after recipes; recipes of aligned models read the former."""
_GPU, _MFU = "A100", 0.4
"""The GPU of the published runs, and the share of its peak that trainings are assumed to reach."""


@dataclass(frozen=True)
class PublishedRun:
    """One run that a figure needs."""

    kind: str
    """aligning, training or evaluating."""
    name: str
    """The recipe; for an evaluation that of its model."""
    command: str
    """What to type."""
    missing: str = ""
    """What is missing; empty if the run is done."""
    steps: int | None = None
    """Optimizer steps, where the cost was asked for."""
    gpu_hours: float | None = None
    """Duration times GPUs, where the cost was asked for."""


def reproduce_published(config: ReproduceConfig) -> list[Path]:
    """Show the runs of a figure, and draw the evaluations that exist; returns the paths, none for a dry run.

    Raises:
        UserError: There is nothing to draw.
    """
    folder = Path(config.evaluations or EVALUATIONS)
    own, others = published_models(config.target, folder)
    runs = planned_runs(own, folder)
    if config.dry_run:
        _show(config, [_with_cost(run) if run.missing else run for run in runs])
        return []
    _show(config, runs)
    if not any(is_evaluated(evaluation) for model in own for evaluation in model.folders):
        raise UserError(
            f"{config.target} cannot be drawn yet: none of its models is evaluated in {folder}; --dry-run shows what "
            "the missing runs cost, and their commands"
        )
    found, notes = without_missing(own)
    evaluated = [model for model in others if all(map(is_evaluated, model.folders))]
    scaling = {folder for model in (*found, *evaluated) for folder in model.folders}
    notes.append(
        f"The axes of the radar chart are scaled by the {len(scaling)} evaluated models of all figures."
    )
    return write_figure(config, found, others=evaluated, notes=notes)


def planned_runs(models: Sequence[PanelModel], folder: Path) -> list[PublishedRun]:
    """The runs behind the models of a figure, each after the runs that it needs.

    A training is needed if its model is not evaluated on all :data:`BENCHMARKS`, and an alignment if such a training
    reads it.

    Args:
        models: The models.
        folder: The folder of evaluations.
    """
    names = list(dict.fromkeys(evaluation.name for model in models for evaluation in model.folders))
    evaluations = [_evaluation(name, folder) for name in names]
    trainings = [_training(run.name, needed=bool(run.missing)) for run in evaluations]
    needed: dict[str, bool] = {}
    for run in trainings:
        for backbone in map(Path, read_recipe(f"vlm/{run.name}", "vlm train").values["backbone"]):
            if backbone.parent == _ALIGNED:
                needed[backbone.name] = needed.get(backbone.name, False) or bool(run.missing)
    return [*(_alignment(name, is_needed) for name, is_needed in needed.items()), *trainings, *evaluations]


def _evaluation(name: str, folder: Path) -> PublishedRun:
    own = folder / name
    answered = run_folder.read_results(own).get("benchmarks", {}) if is_evaluated(own) else {}
    lacking = [benchmark for benchmark in BENCHMARKS if benchmark not in answered]
    missing = "" if not lacking else f"no answers to {', '.join(lacking)}" if answered else "missing"
    # All benchmarks, because an evaluation replaces the one that is in its folder; its answers are used again.
    asked = ",".join(BENCHMARKS)
    command = f"localign vlm eval {_TRAINED / name} --benchmarks {asked} --data DIR --out {own}"
    return PublishedRun("evaluating", name, command, missing)


def _training(name: str, needed: bool) -> PublishedRun:
    out = _TRAINED / name
    command = f"torchrun --nproc-per-node 8 -m localign vlm train --config vlm/{name} --out {out}"
    is_done = not needed or (out / run_folder.RESULTS_FILE).is_file()
    return PublishedRun("training", name, command, "" if is_done else "missing")


def _alignment(name: str, needed: bool) -> PublishedRun:
    out = _ALIGNED / name
    command = f"torchrun --nproc-per-node 8 -m localign align --config align/{name} --out {out}"
    is_done = not needed or find_export(out) is not None
    return PublishedRun("aligning", name, command, "" if is_done else "missing")


def _with_cost(run: PublishedRun) -> PublishedRun:
    """The run with its steps and GPU-hours; an evaluation as it is."""
    if run.kind == "aligning":
        align = PlanConfig(**read_recipe(f"align/{run.name}", "align").values)
        steps: int | None = total_steps(align, align.images)
        batch, flops = align.batch_size, CountedAlignment(align).flops().total
    elif run.kind == "training":
        config = VLMConfig(**read_recipe(f"vlm/{run.name}", "vlm train").values)
        model, plan = plan_vlm(config)
        steps, batch = plan.steps, config.batch_size
        flops = flops_per_conversation(config, model, plan.image_tokens)
    else:
        return run
    if steps is None:
        return run
    return replace(run, steps=steps, gpu_hours=steps * batch * flops / (_MFU * 1e12 * gpu(_GPU).bf16) / 3600)


def _show(config: ReproduceConfig, runs: Sequence[PublishedRun]) -> None:
    """Print the runs with their state and what is missing; for a dry run also costs and commands."""
    numbers = ("steps", f"{_GPU}-hours") if config.dry_run else ()
    table = Table(title=f"{config.target} in the world llava")
    for column in ("run", "of", *numbers, "state"):
        table.add_column(column, justify="right" if column in numbers else "left")
    for run in runs:
        cells = (f"{n:,.0f}" if n is not None else "" for n in (run.steps, run.gpu_hours)[: len(numbers)])
        table.add_row(run.kind, run.name, *cells, run.missing or "done")
    console(110).print(table)
    missing = [run for run in runs if run.missing]
    if not missing:
        print("to do      nothing: all models are evaluated")
        return
    kinds = Counter(run.kind for run in missing)
    listed = (
        f"{kinds['aligning']} alignments, {kinds['training']} trainings, {kinds['evaluating']} evaluations"
    )
    if not config.dry_run:
        print(f"to do      {listed}")
        return
    print(
        f"to do      {listed}; {sum(run.gpu_hours or 0 for run in missing):,.0f} {_GPU}-hours without evaluations"
    )
    print(
        f"assumed    {_MFU:.0%} of the {_GPU}'s peak, and {TEXT_TOKENS} tokens of text per conversation; attention "
        "between the tokens of a conversation is not counted"
    )
    for line in _missing_inputs(missing):
        print(f"missing    {printable(line)}")
    for run in missing:
        print(f"command    {printable(run.command)}")


def _missing_inputs(runs: Sequence[PublishedRun]) -> list[str]:
    """Files and folders that the missing runs read and that are not there, one line each."""
    lines: dict[str, None] = {}
    for run in runs:
        if run.kind == "evaluating":
            continue
        recipe = f"align/{run.name}" if run.kind == "aligning" else f"vlm/{run.name}"
        values: dict[str, Any] = read_recipe(recipe).values
        what = "images to align on" if run.kind == "aligning" else "conversations and their images"
        data = [values["data"]] if isinstance(values["data"], str) else values["data"]
        lines |= {f"{name}, {what}": None for name in data if not Path(name).exists()}
    return list(lines)
