"""The vision tower: one or several frozen ViTs that turn pixels into one token sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from localign.backbones import Backbone
from localign.backbones.backbone import FinalNorm
from localign.backbones.building import build_described_vit
from localign.backbones.native import Grid, NativeImages, check_native, native_tokens
from localign.backbones.preprocessing import Preprocessing
from localign.errors import UserError
from localign.portable.native_localign_vlm import PositionInterpolation


@dataclass(frozen=True)
class TowerConfig:
    """Everything needed to rebuild one backbone except its weights, and which of its tokens to use.

    ``dataclasses.asdict`` returns JSON-compatible values, from which ``TowerConfig(**values)`` restores an equal
    config.
    """

    name: str
    """Name of the backbone in errors and reports."""
    architecture: str
    """timm's registered name."""
    model_kwargs: dict[str, Any]
    """Further arguments for timm."""
    mean: tuple[float, ...]
    """Pixel mean per RGB channel, for pixels in 0..1."""
    std: tuple[float, ...]
    """Pixel standard deviation per RGB channel, for pixels in 0..1."""
    layer: int
    """The block whose output is used, counted from 0; the tower has no later blocks."""
    norm: bool
    """Whether to apply the final norm; if False, the tower has none."""
    keep_prefix: bool
    """Whether class and register tokens stay in the sequence, before the patches."""
    soft_cap: float | None = None
    """Soft cap of the attention logits, or None for ordinary attention."""
    final_norm: FinalNorm = "norm"
    """Attribute name of the ViT's final norm."""
    norm_class: str | None = None
    """Class name of the final norm; ``"LayerNorm"`` if alignment replaced a norm of another class."""
    norm_eps: float | None = None
    """eps of the final norm in training, which may differ from timm's value."""
    interpolation: str | None = None
    """Resampling filter of images that the backbone's folder states, or None."""
    position_interpolation: PositionInterpolation = "bicubic"
    """How the position embedding is resampled to the grids of images of several sizes."""

    def __post_init__(self) -> None:
        kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in self.model_kwargs.items()}
        object.__setattr__(self, "model_kwargs", kwargs)  # JSON has no tuples
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))

    @classmethod
    def of(cls, backbone: Backbone, *, layer: int, norm: bool, keep_prefix: bool) -> TowerConfig:
        """Describe a backbone; ``layer`` may count from the end (-1 = last block).

        Raises:
            UserError: The backbone has no such block.
        """
        final = getattr(backbone.vit, backbone.final_norm, None)
        return cls(
            name=backbone.name,
            architecture=backbone.architecture,
            model_kwargs=dict(backbone.model_kwargs),
            mean=backbone.mean,
            std=backbone.std,
            layer=backbone.block_index(layer),
            norm=norm,
            keep_prefix=keep_prefix,
            soft_cap=backbone.soft_cap,
            final_norm=backbone.final_norm,
            norm_class=type(final).__name__ if final is not None else None,
            norm_eps=getattr(final, "eps", None),
            interpolation=backbone.preprocessing.interpolation,
            position_interpolation=backbone.position_interpolation,
        )

    def build(self) -> Backbone:
        """Build the backbone, cut to the blocks in use, with random weights; works under ``torch.device("meta")``.

        Raises:
            UserError: timm cannot build the backbone, or it has no such block.
        """
        vit = build_described_vit(self.architecture, self.model_kwargs, f"the tower {self.name}")
        if self.norm_class is not None and self.final_norm != "none":
            norm = getattr(vit, self.final_norm)
            if self.norm_class == "LayerNorm" and not isinstance(norm, nn.LayerNorm):
                norm = nn.LayerNorm(vit.embed_dim)
                setattr(vit, self.final_norm, norm)
            if self.norm_eps is not None:
                norm.eps = self.norm_eps
        backbone = Backbone(
            vit,
            name=self.name,
            architecture=self.architecture,
            model_kwargs=self.model_kwargs,
            mean=self.mean,
            std=self.std,
            soft_cap=self.soft_cap,
            final_norm=self.final_norm,
            preprocessing=Preprocessing(self.interpolation),
            position_interpolation=self.position_interpolation,
        )
        return self.cut(backbone)

    def cut(self, backbone: Backbone) -> Backbone:
        """Remove the blocks after ``layer``, pooling and unused norms, in place."""
        vit = backbone.vit
        vit.blocks = vit.blocks[: backbone.block_index(self.layer) + 1]
        vit.reset_classifier(0, "")
        for name in ("norm", "fc_norm"):
            if hasattr(vit, name) and not (self.norm and name == self.final_norm):
                setattr(vit, name, nn.Identity())
        return backbone


class VisionTower(nn.Module):
    """Frozen backbones side by side, whose tokens are concatenated on channels in order.

    The tower stays in eval mode and computes no gradients until ``set_trainable(True)``.

    Args:
        configs: One per backbone. Several backbones must share image size and patch grid, and drop prefix tokens.
        backbones: Backbones whose weights are copied, in the same order; default random weights.

    Raises:
        UserError: There is no backbone, or two do not fit together; the error names them.
    """

    def __init__(self, configs: Sequence[TowerConfig], backbones: Sequence[Backbone] | None = None) -> None:
        super().__init__()
        if not configs:
            raise UserError("a vision-language model needs at least one backbone")
        self.configs = tuple(configs)
        if backbones is None:
            towers = [config.build() for config in self.configs]
        else:
            towers = [c.cut(b.copy()) for c, b in zip(self.configs, backbones, strict=True)]
        self.towers = nn.ModuleList(towers)
        self._check()
        self.set_trainable(False)

    def _check(self) -> None:
        first, *others = self.backbones
        for other in others:
            if other.image_size != first.image_size or other.grid != first.grid:
                raise UserError(
                    f"{first.name} ({_size(first)}) and {other.name} ({_size(other)}) cannot be fused: "
                    "their image sizes and patch grids differ"
                )
        if others and any(config.keep_prefix for config in self.configs):
            names = " and ".join(config.name for config in self.configs)
            raise UserError(f"{names} can be fused only without their prefix tokens")

    def check_native(self) -> None:
        """Check that the tower takes images of several sizes.

        Raises:
            UserError: A backbone's positions fit one grid only, or two backbones have patches of different sizes.
        """
        first, *others = self.backbones
        for backbone in self.backbones:
            check_native(backbone)
        for other in others:
            if other.patch_size != first.patch_size:
                raise UserError(
                    f"{first.name} (patches of {first.patch_size[0]} pixels) and {other.name} (of "
                    f"{other.patch_size[0]}) cannot be fused at native resolution; leave out --max-patches"
                )

    def blank_image(self, native: bool) -> tuple[Tensor, tuple[Grid, ...] | None]:
        """One black image on the tower's device: its pixels, and its grid if it is of one patch (``native``)."""
        height, width = self.backbones[0].patch_size
        shape = (1, 1, 3 * height * width) if native else (1, 3, *self.image_size)
        device = next(self.parameters()).device
        return torch.zeros(shape, dtype=torch.uint8, device=device), ((1, 1),) if native else None

    @property
    def backbones(self) -> list[Backbone]:
        """The backbones in order."""
        return cast(list[Backbone], list(self.towers))

    @property
    def name(self) -> str:
        """The backbones' names, joined by ``" + "``."""
        return " + ".join(config.name for config in self.configs)

    @property
    def image_size(self) -> tuple[int, int]:
        """Input height and width in pixels."""
        return self.backbones[0].image_size

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches of an image of :attr:`image_size`."""
        return self.backbones[0].grid

    @property
    def num_patches(self) -> int:
        return self.backbones[0].num_patches

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens in the sequence; 0 if they are dropped."""
        return self.backbones[0].num_prefix_tokens if self.configs[0].keep_prefix else 0

    @property
    def num_tokens(self) -> int:
        """Length of the sequence: kept prefix tokens, then patches in row order."""
        return self.num_prefix_tokens + self.num_patches

    @property
    def width(self) -> int:
        """Channels of a token, summed over the backbones."""
        return sum(tower.width for tower in self.backbones)

    @property
    def trainable(self) -> bool:
        """Whether gradients reach the backbones."""
        return self._trainable

    def set_trainable(self, trainable: bool) -> VisionTower:
        """Freeze or unfreeze the backbones."""
        self._trainable = trainable
        self.requires_grad_(trainable)
        return self.train(trainable)

    def train(self, mode: bool = True) -> VisionTower:
        """Frozen backbones stay in eval mode."""
        super().train(mode and self._trainable)
        return self

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that weight files do not hold (rotary and relative positions of EVA and BEiT).

        Call it once after a tower that was built on the meta device has received its weights.
        """
        for module in self.towers.modules():
            init = getattr(module, "init_non_persistent_buffers", None)
            if init is not None:
                init()

    def forward(self, pixel_values: Tensor | NativeImages) -> Tensor:
        """Map pixels to tokens.

        Args:
            pixel_values: uint8 ``(batch, 3, height, width)`` of :attr:`image_size`, not normalised; each
                backbone applies its own mean and standard deviation. Or images of several sizes, likewise uint8.

        Returns:
            ``(batch, num_tokens, width)`` in the backbones' dtype; without gradient unless trainable. Of images of
            several sizes ``(batch, num_prefix_tokens + longest, width)``, without meaning behind an image's patches.

        Raises:
            ValueError: ``pixel_values`` has another dtype or shape.
        """
        if isinstance(pixel_values, NativeImages):
            self._check_patches(pixel_values)
        elif pixel_values.dtype != torch.uint8 or tuple(pixel_values.shape[1:]) != (3, *self.image_size):
            height, width = self.image_size
            raise ValueError(
                f"pixel_values must be uint8 (batch, 3, {height}, {width}), "
                f"not {pixel_values.dtype} {tuple(pixel_values.shape)}"
            )
        with torch.set_grad_enabled(self._trainable and torch.is_grad_enabled()):
            tokens = [self._tokens(i, pixel_values) for i in range(len(self.configs))]
        return tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=-1)

    def _check_patches(self, images: NativeImages) -> None:
        patches, (height, width) = images.patches, self.backbones[0].patch_size
        expected = (len(images), max(rows * columns for rows, columns in images.grids), 3 * height * width)
        fits = patches.dim() == 3 and patches.shape[1] >= expected[1]
        if patches.dtype != torch.uint8 or not fits or patches.shape[::2] != expected[::2]:
            raise ValueError(
                f"pixel_values must be uint8 {expected}, or longer, for the grids of {len(images)} images, not "
                f"{patches.dtype} {tuple(patches.shape)}"
            )

    def _tokens(self, index: int, pixel_values: Tensor | NativeImages) -> Tensor:
        config, backbone = self.configs[index], self.backbones[index]
        dtype = next(backbone.parameters()).dtype
        if isinstance(pixel_values, NativeImages):
            native = pixel_values.normalised(backbone.mean, backbone.std, dtype)
            tokens = native_tokens(backbone, native, layer=config.layer, norm=config.norm)
        else:
            images = backbone.normalise(pixel_values).to(dtype)
            tokens = backbone.tokens(images, layer=config.layer, norm=config.norm)
        return tokens if config.keep_prefix else tokens[:, backbone.num_prefix_tokens :]


def _size(backbone: Backbone) -> str:
    height, width = backbone.image_size
    rows, columns = backbone.grid
    return f"{height} x {width} pixels, {rows} x {columns} patches"
