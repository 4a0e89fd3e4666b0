"""Where a target is reproduced: what a recipe keeps of itself there, and at what scale things run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from localign.alignment import AlignConfig
from localign.errors import UserError
from localign.recipes import FOLDER, Recipe, read_recipe, read_yaml
from localign.reproduce.targets import TARGETS, Target, TargetRow, rows_of_one

LEFT_OUT, STEPS, NOTE = "left_out", "steps", "note"
"""What a world says of a row beside options of its alignment: why it is not run, its share of steps, and what a
reader has to know of it."""


@dataclass(frozen=True)
class DataScale:
    """A file of ``recipes/worlds``."""

    backbone: str | None = None
    """Stands for all backbones; None leaves each row its own."""
    recipe: str | None = None
    """Aligns that one where a row names no method of its own."""
    align: dict[str, Any] = field(default_factory=dict)
    """Options of every alignment, in place of the recipes' own."""
    keeps: tuple[str, ...] | None = None
    """Options that a recipe keeps, where it states them; None keeps the whole recipe."""
    probe: dict[str, Any] = field(default_factory=dict)
    """Options of the heads' training, in place of the published ones."""
    heads: tuple[str, ...] = ()
    """Heads to train beside those that a target is about."""
    scenes: dict[str, int] = field(default_factory=dict)
    """Scenes to train heads on and to judge them on: train, test."""
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Patterns of recipes, and what is different about rows made by them."""
    notes: tuple[str, ...] = ()
    """What a reader of the results has to know."""

    def of_row(self, row: TargetRow, target: str) -> dict[str, Any]:
        """What is different about a row; one without a recipe goes by ``<target>/<name>``."""
        key = row.recipe or f"{target}/{row.name}"
        found: dict[str, Any] = {}
        for pattern, values in self.rows.items():
            if fnmatchcase(key, pattern):
                found |= values
        return found

    def rows_of(self, target: str) -> tuple[TargetRow, ...]:
        """A target's rows here, those that are left out among them."""
        if self.backbone is None:
            return TARGETS[target].rows
        assert self.recipe is not None
        return rows_of_one(target, self.backbone, self.recipe)

    def heads_of(self, target: Target) -> tuple[str, ...]:
        """Heads to train for a target."""
        return tuple(dict.fromkeys((*target.heads, *self.heads)))

    def align_options(self, row: TargetRow, target: str) -> dict[str, Any]:
        """The options of a row's alignment here; its data may still be a data set's name."""
        assert row.recipe is not None
        recipe = read_recipe(row.recipe, "align")
        own = self.of_row(row, target)
        share = own.pop(STEPS, 1)
        own.pop(NOTE, None)
        options = {**_kept(recipe, self.keeps, self.align), **own, "backbone": row.backbone}
        if options.get("decoder") == "none":
            options.pop("decoder_layer_scale", None)
        if share != 1:
            options["steps"] = max(1, round(share * options["steps"]))
        return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def _kept(recipe: Recipe, keeps: tuple[str, ...] | None, world: Mapping[str, Any]) -> dict[str, Any]:
    if keeps is None:
        return {**recipe.values, **world}
    return {**world, **{k: v for k, v in recipe.values.items() if k in keeps and k in recipe.stated}}


def open_world(name: str, *, quick: bool = False) -> DataScale:
    """A world by name, with its quick settings where asked for."""
    content = _content(name)
    in_short = content.pop("quick", {})
    if quick:
        content = _merged(content, in_short)
    for key in ("keeps", "heads", "notes"):
        if key in content:
            content[key] = tuple(content[key])
    world = DataScale(**content)
    _check(name, world)
    return world


def _content(name: str) -> dict[str, Any]:
    content = read_yaml(FOLDER / "worlds" / f"{name}.yaml")
    base = content.pop("base", None)
    return content if base is None else _merged(_content(base), content)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merged key by key; anything else is replaced."""
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
