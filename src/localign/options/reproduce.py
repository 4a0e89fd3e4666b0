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
    """Write a table or figure of the paper; run the alignments and probings that it needs and that are missing."""

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Target": "target world data train_data weights quick seeds protocol",
        "Run": "out dry_run device micro_batch workers",
    }

    target: str = ""
    """table1, table4, table5, fig3, fig4, fig6, fig7, fig8, fig9 or fig10."""
    world: WorldName = "scenes"
    """scenes (the embedded backbone on drawn scenes), or coco or ade20k (the published runs)."""
    data: str | None = None
    """For coco and ade20k: labelled images to train and evaluate heads on, as for `localign probe`."""
    train_data: str | None = None
    """For coco and ade20k: folder of images to align on, or of the folders imagenet-1k/train and
    imagenet-21k."""
    weights: str | None = None
    """For coco and ade20k: folder of weight files named after backbones, such as clip-vit-b.safetensors; they are used
    instead of downloads."""
    out: str = "runs/reproduce"
    """Folder of all runs and results; finished runs are used again, interrupted runs are continued."""
    quick: bool = False
    """Fewer steps and images, as a trial of the whole command; the numbers are less reliable."""
    seeds: int = 1
    """Number of repetitions; each has its own seed for alignment and heads."""
    protocol: Protocol = "fixed"
    """fixed: evaluate heads after their last step. published: report each head's best epoch on the test images, which
    overstates recall."""
    dry_run: bool = False
    """Show the planned runs and stop."""
    micro_batch: int | Literal["auto"] | None = None
    """Alignments: images per rank and forward pass, or auto; default is a rank's whole share of the batch."""
    workers: int | None = None
    """Image loading processes per rank; the default depends on --world."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        if not self.target:
            raise UserError(f"no target given; choose one of {', '.join(REPRODUCTIONS)}")
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
                    raise UserError(f"{option} needs --world coco or ade20k: scenes are drawn, not read")
        elif self.data is None:
            raise UserError(
                f"--world {self.world} needs --data DIR, labelled images to train and evaluate heads on"
            )
        if self.weights is not None and not Path(self.weights).is_dir():
            raise UserError(f"--weights: there is no folder {self.weights}")
