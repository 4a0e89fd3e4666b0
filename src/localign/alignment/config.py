"""Options of `localign align`."""

from dataclasses import dataclass, field
from typing import Any

from localign.alignment.losses import LOSS_NAMES, TOKEN_SELECTIONS, LossName, TokenSelection
from localign.alignment.masks import MaskKind, MaskSampler
from localign.alignment.teacher import TARGETS, TargetName
from localign.backbones import AttentionBackend
from localign.backbones.attention import BACKENDS
from localign.data.config import DataConfig
from localign.engine.config import TrainConfig
from localign.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AlignConfig(DataConfig, TrainConfig):
    """Locality alignment of one backbone by MaskEmbed (section 3.2 of the paper)."""

    backbone: str = "scenes-vit"
    """A name of `localign list backbones`, any timm name, hf-hub:..., local-dir:..., or an export folder."""
    weights: str = "pretrained"
    """pretrained, none (random), or a weight file."""
    image_size: int | None = None
    """Side of the square input, pixels; default the backbone's own."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm's constructor, for example depth=2."""
    soft_cap: float | str | None = "auto"
    """Bound of the student's attention logits; auto: 30 where the backbone's family has it, else none."""
    attention: AttentionBackend = "auto"
    """Back-end of soft-capped attention: eager, flex, or auto (flex on CUDA)."""
    target: TargetName = "penultimate"
    """What the teacher gives: tokens after the second-to-last block, after the last, or its pooled cls."""
    loss: LossName = "mse"
    """mse, cosine or l1."""
    loss_tokens: TokenSelection = "all"
    """Tokens the loss goes over: all, hidden (prefix tokens included) or visible."""
    mask: MaskKind = "uniform"
    """uniform, bernoulli or block."""
    keep_ratio: float = 0.5
    """Share of patches kept by bernoulli and block masks."""
    complement: bool = True
    """Also train with the complement of each mask."""
    all_visible: bool = True
    """Also train with the mask that hides nothing."""
    scale_images: int = 256
    """Training images from which the target scale is estimated before step 0."""
    decoder_depth: int = 2
    """Blocks of the decoder."""
    decoder_layer_scale: float | None = 1e-6
    """Initial LayerScale of the decoder; null for none."""
    train_blocks: int | None = None
    """Train only the encoder's last N blocks, its norm and head, and the decoder; default all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.masks()
        if self.scale_images < 1 or self.decoder_depth < 1:
            raise UserError("--scale-images and --decoder-depth must be at least 1")
        choices = {
            "target": TARGETS,
            "loss": LOSS_NAMES,
            "loss_tokens": TOKEN_SELECTIONS,
            "attention": BACKENDS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"--{name.replace('_', '-')} takes {', '.join(known)}, not {getattr(self, name)!r}"
                )
        if self.loss_tokens != "all" and self.target == "cls":
            raise UserError("--target cls has no patch tokens to select; use --loss-tokens all")
        if self.decoder_layer_scale is not None and not self.decoder_layer_scale > 0:
            raise UserError(
                f"--decoder-layer-scale must be above 0, or null for none, not {self.decoder_layer_scale}"
            )
        if isinstance(self.soft_cap, str) and self.soft_cap not in ("auto", "none"):
            raise UserError(f"--soft-cap takes a number, auto or none, not {self.soft_cap!r}")

    def masks(self) -> MaskSampler:
        """The sampler these options describe."""
        return MaskSampler(self.mask, self.keep_ratio, self.complement, self.all_visible)
