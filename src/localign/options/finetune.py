"""Options of `localign finetune`.

The published companion of this kind names no settings in full; the defaults here are our own, of the sort that
is usual for fine-tuning ViTs.
"""

from dataclasses import dataclass, field
from typing import Any

from localign.errors import UserError
from localign.options.data import DataConfig
from localign.options.names import BACKENDS, AttentionBackend, TrainCrop
from localign.options.train import TrainConfig

LABEL_SMOOTHING = 0.1


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(DataConfig, TrainConfig):
    """Classification fine-tuning of a backbone under a transformer pooling head."""

    backbone: str = "scenes-vit"
    """A run or export folder, a name of `localign list backbones`, any timm name, hf-hub:... or local-dir:..."""
    weights: str = "pretrained"
    """Of names: pretrained, none (random), or a weight file."""
    image_size: int | None = None
    """Of names: side of the square input, pixels; default the backbone's own."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Of names: further arguments of timm's constructor, for example depth=2."""
    attention: AttentionBackend = "auto"
    """Back-end of soft-capped attention, where the backbone has it: eager, flex, or auto (flex on CUDA)."""
    freeze: bool = False
    """Train the head alone."""
    label_smoothing: float | None = None
    """Share of the target spread evenly over the classes; default 0.1. Not for scenes, whose images show
    several classes."""

    out: str = "runs/finetune"
    """Run folder: config, log, results, checkpoints, export with head."""
    data: str = "scenes"
    """Training images: a folder of class folders, a list (.csv with the columns path,label), or scenes."""
    val_images: int | None = None
    """Images per validation, at most, at even distances; default all (for scenes: 2048)."""
    crop: TrainCrop | None = None
    """published, rrc (random resized crop) or none; default rrc (for scenes: none)."""
    mixup: float | None = None
    """Mixup's alpha; labels are mixed alike."""
    cutmix: float | None = None
    """CutMix's alpha; labels are mixed alike."""
    lr: float | None = 1e-4
    """Peak learning rate."""
    weight_decay: float = 0.05
    """AdamW's, on matrices only: not on norms, biases, position embeddings or tokens."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decay rates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing is not None and not 0 <= self.label_smoothing < 1:
            raise UserError(f"--label-smoothing must lie in 0..1, not {self.label_smoothing}")
        if self.val_images is not None and self.val_images < 1:
            raise UserError(f"--val-images must be above 0, not {self.val_images}")
        if self.attention not in BACKENDS:
            raise UserError(f"--attention takes {', '.join(BACKENDS)}, not {self.attention!r}")
        if self.freeze and self.grad_checkpointing:
            raise UserError(
                "--freeze leaves --grad-checkpointing nothing to do: no gradient enters the backbone"
            )
