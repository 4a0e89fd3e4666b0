"""The rows behind each table and figure of the paper."""

from __future__ import annotations

from dataclasses import dataclass, replace

from localign.backbones import CATALOGUE
from localign.report.tables.measures import BASELINE_SUFFIX

_CLIP, _IN1K, _CLIP_LARGE = "clip-vit-b", "in1k-vit-b", "clip-vit-l-336px"


@dataclass(frozen=True)
class TargetRow:
    """One backbone of a target, aligned or not."""

    name: str
    """Name in the results."""
    backbone: str
    recipe: str | None = None
    """Recipe of the alignment; None for a backbone without alignment."""
    against: str | None = None
    """Name of the row to compare with."""


@dataclass(frozen=True)
class Target:
    """A table or figure."""

    about: str
    rows: tuple[TargetRow, ...] = ()
    heads: tuple[str, ...] = ("transformer",)
    tasks: tuple[str, ...] = ("local", "global")
    pictures: bool = False
    """Whether the target shows predictions on a few images."""


def _table(backbone: str, recipes: dict[str, str], teacher: str = "teacher") -> tuple[TargetRow, ...]:
    """The backbone without alignment, then one row per recipe (row name -> recipe)."""
    aligned = (TargetRow(name, backbone, recipe, teacher) for name, recipe in recipes.items())
    return (TargetRow(teacher, backbone), *aligned)


def pairs(*backbones: str) -> tuple[TargetRow, ...]:
    """Each backbone before and after alignment with its own recipe."""
    return tuple(
        row
        for name in backbones
        for row in (
            TargetRow(name + BASELINE_SUFFIX, name),
            TargetRow(name, name, f"align/{name}", name + BASELINE_SUFFIX),
        )
    )


_TABLE1 = (
    "clipself", "clipself-decoder", "additive", "averaging-1", "averaging-3", "maskembed-1", "maskembed-3",
)  # fmt: skip
_DURATIONS = (*(f"in1k-{n}" for n in (2, 10, 25, 50, 100)), *(f"in21k-{n}" for n in (1, 5, 10)))
_TABLE4 = (
    "target-cls", "target-last", "target-penultimate", "augment-crop", "augment-mixup", "augment-cutmix",
    "augment-autoaugment", "masks-block", "masks-bernoulli-25", "masks-bernoulli-50", "masks-bernoulli-75",
    "masks-uniform", "masks-uniform-complement", "masks-uniform-complement-visible", "loss-cosine", *_DURATIONS,
)  # fmt: skip
_FIGURE4 = (
    "in1k-vit-t", "in1k-vit-s", "in1k-vit-b", "in1k-vit-l", "clip-vit-b", "clip-vit-l", "clip-vit-l-336px",
    "siglip-vit-b", "siglip-vit-so400m", "siglip-vit-so400m-384px",
)  # fmt: skip
_FIGURE9 = (
    "in1k-vit-b", "moco-vit-b", "clip-vit-b", "siglip-vit-b", "openclip-vit-b", "dfn-vit-b", "eva02-vit-b",
    "mae-vit-b", "beit-vit-b", "beitv2-vit-b", "dino-vit-b", "dinov2-vit-b",
)  # fmt: skip
_INTERVENTIONS = ("transformer", "transformer-cls-only", "transformer-anonymous")

TARGETS: dict[str, Target] = {
    "table1": Target(
        "MaskEmbed against CLIPSelf, averaging and the additive objective",
        _table(_CLIP, {n: f"table1/{n}" for n in _TABLE1}),
    ),
    "table4": Target(
        "ablations of MaskEmbed",
        (
            *_table(_IN1K, {n: f"table4/{n}" for n in _TABLE4}),
            *_table(_CLIP, {f"clip-{n}": f"table4/clip-{n}" for n in _DURATIONS}, "clip-teacher"),
        ),
    ),
    "table5": Target("all backbones before and after alignment", pairs(*CATALOGUE)),
    "fig3": Target("patch predictions before and after", pairs(_CLIP_LARGE), pictures=True),
    "fig4": Target("recall before and after, by scale and by supervision", pairs(*_FIGURE4)),
    "fig6": Target(
        "local recall with three heads",
        pairs("in1k-vit-l", _CLIP_LARGE, "siglip-vit-so400m-384px"),
        heads=("transformer", "mlp", "linear"),
        tasks=("local",),
    ),
    "fig7": Target("gains by class", pairs(_CLIP_LARGE)),
    "fig8": Target("gains by object size", pairs(_CLIP_LARGE)),
    "fig9": Target(
        "local against global recall, and interventions",
        tuple(TargetRow(name, name) for name in _FIGURE9),
        heads=_INTERVENTIONS,
    ),
    "fig10": Target("masks and crops"),
}


def rows_of_one(target: str, backbone: str, recipe: str) -> tuple[TargetRow, ...]:
    """A target's rows in a world with a single backbone.

    Args:
        target: A key of :data:`TARGETS`.
        backbone: The backbone.
        recipe: Recipe of its alignment, instead of a recipe per backbone.
    """
    if target in ("table1", "table4"):
        return tuple(replace(row, backbone=backbone) for row in TARGETS[target].rows)
    if target == "fig9":
        # A trend needs several backbones: the backbone, and the same after alignment with each recipe of table 1.
        others = (TargetRow(r.name, backbone, r.recipe, backbone) for r in TARGETS["table1"].rows if r.recipe)
        return TargetRow(backbone, backbone), *others
    if not TARGETS[target].rows:
        return ()
    return tuple(replace(row, recipe=row.recipe and recipe) for row in pairs(backbone))
