"""Options of `localign bench`."""

# Annotations stay types here: the command line is made from this module's config class.

from dataclasses import dataclass
from typing import Literal

from localign.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure a part of the probing benchmark against the plain way of doing it, in one run."""

    what: Literal["labels", "probe"] = "labels"
    """labels: reducing label maps against a loop over patches. probe: all heads in one pass against a run for
    each."""
    out: str | None = None
    """JSON file of the measurements; default runs/bench-WHAT.json."""
    seed: int = 0
    """Of drawn label maps, or of heads."""
    images: int | None = None
    """labels: label maps, default 64. probe: scenes to train heads on, default 600; a quarter as many to judge
    them on."""
    data: str | None = None
    """labels: a folder of label maps (PNG) instead of drawn ones."""
    image_size: int | None = None
    """labels: side of the maps, default 384 pixels."""
    patch_size: int | None = None
    """labels: side of a patch, default 14 pixels."""
    backbone: str | None = None
    """probe: name or export folder, default scenes-vit."""
    weights: str | None = None
    """probe: of a name: pretrained (default), none, or a weight file."""
    epochs: float | None = None
    """probe: passes over the training scenes, default 5."""
    repeats: int | None = None
    """How often each way is measured, the best counting; default 5 for labels (its loops once), 1 for probe."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        other = {
            "labels": ("backbone", "weights", "epochs"),
            "probe": ("data", "image_size", "patch_size"),
        }[self.what]
        for name in other:
            if getattr(self, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} has no effect on bench {self.what}")
        for name in ("images", "image_size", "patch_size", "epochs", "repeats"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")
        if self.data is not None and self.images is not None:
            raise UserError(
                "--images is how many label maps are drawn; with --data all of the folder are taken"
            )

    @property
    def file(self) -> str:
        """Where measurements are written."""
        return self.out or f"runs/bench-{self.what}.json"
