"""Writing a figure: results, tables and charts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from localign.engine import run_folder
from localign.options.reproduce import ReproduceConfig
from localign.reproduce.run import result_folder
from localign.vlm.evaluation.compare.panels import PanelModel
from localign.vlm.evaluation.score import compare_models, draw_comparison
from localign.vlm.figures.models import model_names


def write_figure(
    config: ReproduceConfig,
    models: Sequence[PanelModel],
    *,
    others: Sequence[PanelModel] = (),
    notes: Sequence[str] = (),
) -> list[Path]:
    """Write ``results.json``, the comparison's tables and the charts of a figure; returns the paths.

    Args:
        config: The options.
        models: Evaluated models.
        others: Evaluated models that count in the scales of the radar charts only.
        notes: Notes for readers.
    """
    folder = result_folder(config)
    comparison = compare_models(models, others=others, notes=notes)
    results = run_folder.write_results(
        folder,
        {
            "command": "reproduce",
            "config": run_folder.to_dict(config),
            "versions": run_folder.provenance(),
            "evaluations": {model.label: [str(path) for path in model.folders] for model in models},
            "notes": comparison["notes"],
        },
    )
    return [results, *draw_comparison(comparison, folder, model_names())]
