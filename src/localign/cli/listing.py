"""`localign list`: the backbones of the catalogue and the recipes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from localign.options.names import EMBEDDED
from localign.recipes import read_recipe, recipe_names
from localign.recipes.catalogue import CATALOGUE
from localign.text.printing import console


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """Show what there is."""

    what: Literal["backbones", "recipes"] = "backbones"
    """backbones: the catalogue with its published settings; recipes: the published runs, for --config."""
    json: bool = False
    """Print JSON instead of a table: a list of objects, one for each backbone or recipe."""


def run_list(config: ListConfig) -> None:
    """Print the table, or JSON."""
    rows = _recipes() if config.what == "recipes" else _backbones()
    if config.json:
        print(json.dumps(rows, indent=1))
    elif config.what == "recipes":
        _print_table("recipes", "localign COMMAND --config RECIPE [--option value ...]", [
            {"recipe": row["name"], "command": row["command"], "run": row["about"]} for row in rows
        ])  # fmt: skip
    else:
        _print_table(
            "backbones",
            "any other timm name, hf-hub:..., local-dir:... or export folder works too",
            [_backbone_cells(row) for row in rows],
        )


def _recipes() -> list[dict[str, Any]]:
    found = [(name, read_recipe(name)) for name in recipe_names()]
    return [{"name": n, "command": r.command, "about": r.about, "options": r.values} for n, r in found]


def _backbones() -> list[dict[str, Any]]:
    embedded = {"timm_name": None, "image_size": 48, "lr": 1e-3, "soft_cap": True, "data": "scenes",
                "epochs": None, "loader": "package"}  # fmt: skip
    return [{"name": EMBEDDED, **embedded}, *({"name": n, **asdict(e)} for n, e in CATALOGUE.items())]


def _backbone_cells(row: Mapping[str, Any]) -> dict[str, str]:
    weights = {
        "package": "inside the package",
        "timm": row["timm_name"],
    }.get(row["loader"], f"{row['timm_name']} + the authors' file")
    epochs = "" if row["epochs"] is None else f", {row['epochs']} epochs"
    return {
        "name": row["name"],
        "timm weights": weights,
        "image": str(row["image_size"]),
        "lr": f"{row['lr']:g}",
        "soft-cap": "yes" if row["soft_cap"] else "no",
        "published on": row["data"] + epochs,
    }


def _print_table(title: str, caption: str, rows: Sequence[Mapping[str, str]]) -> None:
    from rich.table import Table

    table = Table(title=title, caption=caption)
    for i, column in enumerate(rows[0]):
        table.add_column(column, overflow="fold", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row.values())
    # Names are for copying: a pipe gets them unfolded.
    console(150).print(table)
