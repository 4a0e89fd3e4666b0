"""Which evaluations are compared: names, panels and training seeds, from the words of a command line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from localign.errors import UserError
from localign.vlm.evaluation.compare.summary import RunSummary

_DEEPEST = 3
"""Parts of a name: figure, panel, model."""


@dataclass(frozen=True)
class PanelModel:
    """One model of a comparison."""

    figure: str
    """Which file its panel is drawn into; empty for the only one."""
    panel: str
    """The first model of a panel is what its others are compared with; empty for the only one."""
    name: str
    folders: tuple[Path, ...]
    """Evaluations, one for each training seed."""

    @property
    def label(self) -> str:
        """Unlike every other model's."""
        return "/".join(part for part in (self.figure, self.panel, self.name) if part)


@dataclass(frozen=True)
class ComparedModel:
    """A model with what its answers came to."""

    entry: PanelModel
    runs: tuple[Mapping[str, RunSummary], ...]
    """By benchmark, one for each training seed."""


def parse_models(words: Sequence[str]) -> list[PanelModel]:
    """The models that a command line names.

    Args:
        words: ``FOLDER`` or ``NAME=FOLDER``. A name given again, or a folder with ``*``, ``?`` or ``[``, adds training
            seeds. ``PANEL/NAME`` and ``FIGURE/PANEL/NAME`` put the model into a panel.

    Raises:
        UserError: A pattern matches nothing, a name has an empty part, or an evaluation would be counted twice.
    """
    named: dict[tuple[str, str, str], list[Path]] = {}
    alone = [Path(word) for word in words if not _has_name(word)]
    for word in words:
        if _has_name(word):
            label, _, pattern = word.partition("=")
            key, folders = _parts(label, word), _matching(pattern, word)
        else:
            key, folders = ("", "", _own_name(Path(word), alone)), [Path(word)]
            if key in named:
                raise UserError(f"two models go by the name {key[2]}; give them names, as in NAME={word}")
        named.setdefault(key, []).extend(folders)
    spelt: dict[Path, Path] = {}
    entries = [
        PanelModel(*key, tuple(spelt.setdefault(folder.resolve(), folder) for folder in folders))
        for key, folders in named.items()
    ]
    _check(entries)
    return entries


def _has_name(word: str) -> bool:
    return "=" in word and not Path(word).exists()


def _parts(label: str, word: str) -> tuple[str, str, str]:
    parts = [" ".join(part.split()) for part in label.split("/")]
    if len(parts) > _DEEPEST or not all(parts):
        raise UserError(
            f"{word}: a model's name is NAME, PANEL/NAME or FIGURE/PANEL/NAME, none of them empty, before the ="
        )
    figure, panel, name = ["", "", *parts][-_DEEPEST:]
    return figure, panel, name


def _matching(pattern: str, word: str) -> list[Path]:
    if not pattern:
        raise UserError(f"{word}: there is no folder after the =")
    if Path(pattern).exists() or not re.search(r"[*?\[]", pattern):
        return [Path(pattern)]
    found = sorted((Path(path) for path in glob(pattern) if Path(path).is_dir()), key=_in_order)
    if not found:
        raise UserError(f"no folder matches {pattern}")
    return found


def _in_order(path: Path) -> list[tuple[int, str]]:
    """Numbers by their size: seed2 before seed10."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _own_name(folder: Path, others: Sequence[Path]) -> str:
    """The folder's own name, or its path where others have the same."""
    own = folder.resolve().name
    return own if sum(other.resolve().name == own for other in others) == 1 else str(folder)


def _check(entries: Sequence[PanelModel]) -> None:
    """Every evaluation belongs to one model, which may be in several panels."""
    if len({(bool(entry.figure), bool(entry.panel)) for entry in entries}) > 1:
        raise UserError(
            f"{entries[0].label} and others: either all models are in panels (of figures) or none is"
        )
    owner: dict[Path, PanelModel] = {}
    seen: dict[tuple[str, str, Path], PanelModel] = {}
    for entry in entries:
        if len(set(entry.folders)) < len(entry.folders):
            raise UserError(f"{entry.label} has the same folder twice; every training seed has its own")
        for folder in entry.folders:
            if (other := owner.setdefault(folder, entry)).folders != entry.folders:
                raise UserError(f"{folder} belongs to two different models, {other.label} and {entry.label}")
            if seen.setdefault((entry.figure, entry.panel, folder), entry) is not entry:
                raise UserError(f"{folder}: a model is compared with others, not with itself")
