"""From pixel label maps to the contents of patches and images: the targets of the probing benchmark.

A *code* is the value of a pixel in a label map. Usually it is a class id. If pixels belong to several classes at once
(an object in a scene has a shape and a colour), an attribute table maps codes to sets of classes.

There is no loop over images, patches or classes. Most patches hold one code: their smallest and largest codes are
equal. For all other patches together, the smallest codes are counted, then the largest, then the next code of every
patch that holds a third one, and so on. Few patches need a fourth round. NumPy is several times faster than PyTorch at
small rows of bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class PatchLabels:
    """The targets of a batch of images, on one device."""

    patch: Tensor
    """bool ``(B, n, C)``, target of the local task."""
    image: Tensor
    """bool ``(B, C)``, target of the global task."""
    majority: Tensor
    """int64 ``(B, n)``, codes, target of the majority task."""
    codes: int
    """Number of codes, which is the number of classes of the majority task."""
    partial: bool = False
    """Whether patches may consist of ignored pixels only. Their majority is -1, they hold no class, and they count in
    no loss and no metric."""

    def __len__(self) -> int:
        return len(self.patch)

    @property
    def classes(self) -> int:
        """Number of classes of the local and the global task, C."""
        return self.patch.shape[-1]

    @property
    def counted(self) -> Tensor | None:
        """bool ``(B, n)``, the patches that count; None if all do."""
        return self.majority >= 0 if self.partial else None

    def __getitem__(self, rows: slice | Tensor) -> PatchLabels:
        """The targets of some images, given by a slice or int64 indices."""
        return self._each(lambda t: t[rows])

    def padded(self, patches: int) -> PatchLabels:
        """The targets with patches behind an image's own that count nowhere, ``patches`` in all."""
        behind = patches - self.majority.shape[1]
        return PatchLabels(
            F.pad(self.patch, (0, 0, 0, behind)),
            self.image,
            F.pad(self.majority, (0, behind), value=-1),
            self.codes,
            partial=True,
        )

    def to(self, device: torch.device | str) -> PatchLabels:
        """The targets on another device."""
        return self._each(lambda t: t.to(device))

    def _each(self, function: Callable[[Tensor], Tensor]) -> PatchLabels:
        patch, image, majority = function(self.patch), function(self.image), function(self.majority)
        return PatchLabels(patch, image, majority, self.codes, self.partial)

    @staticmethod
    def cat(parts: list[PatchLabels]) -> PatchLabels:
        """Concatenate the targets of several batches."""
        tensors = {f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(parts[0])[:3]}
        return PatchLabels(**tensors, codes=parts[0].codes, partial=any(p.partial for p in parts))


def reduce_labels(
    maps: Tensor,
    patch_size: int | tuple[int, int],
    classes: int,
    attributes: Tensor | None = None,
    *,
    ignores: bool = False,
) -> PatchLabels:
    """All targets of a batch.

    - ``patch``, the local task (section 3 of the paper): the classes in each patch. Class 0 ("unlabeled") counts only
      if it is the only class of the patch.
    - ``image``, the global task: the classes in all patches together, including class 0 wherever it occurs.
    - ``majority``: the most frequent code of each patch; on a tie, the smallest.

    Args:
        maps: Integers ``(B, H, W)``, the code of every pixel; uint8 is fastest. Pixels to the right of and below the
            last full patch are ignored, as a backbone ignores them.
        patch_size: Pixels, one number or (height, width).
        classes: Number of classes, C.
        attributes: bool ``(codes, C)``, the classes of every code. Without it, codes are class ids.
        ignores: The code that follows the last code marks pixels to ignore: targets are those of the other pixels.

    Returns:
        The targets on the device of ``maps``, patches in row order.

    Raises:
        ValueError: A code is out of range, or the maps are smaller than one patch.
    """
    codes, largest = _codes(maps, classes, attributes, ignores)
    ignored = largest == codes
    pixels = _full_patches(maps, patch_size, codes + ignored)
    contents = _contents(pixels, codes + ignored, ignored)
    partial = ignored and int(contents[2].min()) < 0
    present, image, majority = (torch.from_numpy(a).to(maps.device) for a in contents)
    if ignored:
        present, image = present[..., :codes].contiguous(), image[..., :codes].contiguous()
    if attributes is not None:
        # Matrix products are exact in float32: no sum exceeds the number of codes.
        table = attributes.to(maps.device).float()
        present, image = (present.float() @ table) > 0, (image.float() @ table) > 0
    flat = present.view(-1, classes)
    unlabeled = flat[:, 0].nonzero()[:, 0]
    flat[unlabeled, 0] = flat[unlabeled].sum(dim=-1, dtype=torch.int32) == 1
    return PatchLabels(present, image, majority, codes, partial)


def _codes(maps: Tensor, classes: int, attributes: Tensor | None, ignores: bool) -> tuple[int, int]:
    """The number of codes, and the largest in the maps. Checks that the maps hold codes in this range only."""
    if attributes is not None and attributes.shape[1] != classes:
        raise ValueError(f"the attribute table has {attributes.shape[1]} classes, expected {classes}")
    codes = classes if attributes is None else len(attributes)
    low, high = (int(v) for v in maps.aminmax()) if maps.numel() else (0, 0)
    if low < 0 or high >= codes + ignores:
        raise ValueError(f"the label maps hold the code {low if low < 0 else high}, outside 0..{codes - 1}")
    return codes, high


def _full_patches(maps: Tensor, patch_size: int | tuple[int, int], codes: int) -> NDArray[Any]:
    """The pixels of all full patches, ``(B, rows, h, columns, w)``, contiguous, in an unsigned dtype."""
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    rows, columns = maps.shape[1] // height, maps.shape[2] // width
    if not rows or not columns:
        raise ValueError(f"label maps of {tuple(maps.shape[1:])} pixels have no patch of {(height, width)}")
    small = codes <= 256
    pixels = maps[:, : rows * height, : columns * width].to("cpu", torch.uint8 if small else torch.int32)
    unsigned: NDArray[Any] = pixels.contiguous().numpy().view(np.uint8 if small else np.uint32)
    return unsigned.reshape(len(maps), rows, height, columns, width)


def _contents(
    pixels: NDArray[Any], codes: int, ignored: bool
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.int64]]:
    """The codes in each patch, ``(B, n, codes)``, and in each image, ``(B, codes)``, and the majority codes.

    If ``ignored``, the last code never is the majority; patches with that code only have the majority -1.
    """
    batch, rows, height, columns, width = pixels.shape
    patches = rows * columns
    present = np.zeros((batch * patches, codes), dtype=bool)
    image = np.zeros((batch, codes), dtype=bool)

    def mark(patch: NDArray[np.int64], code: NDArray[Any]) -> None:
        present[patch, code] = True
        image[patch // patches, code] = True

    smallest, largest = (_reduce_patches(function, pixels) for function in (np.minimum, np.maximum))
    mark(np.arange(len(smallest)), smallest)
    majority = smallest.astype(np.int64)
    if ignored:
        majority[majority == codes - 1] = -1
    # From here on, all arrays are over the patches with more than one code.
    patch = np.flatnonzero(smallest != largest)
    area, code, top = _patch_pixels(pixels, patch), smallest[patch], largest[patch]
    mark(patch, top)
    scores = _scores(area, code, codes), _scores(area, top, codes)
    best = np.where(top == codes - 1, scores[0], np.maximum(*scores)) if ignored else np.maximum(*scores)
    uncounted = height * width - scores[0] // codes - scores[1] // codes
    while True:
        majority[patch] = codes - 1 - best % codes
        unfinished = np.flatnonzero(uncounted)
        if not len(unfinished):
            break
        patch, area, code, best, uncounted = (a[unfinished] for a in (patch, area, code, best, uncounted))
        # The next larger code: subtraction wraps smaller and equal codes around to the top of the unsigned dtype.
        code += (area - code[:, None] - 1).min(axis=1) + 1
        mark(patch, code)
        score = _scores(area, code, codes)
        best, uncounted = np.maximum(best, score), uncounted - score // codes
    return present.reshape(batch, patches, codes), image, majority.reshape(batch, patches)


def _reduce_patches(function: np.ufunc, pixels: NDArray[Any]) -> NDArray[Any]:
    """The smallest or largest code of every patch, ``(B * n,)``."""
    lines = function.reduce(pixels, axis=2)
    # Reduction is fast along an outer axis and slow along a short inner axis.
    reduced: NDArray[Any] = function.reduce(np.ascontiguousarray(np.moveaxis(lines, -1, 0)), axis=0).ravel()
    return reduced


def _patch_pixels(pixels: NDArray[Any], patch: NDArray[np.int64]) -> NDArray[Any]:
    """The pixels of some patches, ``(len(patch), h * w)``."""
    _, _, height, columns, width = pixels.shape
    # In memory a patch is `height` lines of `width` pixels, `columns` lines apart.
    first = patch // columns * (height * columns) + patch % columns
    lines = first[:, None] + np.arange(height) * columns
    area: NDArray[Any] = pixels.reshape(-1, width).take(lines, axis=0).reshape(len(patch), height * width)
    return area


def _scores(area: NDArray[Any], code: NDArray[Any], codes: int) -> NDArray[np.int64]:
    """A score for one code of each patch: its number of pixels times ``codes``, plus more for smaller codes.

    The largest score of a patch belongs to the most frequent code, and on a tie to the smallest.
    """
    hits = torch.from_numpy(area == code[:, None])
    counts = hits.sum(dim=1, dtype=torch.int32).numpy()  # NumPy is slow at summing bools
    scores: NDArray[np.int64] = counts.astype(np.int64) * codes + (codes - 1 - code.astype(np.int64))
    return scores
