"""Figures of vision-language models on drawn scenes, from the models of `localign vlm demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from localign.engine import run_folder
from localign.options.reproduce import ReproduceConfig
from localign.options.vlm.demo import MODELS, VLMDemoConfig
from localign.text.printing import console
from localign.vlm.demo.run import EVALUATION, alignment_config, run_vlm_demo
from localign.vlm.evaluation.score import is_evaluated
from localign.vlm.figures.drawing import write_figure
from localign.vlm.figures.models import scene_models

_QUICK: dict[str, Any] = {"scenes": 4000, "test_scenes": 200, "llm_steps": 100, "steps": 200}
_NOTES = (
    "Drawn scenes take the place of photographs, the embedded backbone that of CLIP and SigLIP, and a small language "
    "model that of Llama 2: the results do not transfer to photographs.",
    "Axes are scaled by the models of this figure.",
)
_QUICK_NOTE = "A quick run: after so few steps the models answer little better than by guessing."


def reproduce_on_scenes(config: ReproduceConfig) -> list[Path]:
    """Run the missing models of a figure, and draw it; returns the paths, none for a dry run.

    Raises:
        UserError: The folder holds models of other options.
        RunFailure: A training failed.
        RunStopped: SIGTERM or SIGUSR1 was received.
    """
    models = scene_models(config.target, config.demo_folder, config.seeds)
    demo = VLMDemoConfig(
        out=str(config.demo_folder),
        models=tuple(models),
        seeds=config.seeds,
        device=config.device,
        workers=config.workers or 0,
        **(_QUICK if config.quick else {}),
    )
    _show_plan(config, demo)
    if config.dry_run:
        return []
    run_vlm_demo(demo)
    notes = [*_NOTES, *([_QUICK_NOTE] if config.quick else [])]
    return write_figure(config, list(models.values()), notes=notes)


def _show_plan(config: ReproduceConfig, demo: VLMDemoConfig) -> None:
    """Print the trainings with their steps and state, and what is to do."""
    table = Table(title=f"{config.target} in the world scenes{', quick' if config.quick else ''}")
    for column in ("run", "of", "steps", "state"):
        table.add_column(column, justify="right" if column == "steps" else "left")
    steps_to_do, to_evaluate = 0, 0
    for kind, folder, steps in _trainings(demo):
        trained = (folder / run_folder.RESULTS_FILE).is_file()
        evaluated = kind != "training" or is_evaluated(folder / EVALUATION)
        steps_to_do += 0 if trained else steps
        to_evaluate += not evaluated
        state = "missing" if not trained else "done" if evaluated else "trained, not evaluated"
        table.add_row(kind, folder.name, f"{steps:,}", state)
    console(110).print(table)
    print(
        f"to do      {steps_to_do:,} training steps, {to_evaluate} evaluations"
        if steps_to_do or to_evaluate
        else "to do      nothing: all runs are done"
    )


def _trainings(demo: VLMDemoConfig) -> list[tuple[str, Path, int]]:
    """The trainings of a demo in their order: what it is, its run folder and its steps."""
    folder = Path(demo.out)
    runs = [("language model", folder / "llm", demo.llm_steps)]
    if any(MODELS[name][0] for name in demo.models):
        align = alignment_config(demo)
        assert align.steps is not None
        runs.append(("aligning", Path(align.out), align.steps))
    seeds = range(demo.seed, demo.seed + demo.seeds)
    return runs + [
        ("training", folder / f"{name}-seed{seed}", demo.steps) for seed in seeds for name in demo.models
    ]
