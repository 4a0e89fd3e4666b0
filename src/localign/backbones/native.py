"""Images of several sizes in one batch: each keeps its own grid of patches.

A plain ViT needs no grid of its own: its patch embedding is a linear layer, its position embedding is resampled to each
image's grid, and attention leaves out the padding behind the patches of shorter images. The fixed grid of
:class:`~localign.backbones.Backbone` is untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from localign.backbones.backbone import Backbone, PositionInterpolation, resample_positions
from localign.errors import UserError

Grid = tuple[int, int]
"""Rows and columns of patches."""


@dataclass(frozen=True)
class NativeImages:
    """Normalised images as patches, padded to the longest."""

    patches: Tensor
    """``(images, longest, 3 * patch height * patch width)``: patches in row order, pixels in the order channel, row,
    column. Padding is 0."""
    grids: tuple[Grid, ...]
    """The grid of each image."""

    @classmethod
    def of(cls, patches: Tensor, grids: Tensor | Sequence[Sequence[int]]) -> NativeImages:
        """Patches and the rows and columns of each image, as a batch has them."""
        listed = grids.tolist() if isinstance(grids, Tensor) else grids
        return cls(patches, tuple((int(rows), int(columns)) for rows, columns in listed))

    def __len__(self) -> int:
        return len(self.grids)

    def __getitem__(self, images: slice) -> NativeImages:
        return NativeImages(self.patches[images], self.grids[images])

    def valid(self, num_prefix_tokens: int = 0) -> Tensor:
        """bool ``(images, num_prefix_tokens + longest)``: True for tokens, False for padding."""
        lengths = [rows * columns for rows, columns in self.grids]
        counts = torch.tensor(lengths, device=self.patches.device)[:, None] + num_prefix_tokens
        return torch.arange(num_prefix_tokens + self.patches.shape[1], device=counts.device) < counts

    def attention_mask(self, num_prefix_tokens: int) -> Tensor | None:
        """bool ``(images, 1, 1, tokens)``, True for tokens that may be attended to; None if there is no padding."""
        longest = self.patches.shape[1]
        if all(rows * columns == longest for rows, columns in self.grids):
            return None
        return self.valid(num_prefix_tokens)[:, None, None]

    def masked(self, keep_mask: Tensor) -> NativeImages:
        """Every view of every image: hidden patches are 0, the mean colour.

        Args:
            keep_mask: bool ``(images, masks, longest)``, True = visible.

        Returns:
            ``images * masks`` images; the views of one image are adjacent.
        """
        views = self.patches[:, None] * keep_mask[..., None].to(self.patches.dtype)
        return NativeImages(views.flatten(0, 1), self.repeated(keep_mask.shape[1]))

    def repeated(self, times: int) -> tuple[Grid, ...]:
        """The grids with each repeated ``times`` times in a row."""
        return tuple(grid for grid in self.grids for _ in range(times))


def native_grid(height: int, width: int, patch: tuple[int, int], most: int) -> Grid:
    """The largest grid of at most ``most`` patches that an image of this shape fills, whole patches rounded up.

    The image is scaled by one factor until one more patch would be too many, as SigLIP 2 and NaFlex do.

    Args:
        height, width: Of the image, pixels.
        patch: Patch height and width, pixels.
        most: Largest number of patches.
    """
    down, right = height * patch[1], width * patch[0]  # columns per row of patches: right / down
    by_rows = ((rows, -(-rows * right // down)) for rows in range(1, most + 1))
    by_columns = ((-(-columns * down // right), columns) for columns in range(1, most + 1))
    fitting = [grid for grid in (*by_rows, *by_columns) if grid[0] * grid[1] <= most]
    # A strip of more than ``most`` patches is squeezed.
    return max(fitting, default=(1, most) if width > height else (most, 1), key=sum)


def patchify(image: Tensor, patch: tuple[int, int]) -> Tensor:
    """``(3, height, width)`` as patches in row order, ``(patches, 3 * patch height * patch width)``."""
    height, width = patch
    cut = image.unfold(1, height, height).unfold(2, width, width)  # channel, row, column, pixels
    return cut.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)


def padded_patches(
    images: Sequence[Tensor], patch: tuple[int, int], longest: int | None = None
) -> tuple[Tensor, tuple[Grid, ...]]:
    """Images of several sizes as patches padded with 0, ``(images, longest, 3 * height * width)``, and their grids.

    Args:
        images: At least one, ``(3, height, width)`` in whole patches.
        patch: Patch height and width, pixels.
        longest: Patches to pad to; default those of the largest image.
    """
    patches = [patchify(image, patch) for image in images]
    longest = max(map(len, patches)) if longest is None else longest
    padded = torch.stack([F.pad(p, (0, 0, 0, longest - len(p))) for p in patches])
    return padded, tuple((image.shape[1] // patch[0], image.shape[2] // patch[1]) for image in images)


def normalised(backbone: Backbone, patches: Tensor, grids: tuple[Grid, ...]) -> NativeImages:
    """Pixels as images for a backbone.

    Args:
        backbone: Its mean and standard deviation are used.
        patches: uint8 ``(images, longest, 3 * patch height * patch width)``, in the order of :func:`patchify`.
        grids: The grid of each image.

    Returns:
        float32 images, with 0 behind the patches of each.
    """
    pixels = patches.shape[2] // 3
    mean, std = (
        torch.tensor(values, device=patches.device).repeat_interleave(pixels)
        for values in (backbone.mean, backbone.std)
    )
    images = NativeImages((patches.float() / 255 - mean) / std, grids)
    return NativeImages(images.patches * images.valid()[..., None], grids)


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
    vit = backbone.vit
    embedding: Any = vit.patch_embed
    x = embedding.norm(F.linear(images.patches, embedding.proj.weight.flatten(1), embedding.proj.bias))
    prefix = [
        token.expand(len(images), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None
    ]
    positions = grid_positions(vit.pos_embed, backbone.grid, images, backbone.position_interpolation)
    before = vit.no_embed_class  # positions of patches alone
    x = torch.cat([*prefix, x + positions if before else x], dim=1)
    x = x if before else x + positions
    x = vit.norm_pre(vit.pos_drop(x))
    mask = images.attention_mask(backbone.num_prefix_tokens)
    x = run_blocks(vit.blocks[: backbone.block_index(layer) + 1], x, mask, vit.grad_checkpointing)
    return backbone.normalise_tokens(x) if norm else x


def run_blocks(
    blocks: Sequence[nn.Module] | nn.Sequential, x: Tensor, mask: Tensor | None, recompute: bool
) -> Tensor:
    """Apply transformer blocks.

    Args:
        blocks: timm's.
        x: ``(batch, tokens, width)``.
        mask: From :meth:`NativeImages.attention_mask`.
        recompute: Recompute activations in the backward pass.
    """
    recompute = recompute and torch.is_grad_enabled()
    for block in blocks:
        x = checkpoint(block, x, mask, use_reentrant=False) if recompute else block(x, mask)
    return x


def grid_positions(
    positions: Tensor, grid: Grid, images: NativeImages, interpolation: PositionInterpolation = "bicubic"
) -> Tensor:
    """A position embedding resampled to the grid of each image. Prefix tokens keep theirs.

    Args:
        positions: ``(1, prefix tokens + rows * columns, width)``.
        grid: Rows and columns of ``positions``.
        images: The images.
        interpolation: How.

    Returns:
        ``(images, prefix tokens + longest, width)``; 0 behind an image's patches.
    """
    longest = images.patches.shape[1]

    def padded(new: Grid) -> Tensor:
        resampled = resample_positions(positions, new, grid, interpolation)
        return F.pad(resampled, (0, 0, 0, longest - new[0] * new[1]))

    found = {new: padded(new) for new in dict.fromkeys(images.grids)}
    return torch.cat([found[new] for new in images.grids])
