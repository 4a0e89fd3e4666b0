"""From pixel label maps to what a patch, or an image, contains (the targets of the probing benchmark).

A *code* is what a pixel of a label map holds. Usually it is a class id. Where pixels belong to several
classes at once (a scene's object has a shape and a colour), an attribute table turns codes into sets of
classes.

Nothing here loops over images, patches or classes. Most patches hold one code: their smallest and their
largest are the same. Of the others all smallest codes are counted together, then all largest, then the next
code of every patch that holds a third one, and so on; few patches need a fourth round. In NumPy, which is
several times faster than PyTorch at small rows of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
    """All targets of a batch.

    - ``patch``, the local task (section 3 of the paper): the classes that each patch contains. Class 0
      ("unlabeled") counts only where it is the patch's only class.
    - ``image``, the global task: the classes that the patches contain together, class 0 included wherever
      it is present.
    - ``majority``: the most frequent code of each patch; of equally frequent ones, the smallest.

    Args:
        maps: integer ``(B, H, W)``, the code of every pixel; uint8 is fastest. Pixels right of and below the
            last full patch are left out: a backbone does not see them either.
        patch_size: pixels, one number or (height, width).
        classes: C, the number of classes.
        attributes: bool ``(codes, C)``, the classes of every code; without it, codes are class ids.

    Returns:
        The targets on the device of ``maps``, patches row by row.

    Raises:
        ValueError: a code outside the table, or maps smaller than one patch.
    """
    codes = _codes(maps, classes, attributes)
    contents = _contents(_whole_patches(maps, patch_size, codes), codes)
    present, image, majority = (torch.from_numpy(a).to(maps.device) for a in contents)
    if attributes is not None:
        # Products in float32 are exact: no sum exceeds the number of codes.
        table = attributes.to(maps.device).float()
        present, image = (present.float() @ table) > 0, (image.float() @ table) > 0
    flat = present.view(-1, classes)
    unlabeled = flat[:, 0].nonzero()[:, 0]
    flat[unlabeled, 0] = flat[unlabeled].sum(dim=-1, dtype=torch.int32) == 1
    return PatchLabels(present, image, majority, codes)


def patch_union(
    maps: Tensor, patch_size: int | tuple[int, int], classes: int, attributes: Tensor | None = None
) -> Tensor:
    """The local task's part of :func:`reduce_labels`: bool ``(B, n, C)``."""
    return reduce_labels(maps, patch_size, classes, attributes).patch


def image_union(
    maps: Tensor, patch_size: int | tuple[int, int], classes: int, attributes: Tensor | None = None
) -> Tensor:
    """The global task's part of :func:`reduce_labels`: bool ``(B, C)``."""
    return reduce_labels(maps, patch_size, classes, attributes).image


def patch_majority(maps: Tensor, patch_size: int | tuple[int, int], codes: int) -> Tensor:
    """The majority task's part of :func:`reduce_labels`: int64 ``(B, n)``."""
    return reduce_labels(maps, patch_size, codes).majority


def _codes(maps: Tensor, classes: int, attributes: Tensor | None) -> int:
    """The number of codes, after a check that the maps hold no other."""
    if attributes is not None and attributes.shape[1] != classes:
        raise ValueError(f"the attribute table has {attributes.shape[1]} classes, expected {classes}")
    codes = classes if attributes is None else len(attributes)
    low, high = (int(v) for v in maps.aminmax()) if maps.numel() else (0, 0)
    if low < 0 or high >= codes:
        raise ValueError(f"label maps hold the code {low if low < 0 else high}, outside 0..{codes - 1}")
    return codes


def _whole_patches(maps: Tensor, patch_size: int | tuple[int, int], codes: int) -> NDArray[Any]:
    """``(B, rows, h, columns, w)`` without spare pixels, contiguous, in an unsigned type."""
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    rows, columns = maps.shape[1] // height, maps.shape[2] // width
    if not rows or not columns:
        raise ValueError(f"label maps of {tuple(maps.shape[1:])} pixels hold no patch of {(height, width)}")
    small = codes <= 256
    pixels = maps[:, : rows * height, : columns * width].to("cpu", torch.uint8 if small else torch.int32)
    unsigned = pixels.contiguous().numpy().view(np.uint8 if small else np.uint32)
    return unsigned.reshape(len(maps), rows, height, columns, width)


def _contents(
    pixels: NDArray[Any], codes: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.int64]]:
    """Which codes each patch holds, ``(B, n, codes)``, each image, ``(B, codes)``; and the majorities."""
    batch, rows, height, columns, width = pixels.shape
    patches = rows * columns
    present = np.zeros((batch * patches, codes), dtype=bool)
    image = np.zeros((batch, codes), dtype=bool)

    def note(patch: NDArray[np.int64], code: NDArray[Any]) -> None:
        present[patch, code] = True
        image[patch // patches, code] = True

    low, high = (_over_patches(function, pixels) for function in (np.minimum, np.maximum))
    note(np.arange(len(low)), low)
    majority = low.astype(np.int64)
    patch = np.flatnonzero(low != high)
    area, code, top = _areas(pixels, patch), low[patch], high[patch]
    note(patch, top)
    least, most = _scores(area, code, codes), _scores(area, top, codes)
    best = np.maximum(least, most)
    left = height * width - least // codes - most // codes
    while True:
        majority[patch] = codes - 1 - best % codes
        more = np.flatnonzero(left)
        if not len(more):
            break
        patch, area, code, best, left = (a[more] for a in (patch, area, code, best, left))
        # The next larger code: what is not larger wraps around to the top of the unsigned type.
        code += (area - code[:, None] - 1).min(axis=1) + 1
        note(patch, code)
        score = _scores(area, code, codes)
        best, left = np.maximum(best, score), left - score // codes
    return present.reshape(batch, patches, codes), image, majority.reshape(batch, patches)


def _over_patches(function: np.ufunc, pixels: NDArray[Any]) -> NDArray[Any]:
    """The smallest or largest code of every patch, ``(B * n,)``."""
    lines = function.reduce(pixels, axis=2)
    # Fast along an outer axis, slow along a short inner one.
    return function.reduce(np.ascontiguousarray(np.moveaxis(lines, -1, 0)), axis=0).ravel()


def _areas(pixels: NDArray[Any], patch: NDArray[np.int64]) -> NDArray[Any]:
    """The pixels of some patches, ``(len(patch), h * w)``."""
    _, _, height, columns, width = pixels.shape
    # In memory a patch is `height` lines of `width` pixels, `columns` lines apart.
    first = patch // columns * (height * columns) + patch % columns
    lines = first[:, None] + np.arange(height) * columns
    return pixels.reshape(-1, width).take(lines, axis=0).reshape(len(patch), height * width)


def _scores(area: NDArray[Any], code: NDArray[Any], codes: int) -> NDArray[np.int64]:
    """How often each area holds its code, times ``codes``, plus a rest that is larger for smaller codes."""
    hits = torch.from_numpy(area == code[:, None])
    counts = hits.sum(dim=1, dtype=torch.int32).numpy()  # NumPy adds up bools slowly
    return counts.astype(np.int64) * codes + (codes - 1 - code.astype(np.int64))
