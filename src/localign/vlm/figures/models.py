"""The models of each figure, as the recipe ``vlm-figures`` lists them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from localign.options.vlm.demo import MODELS
from localign.recipes import read_recipe
from localign.vlm.demo.run import EVALUATION
from localign.vlm.evaluation.compare.panels import PanelModel, parse_models


def figure_name(target: str) -> str:
    """The name in the recipe: ``figure 5`` for ``fig5``."""
    return f"figure {target.removeprefix('fig')}"


def model_names() -> list[str]:
    """The names of all figures' models, which have the same colour in every figure."""
    return list(dict.fromkeys(model.name for model in _listed()))


def _listed() -> list[PanelModel]:
    return parse_models(read_recipe("vlm-figures").values["runs"])


def published_models(target: str, folder: Path) -> tuple[list[PanelModel], list[PanelModel]]:
    """The published models of a figure, and those of all other figures.

    Args:
        target: One of ``VLM_FIGURES``.
        folder: The folder of evaluations, which are named after recipes.
    """
    models = [
        replace(model, folders=tuple(folder / evaluation.name for evaluation in model.folders))
        for model in _listed()
    ]
    own = figure_name(target)
    return [m for m in models if m.figure == own], [m for m in models if m.figure != own]


def scene_models(target: str, folder: Path, seeds: int) -> dict[str, PanelModel]:
    """The models of a figure on scenes: a name of `localign vlm demo` -> the model.

    Args:
        target: One of ``VLM_FIGURES``, except a figure with models that the demo does not have.
        folder: The folder of the demo.
        seeds: Number of training seeds.
    """
    found: dict[str, PanelModel] = {}
    for model in published_models(target, folder)[0]:
        name = model.name.lower().replace(" ", "-")
        assert name in MODELS, name
        folders = tuple(folder / f"{name}-seed{seed}" / EVALUATION for seed in range(seeds))
        found.setdefault(name, replace(model, panel="", folders=folders))
    return found
