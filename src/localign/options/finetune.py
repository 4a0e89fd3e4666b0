"""Options of `localign finetune`.

No published run names all settings. The defaults are ours, in the usual range for fine-tuning ViTs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from localign.errors import UserError
from localign.options.data import DataConfig
from localign.options.names import BACKENDS, AttentionBackend, ImageSize, TrainCrop
from localign.options.train import TrainConfig

LABEL_SMOOTHING = 0.1


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(DataConfig, TrainConfig):
    """Classification fine-tuning of a backbone with a transformer head."""

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Model": "backbone weights image_size model_kwargs attention freeze",
        **DataConfig.GROUPS,
        "Objective": "label_smoothing",
        **TrainConfig.GROUPS,
    }

    backbone: str = "scenes-vit"
    """A name from `localign list backbones`, any timm name, a run or export folder, or a folder or Hub repository of
    transformers or timm."""
    weights: str = "pretrained"
    """Weights of a backbone given by name: pretrained, none (random), or a weight file."""
    image_size: ImageSize | None = None
    """Side of the input in pixels, or HEIGHTxWIDTH; default the backbone's own. Positions are resampled."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm's constructor for a backbone given by name, such as depth=2."""
    attention: AttentionBackend = "auto"
    """Back-end of soft-capped attention, if the backbone has it: eager, flex, or auto (flex on CUDA)."""
    freeze: bool = False
    """Train only the head."""
    label_smoothing: float | None = None
    """Share of the target spread evenly over the classes; default 0.1. Not for scenes, whose images have several
    classes."""

    out: str = "runs/finetune"
    """Run folder for config, log, results, checkpoints, and the export with the head."""
    data: str = "scenes"
    """Training images: a folder of class folders, a list (.csv with columns path,label), or scenes."""
    val_images: int | None = None
    """Largest number of images per validation, at even distances; default all (for scenes 2048)."""
    crop: TrainCrop | None = None
    """published, rkrc, rrc (random resized crop) or none, as for align; default rrc (for scenes none)."""
    mixup: float | None = None
    """Alpha of mixup, which mixes images and labels; default off."""
    cutmix: float | None = None
    """Alpha of CutMix, which mixes images and labels; default off."""
    lr: float | None = 1e-4
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Weight decay of AdamW, on matrices only: not on norms, biases, position embeddings or tokens."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing is not None and not 0 <= self.label_smoothing < 1:
            raise UserError(f"--label-smoothing must lie in 0..1, not {self.label_smoothing}")
        if self.val_images is not None and self.val_images < 1:
            raise UserError(f"--val-images must be above 0, not {self.val_images}")
        if self.attention not in BACKENDS:
            raise UserError(f"--attention takes {', '.join(BACKENDS)}, not {self.attention!r}")
        if self.freeze and self.grad_checkpointing:
            raise UserError("--grad-checkpointing has no effect with --freeze: the backbone has no gradients")
