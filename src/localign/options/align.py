"""Options of `localign align`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

from localign.errors import UserError
from localign.options.data import DataConfig, written_decode
from localign.options.names import (
    BACKENDS,
    AttentionBackend,
    DecoderName,
    ImageSize,
    LossName,
    MaskKind,
    ObjectiveName,
    Readout,
    TargetName,
    TokenSelection,
)
from localign.options.train import TrainConfig


@dataclass(frozen=True)
class ObjectiveChoices:
    """The options that an objective accepts, with the default first."""

    targets: tuple[TargetName, ...]
    """Outputs of the teacher."""
    losses: tuple[LossName, ...] = ("mse", "cosine", "l1")
    decoders: tuple[DecoderName, ...] = ("none",)
    masked: bool = True
    """Whether the mask options apply."""


OBJECTIVE_CHOICES: Mapping[ObjectiveName, ObjectiveChoices] = {
    "maskembed": ObjectiveChoices(("penultimate", "last", "cls"), decoders=("transformer",)),
    "maskembed+": ObjectiveChoices(("penultimate", "last"), losses=("mse",), decoders=("transformer",)),
    "averaging": ObjectiveChoices(("cls", "pooled")),
    # Only the squared error has a known solution; with shapley masks it is the Shapley values.
    "additive": ObjectiveChoices(("cls", "pooled"), losses=("mse",)),
    "clipself": ObjectiveChoices(
        ("cls", "pooled"), losses=("cosine", "mse", "l1"), decoders=("none", "transformer"), masked=False
    ),
    "mim": ObjectiveChoices(("penultimate", "last")),
}


@dataclass(frozen=True)
class MaskOptions:
    """Options of the keep-masks that :class:`localign.alignment.masks.MaskSampler` draws.

    Raises:
        UserError: The kind is unknown, the keep ratio is outside (0, 1) or has no effect, or blocks have no patch.
    """

    kind: MaskKind = "uniform"
    """uniform: the number of visible patches is uniform in 0..n, then positions are uniform. bernoulli: each patch is
    visible with probability ``keep_ratio``. block: rectangles are uncovered on a hidden image until at least a share
    ``keep_ratio`` of the patches is visible; the last rectangle overshoots, at 0.4 on a 14 x 14 grid to 0.49 on
    average. Areas are uniform from ``block_min_patches`` to ``keep_ratio * n`` patches, ratios of height to width
    uniform in 0.3..1/0.3. shapley: the number k of visible patches lies in 1..n-1, with probability proportional to
    1 / (k (n - k)), then positions are uniform."""
    keep_ratio: float = 0.5
    """Share of visible patches: expected for bernoulli masks, at least for block masks. Other kinds accept only the
    default."""
    complement: bool = True
    """Also use the complement of each mask."""
    all_visible: bool = True
    """Also use a mask that hides nothing."""
    block_min_patches: int = 16
    """Area of the smallest block, in patches, before its sides are rounded."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(MaskKind):
            raise UserError(f"unknown mask kind {self.kind!r}; known: {', '.join(get_args(MaskKind))}")
        if not 0 < self.keep_ratio < 1:
            raise UserError(f"the keep ratio must lie between 0 and 1, not {self.keep_ratio}")
        if self.kind in ("uniform", "shapley") and self.keep_ratio != 0.5:
            raise UserError(
                f"{self.kind} masks draw their own number of visible patches; a keep ratio applies to bernoulli and "
                "block masks only"
            )
        if self.block_min_patches < 1:
            raise UserError(f"blocks need at least one patch, not {self.block_min_patches}")

    @property
    def masks_per_image(self) -> int:
        """Number of masks per image: 1, 2 or 3."""
        return 1 + self.complement + self.all_visible


@dataclass(frozen=True, kw_only=True)
class AlignConfig(DataConfig, TrainConfig):
    """Train a backbone with locality alignment: with MaskEmbed, or with another objective for comparison."""

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Model": "backbone weights teacher image_size max_patches model_kwargs decoder decoder_depth decoder_width "
        "decoder_layer_scale decoder_mlp soft_cap attention train_blocks reinit_blocks",
        **DataConfig.GROUPS,
        "Objective": "objective target loss loss_tokens mask keep_ratio block_min_patches complement all_visible "
        "scale_images readout readout_weight pooled_weight preserve_weight published_quirks",
        **TrainConfig.GROUPS,
    }

    objective: ObjectiveName = "maskembed"
    """Training objective: maskembed; maskembed+ (it also trains linear read-outs and keeps the pooled output);
    averaging (MaskEmbed without a decoder); additive (patch vectors that sum to the teacher's output); clipself
    (crops); or mim (the student sees masked images)."""
    backbone: str = "scenes-vit"
    """A name from `localign list backbones`, any timm name, a run or export folder, or a folder or Hub repository
    (openai/clip-vit-base-patch16) of transformers or timm."""
    weights: str = "pretrained"
    """Starting weights: pretrained, none (random), or a weight file."""
    teacher: str | None = None
    """A teacher other than the starting weights, with the same patch grid: a name, run or export folder, a folder or
    Hub repository as for --backbone, or a weight file of the backbone's architecture. Default: the starting weights."""
    image_size: ImageSize | None = None
    """Side of the input in pixels, or HEIGHTxWIDTH; default the backbone's own. Positions are resampled."""
    max_patches: int | None = None
    """Native resolution: each image keeps its aspect ratio and is resized to at most this many patches, so that a
    batch holds images of several sizes; default one size for all."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra arguments for timm's constructor, for example depth=2."""
    soft_cap: float | str | None = "auto"
    """Bound of the student's attention logits: a number, none, or auto (30 for backbone families that support it, else
    none)."""
    attention: AttentionBackend = "auto"
    """Implementation of soft-capped attention: eager, flex, or auto (flex on CUDA)."""
    target: TargetName | None = None
    """Output of the teacher to reproduce: tokens after the penultimate or the last block, the class token (cls), or the
    pooled output (pooled). Default penultimate for maskembed and mim, else cls."""
    loss: LossName | None = None
    """Reconstruction loss: mse, cosine or l1; default mse (for clipself: cosine)."""
    loss_tokens: TokenSelection = "all"
    """Tokens that count in the loss: all, hidden (prefix tokens included) or visible."""
    mask: MaskKind | None = None
    """Distribution of masks: uniform, bernoulli, block or shapley; default uniform (clipself: no masks)."""
    keep_ratio: float = 0.5
    """Share of visible patches, between 0 and 1: expected for bernoulli masks, at least for block masks, which uncover
    rectangles (0.4 in the published runs)."""
    block_min_patches: int = 16
    """Smallest block of block masks, in patches."""
    complement: bool = True
    """Also train with the complement of each mask."""
    all_visible: bool = True
    """Also train with a mask that hides nothing."""
    scale_images: int = 256
    """Number of training images used to estimate the target scale before step 0."""
    readout: Readout = "sum"
    """Of maskembed+: linear images of the patch embeddings, combined over the visible patches by sum or mean, reproduce
    the teacher's pooled output of each view."""
    readout_weight: float = 0.3
    """Of maskembed+: weight of the read-out's loss; 0 for none."""
    pooled_weight: float = 0.3
    """Of maskembed+: weight of the loss by which the decoder also gives the teacher's pooled output; 0 for none."""
    preserve_weight: float = 0.1
    """Of maskembed+: weight of the loss that keeps the student's own pooled output of the whole image, by the teacher's
    final norm and pooling; 0 for none."""
    decoder: DecoderName | None = None
    """Decoder: transformer or none; default transformer for maskembed, else none. clipself accepts both."""
    decoder_depth: int = 2
    """Number of transformer blocks in the decoder."""
    decoder_width: int | None = None
    """Channels of the decoder, a multiple of the channels of the backbone's attention heads; default the backbone's."""
    decoder_layer_scale: float | None = 1e-6
    """Initial LayerScale of the decoder; null: no LayerScale."""
    decoder_mlp: Literal["auto", "plain", "gated"] = "auto"
    """MLPs of the decoder: plain (four times as wide as the decoder), gated (SwiGLU in the encoder's proportions), or
    auto: as in the encoder. Runs of localign 0.1 have plain ones."""
    train_blocks: int | None = None
    """Train only the encoder's last N blocks, final norm and head, and the decoder; 0 freezes all blocks. Default:
    train everything."""
    reinit_blocks: int = 0
    """Start the encoder's last N blocks from random weights. In many models, the last block only serves the pooling."""
    published_quirks: bool = False
    """Train as the published code does where it differs from ours: weight decay also of norms, biases, positions and
    tokens, and a cosine that begins at step 0, under the warm-up, instead of after it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choices()
        choices = OBJECTIVE_CHOICES[self.objective]
        self._fill_in(choices)
        self._check_objective(choices)
        if choices.masked:
            self.masks()
        if self.scale_images < 1 or self.decoder_depth < 1:
            raise UserError("--scale-images and --decoder-depth must be at least 1")
        if self.loss_tokens != "all" and self.target in ("cls", "pooled"):
            raise UserError(f"--target {self.target} has no patch tokens to select; use --loss-tokens all")
        if self.decoder_layer_scale is not None and not self.decoder_layer_scale > 0:
            raise UserError(
                f"--decoder-layer-scale must be above 0, or null for none, not {self.decoder_layer_scale}"
            )
        if self.max_patches is not None:
            self._check_native(self.max_patches)
        if isinstance(self.soft_cap, str) and self.soft_cap not in ("auto", "none"):
            raise UserError(f"--soft-cap takes a number, auto or none, not {self.soft_cap!r}")

    @property
    def published_optimizer(self) -> bool:
        return self.published_quirks

    def masks(self) -> MaskOptions:
        """The mask options; only for objectives that use masks."""
        assert self.mask is not None
        return MaskOptions(
            self.mask, self.keep_ratio, self.complement, self.all_visible, self.block_min_patches
        )

    def _check_choices(self) -> None:
        choices = {
            "objective": get_args(ObjectiveName),
            "target": get_args(TargetName),
            "loss": get_args(LossName),
            "loss_tokens": get_args(TokenSelection),
            "attention": BACKENDS,
            "decoder": get_args(DecoderName),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UserError(f"{_option(name)} takes {', '.join(known)}, not {value!r}")

    def _fill_in(self, choices: ObjectiveChoices) -> None:
        """Replace None by the objective's defaults, so that the saved config is explicit."""
        defaults = {
            "target": choices.targets[0],
            "loss": choices.losses[0],
            "decoder": choices.decoders[0],
            "mask": "uniform" if choices.masked else None,
            "decode": written_decode(self, self.crop),
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)

    def _check_objective(self, choices: ObjectiveChoices) -> None:
        known = {"target": choices.targets, "loss": choices.losses, "decoder": choices.decoders}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise UserError(
                    f"--objective {self.objective} needs {_option(name)} {' or '.join(values)}, "
                    f"not {getattr(self, name)}"
                )
        if not choices.masked and (given := self._changed(*_MASK_OPTIONS)):
            raise UserError(f"--objective {self.objective} has no masks: {given} would have no effect")
        if self.objective != "maskembed+" and (given := self._changed(*_PLUS_OPTIONS)):
            raise UserError(f"{given} needs --objective maskembed+")
        for name in _PLUS_OPTIONS[1:]:
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{_option(name)} must be 0 or more, not {getattr(self, name)}")
        if self.objective == "maskembed+" and self.preserve_weight and not self.all_visible:
            raise UserError(
                "--preserve-weight needs --all-visible true, which gives the pooled output of the whole image; or set "
                "--preserve-weight 0"
            )
        if self.decoder == "none" and (given := self._changed(*_DECODER_OPTIONS)):
            raise UserError(f"--objective {self.objective} has no decoder: {given} would have no effect")
        if self.decoder == "transformer" and self.target == "pooled":
            raise UserError("--target pooled needs --decoder none; with a decoder, use --target cls")
        if self.mask != "block" and (given := self._changed("block_min_patches")):
            raise UserError(f"{given} needs --mask block")
        if self.objective == "additive" and self.mask == "shapley" and not self.all_visible:
            raise UserError(
                "--objective additive with --mask shapley needs --all-visible true: "
                "Shapley values sum to the output for the whole image"
            )

    def _check_native(self, max_patches: int) -> None:
        if max_patches < 4:
            raise UserError(f"--max-patches must be at least 4, not {max_patches}")
        if self.objective != "maskembed" or self.target not in ("penultimate", "last"):
            raise UserError(
                "--max-patches needs --objective maskembed and --target penultimate or last, whose targets are tokens"
            )
        if self.mask == "block":
            raise UserError(
                "--max-patches makes grids too narrow for blocks; use --mask uniform or bernoulli"
            )
        if given := self._changed("crop", "decode", "mixup", "cutmix", "compile"):
            raise UserError(
                f"{given} does not apply to images of several sizes; leave out --max-patches or it"
            )

    def _changed(self, *names: str) -> str:
        """The named options that differ from their defaults, as a user writes them."""
        defaults = {f.name: f.default for f in fields(self)}
        return ", ".join(_option(name) for name in names if getattr(self, name) != defaults[name])


def saved_align_config(values: Mapping[str, Any]) -> AlignConfig:
    """The options in the ``config.yaml`` of a run, which holds lists for tuples."""
    return AlignConfig(**{**values, "betas": tuple(values["betas"])})


_PLUS_OPTIONS = ("readout", "readout_weight", "pooled_weight", "preserve_weight")
_DECODER_OPTIONS = ("decoder_depth", "decoder_width", "decoder_layer_scale", "decoder_mlp")
_MASK_OPTIONS = ("mask", "keep_ratio", "block_min_patches", "complement", "all_visible")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
