"""Images of several sizes through a backbone. The fixed grid of :class:`~localign.backbones.Backbone` is untouched.

The code is that of exported vision-language models, :mod:`localign.portable.native_localign_vlm`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from localign.backbones.backbone import Backbone
from localign.errors import UserError
from localign.portable.native_localign_vlm import (
    Grid,
    NativeImages,
    grid_positions,
    native_grid,
    padded_patches,
    patchify,
    run_blocks,
    vit_tokens_of,
)

__all__ = [
    "Grid",
    "NativeImages",
    "check_native",
    "grid_positions",
    "native_batch",
    "native_grid",
    "native_tokens",
    "normalised",
    "padded_patches",
    "patchify",
    "run_blocks",
]


def normalised(backbone: Backbone, patches: Tensor, grids: tuple[Grid, ...]) -> NativeImages:
    """Pixels as images for a backbone.

    Args:
        backbone: Its mean and standard deviation are used.
        patches: uint8 ``(images, longest, 3 * patch height * patch width)``, in the order of :func:`patchify`.
        grids: The grid of each image.

    Returns:
        float32 images, with 0 behind the patches of each.
    """
    return NativeImages(patches, grids).normalised(backbone.mean, backbone.std, torch.float32)


def native_batch(backbone: Backbone, images: Sequence[Tensor], longest: int) -> NativeImages:
    """Images of several sizes, uint8 ``(3, height, width)`` in whole patches, padded to ``longest`` patches."""
    return normalised(backbone, *padded_patches(images, backbone.patch_size, longest))


def check_native(backbone: Backbone) -> None:
    """Check that a backbone's tokens can be computed on any grid.

    Raises:
        UserError: Its positions are not one embedding, or it has parts beside those of a plain ViT.
    """
    vit = backbone.vit
    plain = type(vit) is VisionTransformer and vit.pos_embed is not None and not vit.dynamic_img_size
    if not plain or not isinstance(vit.patch_drop, nn.Identity):
        raise UserError(
            f"images of several sizes need a ViT with a position embedding; {backbone.name} is a {type(vit).__name__} "
            "of another kind"
        )


def native_tokens(backbone: Backbone, images: NativeImages, layer: int = -1, norm: bool = True) -> Tensor:
    """The token sequences after one block, as :meth:`Backbone.tokens` for images of one size.

    Args:
        backbone: One that :func:`check_native` accepts.
        images: Images of any sizes.
        layer: The block, 0-based or counted from the end.
        norm: Apply the final norm, also after an earlier block.

    Returns:
        ``(images, num_prefix_tokens + longest, width)``, prefix tokens first. The tokens behind an image's patches
        have no meaning.
    """
    blocks = backbone.block_index(layer) + 1
    x = vit_tokens_of(backbone.vit, images, blocks, backbone.position_interpolation)
    return backbone.normalise_tokens(x) if norm else x
