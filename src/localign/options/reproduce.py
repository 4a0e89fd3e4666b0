"""Options of `localign reproduce`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from localign.errors import UserError, did_you_mean
from localign.options.names import REPRODUCTIONS, Protocol

WorldName = Literal["scenes", "coco", "ade20k"]


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Write a table or figure of the paper, running what it needs and is not there yet."""

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Target": "target world data train_data weights quick seeds protocol",
        "Run": "out dry_run device micro_batch workers",
    }

    target: str = ""
    """table1, table4, table5, fig3, fig4, fig6, fig7, fig8, fig9 or fig10."""
    world: WorldName = "scenes"
    """Where: scenes (the embedded backbone on drawn scenes), coco or ade20k (the published runs)."""
    data: str | None = None
    """Of coco and ade20k: labelled images that heads are trained and judged on, as for `localign probe`."""
    train_data: str | None = None
    """Of coco and ade20k: images to align on, in one folder or in its folders imagenet-1k and imagenet-21k."""
    weights: str | None = None
    """Of coco and ade20k: a folder of weight files named after backbones, such as clip-vit-b.safetensors, used in
    place of downloads."""
    out: str = "runs/reproduce"
    """Folder of all runs and results; what is done there is not run again, what was cut off is continued."""
    quick: bool = False
    """Fewer steps and images: to see everything run; the numbers mean less."""
    seeds: int = 1
    """Repetitions, each with another seed of alignment and heads."""
    protocol: Protocol = "fixed"
    """fixed: judge heads as their last step left them. published: report each head's best epoch on the reported
    images themselves, which flatters."""
    dry_run: bool = False
    """Show the plan and stop."""
    micro_batch: int | Literal["auto"] | None = None
    """Images per rank and forward pass of alignments, or auto, as in align; default is the rank's whole share."""
    workers: int | None = None
    """Image loading processes per rank; default the world's own."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        if not self.target:
            raise UserError(f"reproduce what? give one of {', '.join(REPRODUCTIONS)}")
        if self.target not in REPRODUCTIONS:
            known = ", ".join(REPRODUCTIONS)
            raise UserError(
                f"unknown target {self.target!r}{did_you_mean(self.target, REPRODUCTIONS)}; known: {known}"
            )
        if self.seeds < 1:
            raise UserError(f"--seeds must be at least 1, not {self.seeds}")
        if self.world == "scenes":
            for name in ("data", "train_data", "weights"):
                if getattr(self, name) is not None:
                    option = f"--{name.replace('_', '-')}"
                    raise UserError(f"{option} goes with --world coco or ade20k; scenes have their own")
        elif self.data is None:
            raise UserError(
                f"--world {self.world} needs --data DIR, the labelled images that heads are trained on"
            )
        if self.weights is not None and not Path(self.weights).is_dir():
            raise UserError(f"--weights: there is no folder {self.weights}")
