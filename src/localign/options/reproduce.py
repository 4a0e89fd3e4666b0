"""Options of `localign reproduce`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from localign.errors import UserError, did_you_mean
from localign.options.names import REPRODUCTIONS, VLM_FIGURES, Protocol

WorldName = Literal["scenes", "coco", "ade20k", "llava"]
BACKBONES_FILE = "backbones.csv"
"""In the folder of a world: a line per backbone, alignment, head and task, of all targets that are done."""
BACKBONES_HEADER = (
    "backbone", "timm_name", "image_size", "recipe", "head", "task", "recall_before", "recall_after", "difference",
    "difference_low", "difference_high", "seeds", "converged", "target", "quick",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Write a table or figure of the paper; run the alignments and probings that it needs and that are missing."""

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Target": "target world data train_data weights evaluations quick seeds protocol",
        "Run": "out dry_run device micro_batch workers",
    }

    target: str = ""
    """table1, table4, table5, fig3, fig4, fig6, fig7, fig8, fig9 or fig10; or fig5, fig11, fig12 or fig13, which
    compare vision-language models."""
    world: WorldName = "scenes"
    """scenes (the embedded backbone on drawn scenes), or coco or ade20k (the published runs). For fig5, fig11, fig12
    and fig13: scenes (the models of `localign vlm demo`; not fig13), or llava (the published models: it shows which
    runs are missing, with --dry-run also their cost and commands, and draws the evaluations that exist)."""
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
    evaluations: str | None = None
    """For llava: folder of evaluations (`localign vlm eval --out`), each named after the recipe of its model; default
    runs/eval."""
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
        if self.target in VLM_FIGURES:
            self._check_vlm_figure()
            return
        if self.world == "llava":
            raise UserError(f"--world llava is for {', '.join(VLM_FIGURES)}, not for {self.target}")
        if self.evaluations is not None:
            raise UserError("--evaluations needs --world llava")
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

    @property
    def demo_folder(self) -> Path:
        """The folder of the vision-language models on scenes, which fig5, fig11 and fig12 share."""
        return Path(self.out) / "scenes" / ("vlm-quick" if self.quick else "vlm")

    def _check_vlm_figure(self) -> None:
        """Check the options of a figure of vision-language models.

        Raises:
            UserError: The world does not have the figure, or an option has no effect on it.
        """
        if self.world in ("coco", "ade20k"):
            raise UserError(
                f"{self.target} compares vision-language models: it needs --world scenes or llava, not {self.world}"
            )
        if self.target == "fig13" and self.world == "scenes":
            raise UserError(
                "fig13 fuses DINOv2 into the models, and scenes have only one backbone; draw it with --world llava"
            )
        unused = ["data", "train_data", "weights", "protocol", "micro_batch"]
        unused += ["evaluations"] if self.world == "scenes" else ["quick", "seeds", "workers", "device"]
        defaults = type(self).__dataclass_fields__
        for name in unused:
            if getattr(self, name) != defaults[name].default:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} has no effect on {self.target} in the world {self.world}")
