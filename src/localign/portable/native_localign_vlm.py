"""Images of several sizes in one batch: each keeps its own grid of patches.

A plain ViT needs no grid of its own: its patch embedding is a linear layer, its position embedding is resampled to each
image's grid, and attention leaves out the padding behind the patches of shorter images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Grid = tuple[int, int]
"""Rows and columns of patches."""
PositionInterpolation = Literal["bicubic", "bilinear", "bicubic-aliased"]
"""How position embeddings are resampled to another grid: antialiased as in timm, bicubic or in models of native
resolution bilinear; or bicubic without antialiasing, as in transformers' CLIP, SigLIP, ViT, and DINOv2 without
registers."""


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

    def normalised(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> NativeImages:
        """uint8 pixels as ``(pixel / 255 - mean) / std``, computed in float32, with 0 behind the patches of each image.

        Args:
            mean, std: Pixel statistics per RGB channel, for pixels in 0..1.
            dtype: Of the result.
        """
        pixels, device = self.patches.shape[2] // 3, self.patches.device
        means, stds = (torch.tensor(v, device=device).repeat_interleave(pixels) for v in (mean, std))
        patches = (self.patches.float() / 255 - means) / stds
        return NativeImages((patches * self.valid()[..., None]).to(dtype), self.grids)

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


def resample_positions(
    positions: Tensor, new: Grid, old: Grid, interpolation: PositionInterpolation
) -> Tensor:
    """A position embedding on another grid; the prefix tokens keep theirs.

    Args:
        positions: ``(1, prefix tokens + old rows * old columns, width)``.
        new, old: Rows and columns.
        interpolation: How.

    Returns:
        ``(1, prefix tokens + new rows * new columns, width)``, of the same dtype; computed in float32.
    """
    prefix = positions.shape[1] - old[0] * old[1]
    if interpolation != "bicubic-aliased":
        resampled: Tensor = resample_abs_pos_embed(
            positions, list(new), list(old), num_prefix_tokens=prefix, interpolation=interpolation
        )
        return resampled
    if new == old:
        return positions
    grid = positions[:, prefix:].float().unflatten(1, old).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :prefix], grid.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


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


def run_blocks(
    blocks: Sequence[nn.Module] | nn.Sequential, x: Tensor, mask: Tensor | None, recompute: bool = False
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


def vit_tokens_of(
    vit: Any, images: NativeImages, blocks: int, interpolation: PositionInterpolation
) -> Tensor:
    """The tokens of a plain timm ViT with a position embedding, after its first blocks and before its final norm.

    Args:
        vit: The ViT.
        images: Images of any sizes.
        blocks: Number of blocks.
        interpolation: How positions are resampled.

    Returns:
        ``(images, prefix tokens + longest, width)``, prefix tokens first.
    """
    embedding = vit.patch_embed
    x = embedding.norm(F.linear(images.patches, embedding.proj.weight.flatten(1), embedding.proj.bias))
    prefix = [
        token.expand(len(images), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None
    ]
    rows, columns = embedding.grid_size
    positions = grid_positions(vit.pos_embed, (int(rows), int(columns)), images, interpolation)
    before = vit.no_embed_class  # positions of patches alone
    x = torch.cat([*prefix, x + positions if before else x], dim=1)
    x = x if before else x + positions
    x = vit.norm_pre(vit.pos_drop(x))
    mask = images.attention_mask(int(vit.num_prefix_tokens))
    return run_blocks(vit.blocks[:blocks], x, mask, vit.grad_checkpointing)


@dataclass(frozen=True)
class Sizes:
    """What an adapter of a vision-language model must know of images of several sizes."""

    images: NativeImages
    """The images."""
    grid: Grid
    """Rows and columns of the tower's, and so of the adapter's, position embedding."""

    def decoded(self, decoder: nn.Module, tokens: Tensor) -> Tensor:
        """Tokens ``(images, prefix tokens + longest, width)`` through a decoder, on the grid of each image.

        Args:
            decoder: Has ``pos_embed``, and takes tokens, positions and an attention mask.
            tokens: Its input.
        """
        positions = grid_positions(decoder.get_parameter("pos_embed"), self.grid, self.images)
        prefix = tokens.shape[1] - self.images.patches.shape[1]
        output: Tensor = decoder(tokens, positions, self.images.attention_mask(prefix))
        return output
