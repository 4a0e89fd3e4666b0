"""From pixel label maps to what a patch, or an image, contains (the targets of the probing benchmark).

A *code* is what a pixel of a label map holds. Usually it is a class id. Where pixels belong to several
classes at once (a scene's object has a shape and a colour), an attribute table turns codes into sets of
classes.

Nothing here loops over patches or classes. Two facts about label maps make it cheap:

- a class that a patch contains has a topmost-leftmost pixel there, which differs from its left and its upper
  neighbour inside the patch. So only such *corner* pixels, a few per patch, need to be written down;
- counting pixels can count horizontal runs instead, weighted by their length.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PatchLabels:
    """The targets of many images, on one device.

    ``patch``: bool ``(B, n, C)``, ``image``: bool ``(B, C)``, ``majority``: int64 ``(B, n)`` codes;
    ``codes``: how many codes the label maps know, the number of classes of the majority task.
    """

    patch: Tensor
    image: Tensor
    majority: Tensor
    codes: int

    def __len__(self) -> int:
        return len(self.patch)

    @property
    def classes(self) -> int:
        """C, the number of classes of the local and the global task."""
        return self.patch.shape[-1]

    def __getitem__(self, rows: slice | Tensor) -> PatchLabels:
        """The targets of some images; rows are a slice or int64 indices."""
        return PatchLabels(self.patch[rows], self.image[rows], self.majority[rows], self.codes)

    def to(self, device: torch.device | str) -> PatchLabels:
        """The same on another device."""
        return PatchLabels(self.patch.to(device), self.image.to(device), self.majority.to(device), self.codes)

    @staticmethod
    def cat(parts: list[PatchLabels]) -> PatchLabels:
        """The targets of several batches, one after the other."""
        tensors = {f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(parts[0])[:3]}
        return PatchLabels(**tensors, codes=parts[0].codes)


def reduce_labels(
    maps: Tensor, patch_size: int | tuple[int, int], classes: int, attributes: Tensor | None = None
) -> PatchLabels:
    """All targets of a batch in one go: ``patch_union``, ``image_union`` and ``patch_majority``."""
    codes = _codes(maps, classes, attributes)
    maps, size = _cropped(maps, patch_size)
    everything = _classes_of_patches(maps, size, codes, attributes)
    image = _any_patch(everything)
    majority = _counts(maps, size, codes).argmax(dim=-1)
    return PatchLabels(_without_unlabeled(everything), image, majority, codes)


def patch_union(
    maps: Tensor, patch_size: int | tuple[int, int], classes: int, attributes: Tensor | None = None
) -> Tensor:
    """Which classes each patch contains: the local probing task (section 3 of the paper).

    Class 0 ("unlabeled") counts only where it is the patch's only class.

    Args:
        maps: integer ``(B, H, W)``, the code of every pixel. Pixels right of and below the last full patch
            are left out: a backbone does not see them either.
        patch_size: pixels, one number or (height, width).
        classes: C, the number of classes.
        attributes: bool ``(codes, C)``, the classes of every code; without it, codes are class ids.

    Returns:
        bool ``(B, n, C)`` with patches row by row, on the device of ``maps``.

    Raises:
        ValueError: a code outside the table, or maps smaller than one patch.
    """
    codes = _codes(maps, classes, attributes)
    maps, size = _cropped(maps, patch_size)
    return _without_unlabeled(_classes_of_patches(maps, size, codes, attributes))


def image_union(
    maps: Tensor, patch_size: int | tuple[int, int], classes: int, attributes: Tensor | None = None
) -> Tensor:
    """Which classes the patches of each image contain together, class 0 included wherever it is present.

    The global probing task. Arguments and errors as for :func:`patch_union`.

    Returns:
        bool ``(B, C)``.
    """
    codes = _codes(maps, classes, attributes)
    maps, size = _cropped(maps, patch_size)
    return _any_patch(_classes_of_patches(maps, size, codes, attributes))


def patch_majority(maps: Tensor, patch_size: int | tuple[int, int], codes: int) -> Tensor:
    """The most frequent code of each patch; of equally frequent ones, the smallest.

    Args:
        maps: integer ``(B, H, W)``.
        patch_size: pixels, one number or (height, width).
        codes: how many codes there are (the number of classes, where codes are class ids).

    Returns:
        int64 ``(B, n)``.

    Raises:
        ValueError: as for :func:`patch_union`.
    """
    codes = _codes(maps, codes, None)
    maps, size = _cropped(maps, patch_size)
    return _counts(maps, size, codes).argmax(dim=-1)


def _codes(maps: Tensor, classes: int, attributes: Tensor | None) -> int:
    """The number of codes, after a check that the maps hold no other."""
    if attributes is not None and attributes.shape[1] != classes:
        raise ValueError(f"the attribute table has {attributes.shape[1]} classes, expected {classes}")
    codes = classes if attributes is None else len(attributes)
    low, high = (int(v) for v in maps.aminmax()) if maps.numel() else (0, 0)
    if low < 0 or high >= codes:
        raise ValueError(f"label maps hold the code {low if low < 0 else high}, outside 0..{codes - 1}")
    return codes


def _cropped(maps: Tensor, patch_size: int | tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The maps without spare pixels, contiguous, and the patch size as (height, width)."""
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    rows, columns = maps.shape[1] // height, maps.shape[2] // width
    if not rows or not columns:
        raise ValueError(f"label maps of {tuple(maps.shape[1:])} pixels hold no patch of {(height, width)}")
    return maps[:, : rows * height, : columns * width].contiguous(), (height, width)


def _patch_of(flat: Tensor, shape: torch.Size, size: tuple[int, int]) -> Tensor:
    """The index of the patch, counted through the whole batch, of each flat pixel index."""
    width = shape[2]
    line = torch.div(flat, width, rounding_mode="floor")  # counted through the batch: H is whole patches
    column = torch.div(flat - line * width, size[1], rounding_mode="floor")
    return torch.div(line, size[0], rounding_mode="floor") * (width // size[1]) + column


def _run_starts(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """bool like maps: pixels that differ from their left neighbour, and the first column of every patch."""
    starts = torch.ones_like(maps, dtype=torch.bool)
    torch.ne(maps[:, :, 1:], maps[:, :, :-1], out=starts[:, :, 1:])
    starts[:, :, :: size[1]] = True
    return starts


def _indices(mask: Tensor) -> Tensor:
    """int64 flat indices of the true entries, in order; through NumPy on the CPU, several times faster."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero()[:, 0]


def _present(maps: Tensor, size: tuple[int, int], codes: int) -> Tensor:
    """bool ``(B, n, codes)``: which codes occur in each patch, code 0 like any other."""
    corners = torch.ones_like(maps, dtype=torch.bool)
    torch.ne(maps[:, 1:], maps[:, :-1], out=corners[:, 1:])
    corners[:, :: size[0]] = True
    corners &= _run_starts(maps, size)
    flat = _indices(corners)
    patches = maps.shape[1] // size[0] * (maps.shape[2] // size[1])
    present = torch.zeros(len(maps), patches, codes, dtype=torch.bool, device=maps.device)
    present.view(-1)[_patch_of(flat, maps.shape, size) * codes + maps.view(-1)[flat]] = True
    return present


def _counts(maps: Tensor, size: tuple[int, int], codes: int) -> Tensor:
    """int32 ``(B, n, codes)``: how many pixels of each patch hold each code."""
    flat = _indices(_run_starts(maps, size))
    lengths = torch.diff(flat, append=flat.new_tensor([maps.numel()])).int()
    patches = maps.shape[1] // size[0] * (maps.shape[2] // size[1])
    counts = torch.zeros(len(maps), patches, codes, dtype=torch.int32, device=maps.device)
    cells = _patch_of(flat, maps.shape, size) * codes + maps.view(-1)[flat]
    counts.view(-1).scatter_add_(0, cells, lengths)
    return counts


def _classes_of_patches(maps: Tensor, size: tuple[int, int], codes: int, attributes: Tensor | None) -> Tensor:
    """bool ``(B, n, C)``, class 0 included wherever it is present."""
    present = _present(maps, size, codes)
    if attributes is None:
        return present
    # A product in float32 is exact: no sum exceeds the number of codes.
    return (present.float() @ attributes.to(maps.device).float()) > 0


# Sums below, not any(): on the CPU any() over bool is about eight times slower.


def _any_patch(union: Tensor) -> Tensor:
    """bool ``(B, C)``: the classes in any patch."""
    return union.sum(dim=1, dtype=torch.int32) > 0


def _without_unlabeled(union: Tensor) -> Tensor:
    """The same with class 0 only where there is no other class."""
    union = union.clone()
    union[..., 0] &= union.sum(dim=-1, dtype=torch.int32) == 1
    return union
