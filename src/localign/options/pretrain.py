"""Options of `localign pretrain`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from localign.errors import UserError
from localign.options.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Pre-training of the embedded backbone on scenes, with image-level labels only."""

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Model": "width depth num_heads patch_size",
        "Data": "scenes val_scenes hidden_images most_hidden",
        **TrainConfig.GROUPS,
    }

    out: str = "runs/pretrain"
    """Run folder."""
    steps: int | None = 2000
    """Optimizer steps."""
    batch_size: int = 128
    """Scenes per optimizer step."""
    lr: float | None = 1e-3
    """Peak learning rate."""
    min_lr_ratio: float = 0.02
    """Learning rate at the end of the cosine, as a share of the peak."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.05
    """Weight decay of AdamW."""
    workers: int = 1
    """Loader processes."""
    scenes: int = 40_000
    """Scenes to train on."""
    val_scenes: int = 1000
    """Scenes to validate on."""
    patch_size: int = 8
    """Patch side, pixels."""
    width: int = 96
    """Channels of a token."""
    depth: int = 6
    """Transformer blocks."""
    num_heads: int = 3
    """Attention heads."""
    hidden_images: float = 0.0
    """Share of images with a random number of hidden patches, as a teacher sees them later."""
    most_hidden: float = 0.5
    """Largest share of hidden patches in such an image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.hidden_images <= 1 or not 0 <= self.most_hidden <= 1:
            raise UserError("--hidden-images and --most-hidden are shares in 0..1")
