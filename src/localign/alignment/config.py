"""Options of `localign align`."""

from dataclasses import dataclass, field, fields
from typing import Any

from localign.alignment.losses import LOSS_NAMES, TOKEN_SELECTIONS, LossName, TokenSelection
from localign.alignment.masks import MaskKind, MaskSampler
from localign.alignment.objectives import OBJECTIVES, DecoderName, Objective, ObjectiveName
from localign.alignment.teacher import TARGETS, TargetName
from localign.backbones import AttentionBackend
from localign.backbones.attention import BACKENDS
from localign.data.config import DataConfig, written_decode
from localign.engine.config import TrainConfig
from localign.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AlignConfig(DataConfig, TrainConfig):
    """Locality alignment of one backbone by MaskEmbed, or by an objective that it is compared with."""

    objective: ObjectiveName = "maskembed"
    """maskembed; averaging (MaskEmbed without decoder), additive, clipself (crops), or mim (masked input)."""
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
    target: TargetName | None = None
    """What the teacher gives: tokens after the penultimate or the last block, its cls token, or its pooled output
    by any pooling; default penultimate (maskembed, mim) or cls (the others)."""
    loss: LossName | None = None
    """mse, cosine or l1; default mse (for clipself: cosine)."""
    loss_tokens: TokenSelection = "all"
    """Tokens the loss goes over: all, hidden (prefix tokens included) or visible."""
    mask: MaskKind | None = None
    """uniform, bernoulli, block or shapley; default uniform (for clipself, which crops: none)."""
    keep_ratio: float = 0.5
    """Share of patches kept by bernoulli and block masks."""
    block_min_patches: int = 16
    """Smallest block of block masks, patches."""
    complement: bool = True
    """Also train with the complement of each mask."""
    all_visible: bool = True
    """Also train with the mask that hides nothing."""
    scale_images: int = 256
    """Training images from which the target scale is estimated before step 0."""
    decoder: DecoderName | None = None
    """transformer or none; default transformer for maskembed, which needs it, else none; clipself takes either."""
    decoder_depth: int = 2
    """Blocks of the decoder."""
    decoder_layer_scale: float | None = 1e-6
    """Initial LayerScale of the decoder; null for none."""
    train_blocks: int | None = None
    """Train only the encoder's last N blocks, its norm and head, and the decoder; default all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choices()
        objective = OBJECTIVES[self.objective]
        self._fill_in(objective)
        self._check_objective(objective)
        if objective.masked:
            self.masks()
        if self.scale_images < 1 or self.decoder_depth < 1:
            raise UserError("--scale-images and --decoder-depth must be at least 1")
        if self.loss_tokens != "all" and self.target in ("cls", "pooled"):
            raise UserError(f"--target {self.target} has no patch tokens to select; use --loss-tokens all")
        if self.decoder_layer_scale is not None and not self.decoder_layer_scale > 0:
            raise UserError(
                f"--decoder-layer-scale must be above 0, or null for none, not {self.decoder_layer_scale}"
            )
        if isinstance(self.soft_cap, str) and self.soft_cap not in ("auto", "none"):
            raise UserError(f"--soft-cap takes a number, auto or none, not {self.soft_cap!r}")

    def masks(self) -> MaskSampler:
        """The sampler these options describe; not for objectives without masks."""
        assert self.mask is not None
        return MaskSampler(
            self.mask, self.keep_ratio, self.complement, self.all_visible, self.block_min_patches
        )

    def _check_choices(self) -> None:
        choices = {
            "objective": tuple(OBJECTIVES),
            "target": TARGETS,
            "loss": LOSS_NAMES,
            "loss_tokens": TOKEN_SELECTIONS,
            "attention": BACKENDS,
            "decoder": ("transformer", "none"),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UserError(f"{_option(name)} takes {', '.join(known)}, not {value!r}")

    def _fill_in(self, objective: type[Objective]) -> None:
        """Put the objective's defaults where nothing was given, so that what is saved explains itself."""
        defaults = {
            "target": objective.targets[0],
            "loss": objective.losses[0],
            "decoder": objective.decoders[0],
            "mask": "uniform" if objective.masked else None,
            "decode": written_decode(self, self.crop),
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)

    def _check_objective(self, objective: type[Objective]) -> None:
        known = {"target": objective.targets, "loss": objective.losses, "decoder": objective.decoders}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise UserError(
                    f"--objective {self.objective} goes with {_option(name)} {' or '.join(values)}, "
                    f"not {getattr(self, name)}"
                )
        if not objective.masked and (given := self._changed(*_MASK_OPTIONS)):
            raise UserError(f"--objective {self.objective} has no masks: {given} would have no effect")
        if self.decoder == "none" and (given := self._changed("decoder_depth", "decoder_layer_scale")):
            raise UserError(f"--objective {self.objective} has no decoder: {given} would have no effect")
        if self.decoder == "transformer" and self.target == "pooled":
            raise UserError(
                "--target pooled is for --decoder none; a decoder answers at the class token: cls"
            )
        if self.mask != "block" and (given := self._changed("block_min_patches")):
            raise UserError(f"{given} goes with --mask block")
        if self.objective == "additive" and self.mask == "shapley" and not self.all_visible:
            raise UserError(
                "--objective additive with --mask shapley needs --all-visible true: "
                "Shapley values sum to what the whole image gives"
            )

    def _changed(self, *names: str) -> str:
        """Those of the options that are not at their default, as a user writes them."""
        defaults = {f.name: f.default for f in fields(self)}
        return ", ".join(_option(name) for name in names if getattr(self, name) != defaults[name])


_MASK_OPTIONS = ("mask", "keep_ratio", "block_min_patches", "complement", "all_visible")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
