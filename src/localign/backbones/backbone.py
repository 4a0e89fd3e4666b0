"""A vision transformer behind one small interface."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from localign.backbones.attention import apply_soft_cap
from localign.backbones.preprocessing import UNSTATED, Preprocessing
from localign.errors import UserError
from localign.options.names import AttentionBackend
from localign.portable.native_localign_vlm import PositionInterpolation
from localign.weights import pixel_statistics

FAMILIES = (VisionTransformer, Eva, Beit)
FinalNorm = Literal["norm", "fc_norm", "none"]


class Backbone(nn.Module):
    """A timm ViT that returns the token sequence of any layer.

    Tokens come from timm's ``forward_intermediates``. The methods of the timm model are never replaced.

    Args:
        vit: A timm VisionTransformer, Eva or Beit model, built with ``num_classes=0``.
        name: The name in reports.
        architecture: timm's registered name, with which the model can be built again.
        model_kwargs: Further arguments of timm's constructor.
        mean, std: Pixel statistics per RGB channel, for pixels in 0..1.
        soft_cap: Bound of the attention logits, or None for ordinary attention.
        attention: Back-end of soft-capped attention.
        final_norm: The norm that :meth:`tokens` applies to each token. The default is the ViT's ``norm``, which is an
            identity in models that normalise after pooling. Aligned models of that kind use ``"fc_norm"``.
        preprocessing: How images are resized, as far as the model's folder states it.
        position_interpolation: How position embeddings are resampled to other grids.

    Raises:
        UserError: The model is of another family or has an unsupported structure, or the pixel statistics are no
            usable numbers.
    """

    vit: Any
    """The timm model. It has no static type, because torch modules do not declare their attributes."""

    def __init__(
        self,
        vit: nn.Module,
        *,
        name: str,
        architecture: str,
        model_kwargs: dict[str, Any] | None = None,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        soft_cap: float | None = None,
        attention: AttentionBackend = "auto",
        final_norm: FinalNorm = "norm",
        preprocessing: Preprocessing = UNSTATED,
        position_interpolation: PositionInterpolation = "bicubic",
    ) -> None:
        super().__init__()
        if not isinstance(vit, FAMILIES):
            families = ", ".join(f.__name__ for f in FAMILIES)
            raise UserError(f"{name} is a {type(vit).__name__}; localign takes timm's {families} models")
        _check_structure(vit, name)
        self.vit = vit
        self.name = name
        self.architecture = architecture
        self.model_kwargs = dict(model_kwargs or {})
        self.mean, self.std = pixel_statistics(mean, "mean", name), pixel_statistics(std, "std", name)
        self.soft_cap = soft_cap
        self.attention = attention
        self.final_norm = final_norm
        self.preprocessing = preprocessing
        self.position_interpolation = position_interpolation
        if soft_cap is not None:
            apply_soft_cap(vit, soft_cap, attention)

    @property
    def image_size(self) -> tuple[int, int]:
        """Input height and width in pixels."""
        height, width = self.vit.patch_embed.img_size
        return int(height), int(width)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Patch height and width in pixels."""
        height, width = self.vit.patch_embed.patch_size
        return int(height), int(width)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches. Pixels to the right of or below the last full patch belong to no patch."""
        rows, columns = self.vit.patch_embed.grid_size
        return int(rows), int(columns)

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class and register tokens, which come before the patches."""
        return int(self.vit.num_prefix_tokens)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return int(self.vit.embed_dim)

    @property
    def depth(self) -> int:
        return len(self.vit.blocks)

    @property
    def num_heads(self) -> int:
        return int(self.vit.blocks[0].attn.num_heads)

    @property
    def activation(self) -> type[nn.Module]:
        """The class of the MLPs' activation (exact GELU, quick GELU, SiLU, ...)."""
        found: nn.Module = getattr(self.vit.blocks[0].mlp, "act", nn.GELU())
        return type(found)

    @property
    def qkv_bias(self) -> bool:
        """Whether queries (and values) have a bias. In EVA and BEiT it is not part of the linear layer."""
        attn = self.vit.blocks[0].attn
        if getattr(attn, "q_bias", None) is not None:
            return True
        projection = attn.qkv if attn.qkv is not None else attn.q_proj
        return projection.bias is not None

    def block_index(self, layer: int) -> int:
        """The position 0..depth-1 of a layer, which may be counted from the end (-1 = last block).

        Raises:
            UserError: There is no such block.
        """
        index = layer if layer >= 0 else self.depth + layer
        if not 0 <= index < self.depth:
            raise UserError(f"{self.name} has {self.depth} blocks; there is no layer {layer}")
        return index

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise pixels with the backbone's statistics.

        Args:
            images: uint8 ``(batch, 3, height, width)``, 0..255.

        Returns:
            float32, same shape: ``(pixel / 255 - mean) / std``.
        """
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1)
        return (images.float() / 255 - mean) / std

    def tokens(self, images: Tensor, layer: int = -1, norm: bool = True) -> Tensor:
        """The token sequence after one block. Later blocks are not run.

        Args:
            images: Normalised, ``(batch, 3, height, width)``.
            layer: The block, 0-based or counted from the end.
            norm: Apply the final norm, also after an earlier block.

        Returns:
            ``(batch, num_prefix_tokens + num_patches, width)``, prefix tokens first, patches in row order.
        """
        prefix = self.num_prefix_tokens
        features = self.vit.forward_intermediates(
            images,
            indices=[self.block_index(layer)],
            return_prefix_tokens=prefix > 0,
            norm=False,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )[0]
        tokens = torch.cat([features[1], features[0]], dim=1) if prefix else features
        return self.normalise_tokens(tokens) if norm else tokens

    def tokens_and_pooled(self, images: Tensor, layer: int = -1) -> tuple[Tensor, Tensor]:
        """:meth:`tokens` after one block, with the final norm, and :meth:`pooled`, from one pass."""
        prefix = self.num_prefix_tokens
        last, found = self.vit.forward_intermediates(
            images,
            indices=[self.block_index(layer)],
            return_prefix_tokens=prefix > 0,
            norm=False,
            output_fmt="NLC",
        )
        tokens = torch.cat([found[0][1], found[0][0]], dim=1) if prefix else found[0]
        return self.normalise_tokens(tokens), self.vit.forward_head(last, pre_logits=True)

    def pool(self, tokens: Tensor) -> Tensor:
        """The pooled output ``(batch, width)`` of the last block's tokens without norm, ``(batch, tokens, width)``."""
        output: Tensor = self.vit.forward_head(self.vit.norm(tokens), pre_logits=True)
        return output

    def normalise_tokens(self, tokens: Tensor) -> Tensor:
        """Apply the final norm to every token ``(..., width)``."""
        if self.final_norm == "none":
            return tokens
        norm = self.vit.norm if self.final_norm == "norm" else self.vit.fc_norm
        normalised: Tensor = norm(tokens)
        return normalised

    def pooled(self, images: Tensor) -> Tensor:
        """The model's own pooled output, ``(batch, width)``, of normalised images."""
        output: Tensor = self.vit.forward_head(self.vit.forward_features(images), pre_logits=True)
        return output

    def forward(self, images: Tensor) -> Tensor:
        """Last-layer tokens of normalised images, after the final norm."""
        return self.tokens(images)

    def copy(self, *, soft_cap: float | None = None, attention: AttentionBackend | None = None) -> Backbone:
        """A deep copy. Without ``soft_cap`` and ``attention`` the copy keeps the cap and back-end of the original."""
        twin = copy.deepcopy(self)
        twin.attention = attention or self.attention
        twin.soft_cap = self.soft_cap if soft_cap is None else soft_cap
        if twin.soft_cap is not None:
            apply_soft_cap(twin.vit, twin.soft_cap, twin.attention)
        return twin

    def extra_repr(self) -> str:
        rows, columns = self.grid
        return f"{self.name}: {self.num_prefix_tokens} + {rows}x{columns} tokens of {self.width}"


def _check_structure(vit: Any, name: str) -> None:
    grid = vit.patch_embed.grid_size
    if grid is None:
        raise UserError(f"{name} has no fixed patch grid; give it an image size")
    for pixels, patch, count in zip(vit.patch_embed.img_size, vit.patch_embed.patch_size, grid, strict=True):
        if pixels < patch:
            raise UserError(
                f"{name} has patches of {patch} pixels, more than an image size of {pixels}; give --image-size {patch} "
                "or more"
            )
        if pixels // patch != count:  # a convolutional stem: its patches overlap
            raise UserError(
                f"{name} does not cut the image into {patch}-pixel patches; hybrids are not supported"
            )
    _check_divisible(vit.patch_embed, name)
    if not all(hasattr(block, "attn") and hasattr(block, "mlp") for block in vit.blocks):
        raise UserError(
            f"{name} has parallel blocks ({type(vit.blocks[0]).__name__}), which are not supported"
        )


def _check_divisible(embedding: Any, name: str) -> None:
    """Models that take images of any size take no image that ends within a patch; others cut the rest off."""
    if getattr(embedding, "strict_img_size", True) or getattr(embedding, "dynamic_img_pad", False):
        return
    check_divisible(embedding.img_size, embedding.patch_size, name)


def check_divisible(size: Sequence[int], patches: Sequence[int], name: str) -> None:
    """Check that patches cover an image. Both sizes are height and width in pixels.

    Raises:
        UserError: A side of the image is not a multiple of the patch's; the line suggests the nearest multiples.
    """
    for pixels, patch in zip(size, patches, strict=True):
        if pixels % patch:
            below = pixels // patch * patch
            nearest = f"{below} or {below + patch}" if below else str(patch)
            raise UserError(
                f"{name} has patches of {patch} pixels, which do not divide {pixels}; give --image-size {nearest}"
            )
