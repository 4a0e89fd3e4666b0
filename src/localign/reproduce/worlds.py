"""Worlds: the data and the scale at which targets are reproduced, and which options of recipes hold there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from localign.alignment import AlignConfig
from localign.errors import UserError
from localign.recipes import FOLDER, Recipe, read_options, read_recipe
from localign.reproduce.targets import TARGETS, Target, TargetRow, rows_of_one

LEFT_OUT, STEPS, NOTE = "left_out", "steps", "note"
"""Keys of a world's rows beside options of the alignment: the reason for not running the row, the factor on its
steps, and a note for readers."""


@dataclass(frozen=True)
class DataScale:
    """One world: the content of a file in ``recipes/worlds``."""

    backbone: str | None = None
    """The backbone of all rows; None leaves each row its own."""
    recipe: str | None = None
    """Recipe of that backbone's alignment, for rows that do not name a method."""
    align: dict[str, Any] = field(default_factory=dict)
    """Options of every alignment; they replace the options of recipes."""
    keeps: tuple[str, ...] | None = None
    """Options that a recipe keeps if it states them; None keeps all options of the recipe."""
    probe: dict[str, Any] = field(default_factory=dict)
    """Options of the heads' training; they replace the published settings."""
    heads: tuple[str, ...] = ()
    """Heads to train in addition to the heads of the target."""
    scenes: dict[str, int] = field(default_factory=dict)
    """Number of scenes to train (train) and to evaluate (test) heads on."""
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Pattern of recipes to options of the rows with a matching recipe."""
    notes: tuple[str, ...] = ()
    """Notes for readers of the results."""

    def row_options(self, row: TargetRow, target: str) -> dict[str, Any]:
        """The options of a row that differ from the rest; a row without a recipe matches as ``<target>/<name>``."""
        key = row.recipe or f"{target}/{row.name}"
        options: dict[str, Any] = {}
        for pattern, values in self.rows.items():
            if fnmatchcase(key, pattern):
                options |= values
        return options

    def rows_of(self, target: str) -> tuple[TargetRow, ...]:
        """A target's rows in this world, including the rows that are left out."""
        if self.backbone is None:
            return TARGETS[target].rows
        assert self.recipe is not None
        return rows_of_one(target, self.backbone, self.recipe)

    def heads_of(self, target: Target) -> tuple[str, ...]:
        """Heads to train for a target."""
        return tuple(dict.fromkeys((*target.heads, *self.heads)))

    def align_options(self, row: TargetRow, target: str) -> dict[str, Any]:
        """The options of a row's alignment in this world; ``data`` may be the name of a data set."""
        assert row.recipe is not None
        recipe = read_recipe(row.recipe, "align")
        own = self.row_options(row, target)
        factor = own.pop(STEPS, 1)
        own.pop(NOTE, None)
        options = {**self._recipe_options(recipe), **own, "backbone": row.backbone}
        if options.get("decoder") == "none":
            options.pop("decoder_layer_scale", None)
        if factor != 1:
            options["steps"] = max(1, round(factor * options["steps"]))
        return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}

    def _recipe_options(self, recipe: Recipe) -> dict[str, Any]:
        """The options of a recipe and of this world, see :attr:`keeps`."""
        if self.keeps is None:
            return {**recipe.values, **self.align}
        kept = {k: v for k, v in recipe.values.items() if k in self.keeps and k in recipe.stated}
        return {**self.align, **kept}


def open_world(name: str, *, quick: bool = False) -> DataScale:
    """Read a world.

    Args:
        name: Name of a file in ``recipes/worlds``.
        quick: Whether to apply its quick settings.

    Raises:
        UserError: The file names an option that alignments do not have.
    """
    content = _content(name)
    quick_content = content.pop("quick", {})
    if quick:
        content = _merged(content, quick_content)
    for key in ("keeps", "heads", "notes"):
        if key in content:
            content[key] = tuple(content[key])
    world = DataScale(**content)
    _check(name, world)
    return world


def _content(name: str) -> dict[str, Any]:
    content = read_options(FOLDER / "worlds" / f"{name}.yaml")
    base = content.pop("base", None)
    return content if base is None else _merged(_content(base), content)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two mappings merged key by key, nested mappings too; other values of ``above`` replace those of ``below``."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _check(name: str, world: DataScale) -> None:
    fields = set(AlignConfig.__dataclass_fields__)
    options = {*world.align, *(world.keeps or ()), *(k for row in world.rows.values() for k in row)}
    unknown = sorted(options - fields - {LEFT_OUT, STEPS, NOTE})
    if unknown:
        raise UserError(f"the world {name} names unknown options: {', '.join(unknown)}")
