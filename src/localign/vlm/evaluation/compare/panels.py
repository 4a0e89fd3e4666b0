"""The models of a comparison with their panels and training seeds, parsed from the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from localign.errors import UserError
from localign.vlm.evaluation.compare.summary import RunSummary

_MAX_PARTS = 3
"""Parts of a name: figure, panel, model."""


@dataclass(frozen=True)
class PanelModel:
    """One model of a comparison."""

    figure: str
    """The chart that shows the panel; empty if there is a single chart."""
    panel: str
    """The panel, whose first model the others are compared with; empty if there is a single panel."""
    name: str
    folders: tuple[Path, ...]
    """Evaluations, one per training seed."""

    @property
    def label(self) -> str:
        """Figure, panel and name; unique within the comparison."""
        return "/".join(part for part in (self.figure, self.panel, self.name) if part)


@dataclass(frozen=True)
class ComparedModel:
    """A model with summaries of its answers."""

    entry: PanelModel
    runs: tuple[Mapping[str, RunSummary], ...]
    """One per training seed, by benchmark."""


def parse_models(words: Sequence[str], *, skip_missing: bool = False) -> list[PanelModel]:
    """The models of a command line.

    Args:
        words: ``FOLDER`` or ``NAME=FOLDER``. A name given again, or a folder with ``*``, ``?`` or ``[``, adds training
            seeds. ``PANEL/NAME`` and ``FIGURE/PANEL/NAME`` put the model into a panel.
        skip_missing: Whether a pattern may match nothing; it is then the model's folder.

    Raises:
        UserError: A pattern matches nothing, a name has an empty part, or an evaluation would count twice.
    """
    folders_of: dict[tuple[str, str, str], list[Path]] = {}
    unnamed = [Path(word) for word in words if not _has_name(word)]
    for word in words:
        if _has_name(word):
            label, _, pattern = word.partition("=")
            key, folders = _parts(label, word), _matching(pattern, word, skip_missing)
        else:
            key, folders = ("", "", _default_name(Path(word), unnamed)), [Path(word)]
            if key in folders_of:
                raise UserError(
                    f"two models have the name {key[2]}; name this one otherwise, as in NAME={word}"
                )
        folders_of.setdefault(key, []).extend(folders)
    # Several spellings of one folder become the first of them.
    first_spelling: dict[Path, Path] = {}
    models = [
        PanelModel(*key, tuple(first_spelling.setdefault(folder.resolve(), folder) for folder in folders))
        for key, folders in folders_of.items()
    ]
    _check(models)
    return models


def _has_name(word: str) -> bool:
    return "=" in word and not Path(word).exists()


def _parts(label: str, word: str) -> tuple[str, str, str]:
    parts = [" ".join(part.split()) for part in label.split("/")]
    if len(parts) > _MAX_PARTS or not all(parts):
        raise UserError(
            f"{word}: before the = must stand NAME, PANEL/NAME or FIGURE/PANEL/NAME, without empty parts"
        )
    figure, panel, name = ["", "", *parts][-_MAX_PARTS:]
    return figure, panel, name


def _matching(pattern: str, word: str, skip_missing: bool) -> list[Path]:
    if not pattern:
        raise UserError(f"{word}: there is no folder after the =")
    if Path(pattern).exists() or not re.search(r"[*?\[]", pattern):
        return [Path(pattern)]
    found = sorted((Path(path) for path in glob(pattern) if Path(path).is_dir()), key=_natural_order)
    if not found and not skip_missing:
        raise UserError(f"no folder matches {pattern}")
    return found or [Path(pattern)]


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """A sort key that puts seed2 before seed10."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _default_name(folder: Path, unnamed: Sequence[Path]) -> str:
    """The folder's name; its path if several unnamed folders have the same name."""
    name = folder.resolve().name
    return name if sum(other.resolve().name == name for other in unnamed) == 1 else str(folder)


def _check(models: Sequence[PanelModel]) -> None:
    """Check that every evaluation belongs to one model. The model may be in several panels."""
    if len({(bool(model.figure), bool(model.panel)) for model in models}) > 1:
        raise UserError(
            f"{models[0].label} and others: either all models must be in panels (of figures), or no model"
        )
    owner: dict[Path, PanelModel] = {}
    in_panel: dict[tuple[str, str, Path], PanelModel] = {}
    for model in models:
        if len(set(model.folders)) < len(model.folders):
            raise UserError(
                f"{model.label} has the same folder twice; every training seed needs its own folder"
            )
        for folder in model.folders:
            if (other := owner.setdefault(folder, model)).folders != model.folders:
                raise UserError(f"{folder} belongs to two different models, {other.label} and {model.label}")
            if in_panel.setdefault((model.figure, model.panel, folder), model) is not model:
                raise UserError(
                    f"{folder} is in the same panel twice; a model cannot be compared with itself"
                )
