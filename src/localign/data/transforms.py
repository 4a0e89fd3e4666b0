"""Transforms from a decoded image to a uint8 tensor. Normalisation happens later, on the device.

The published crop comes from timm: a resize that keeps the aspect ratio until the image covers the target, with a
random scale and aspect, then a centre crop that pads by reflection.
"""

from __future__ import annotations

import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.transforms import CenterCropOrPad, RandomResizedCropAndInterpolation, ResizeKeepRatio
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from localign import rng
from localign.backbones.native import native_grid
from localign.backbones.preprocessing import UNSTATED, Preprocessing
from localign.data.decoding import UndecodedJpeg
from localign.errors import UserError, did_you_mean
from localign.options.names import Decode, TrainCrop

EvalMode = Literal["crop", "square"]
Size = int | tuple[int, int]

CROP_RANGES: Mapping[TrainCrop, tuple[tuple[float, float], tuple[float, float]]] = {
    "published": ((0.08, 1.0), (3 / 4, 4 / 3)),
    "rkrc": ((0.8, 1.0), (0.9, 1 / 0.9)),
}
"""Shares of the area and factors of the aspect ratio that a crop draws from. The published runs give timm's mode rkrc
the ranges of a random resized crop instead of the mode's own."""
_RAND_AUGMENT = re.compile(r"rand(-(m\d+|n\d+|p[\d.]+|mstd[\d.]+|mmax\d+|inc[01]|tweights|t3aw?))*")
# A strip a few pixels high would fill the memory when it is resized to cover the target, and the crop shows only its
# middle. Photographs have far smaller aspect ratios.
_MAX_ASPECT = 16.0


class TrainTransform:
    """Crop, flip and augment an image, as a pure function of (image, seed, position).

    Args:
        size: Side in pixels, or (rows, columns).
        crop: ``published`` (area 0.08..1 and aspect 3/4..4/3, each with probability 0.5, random interpolation, centre
            crop with reflection), ``rkrc`` (the same with area 0.8..1 and aspect 0.9..1/0.9), ``rrc`` (random resized
            crop, area 0.08..1) or ``none`` (a resize that ignores the aspect ratio, or nothing if the image already
            has the size).
        auto_augment: A RandAugment string such as ``rand-m9-mstd0.5-inc1``, or None.
        hflip: Probability of a horizontal flip.
        fill: RGB of the areas that RandAugment's geometric operations leave empty.
        decode: ``scaled`` decodes JPEGs at reduced size if the image (``rkrc``) or its crop (``published``, ``rrc``)
            is much larger than the target; ``full`` decodes every JPEG in full.

    Raises:
        UserError: An option is unknown or out of range.
    """

    def __init__(
        self,
        size: Size,
        crop: TrainCrop = "published",
        auto_augment: str | None = None,
        hflip: float = 0.5,
        fill: tuple[int, int, int] = (124, 116, 104),
        decode: Decode = "scaled",
    ) -> None:
        self.size = _rows_columns(size)
        _check_choice("decode mode", decode, get_args(Decode))
        self.crop, self.decode = crop, decode
        if not 0.0 <= hflip <= 1.0:
            raise UserError(f"the flip probability must lie in 0..1, not {hflip}")
        self.hflip = hflip
        self._crop = _train_crop(crop, self.size)
        self._augment = _rand_augment(auto_augment, self.size, fill)

    patch: tuple[int, int] | None = None
    """Patch height and width, pixels, if images have several sizes."""

    @property
    def scaled_decode(self) -> bool:
        """Whether the source may decode whole images at reduced size; not if the crop magnifies a part."""
        return self.decode == "scaled" and not isinstance(self._crop, _CropsUndecoded)

    @property
    def takes_undecoded(self) -> bool:
        """Whether the transform takes undecoded JPEGs, because the crop determines at which size to decode."""
        return self.decode == "scaled" and isinstance(self._crop, _CropsUndecoded)

    def __call__(self, image: Image.Image | UndecodedJpeg, seed: int, position: int) -> Tensor:
        """The sample at one global position.

        Args:
            image: An RGB image, or a JPEG that is not decoded yet.
            seed: The run's seed.
            position: Global position in the stream of samples.

        Returns:
            uint8 ``(3, rows, columns)``.

        Raises:
            UnreadableImage: The JPEG cannot be decoded.
        """
        with rng.seeded_globals(seed, "transform", position):
            image = self._cropped(image)
            if torch.rand(()).item() < self.hflip:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if self._augment is not None:
                image = self._augment(image)
        return to_tensor(image)

    def _cropped(self, image: Image.Image | UndecodedJpeg) -> Image.Image:
        if isinstance(image, UndecodedJpeg):
            if isinstance(self._crop, _CropsUndecoded) and _trimmed_size(image.size, self.size) == image.size:
                return self._crop.crop_undecoded(image)
            image = image.decode()
        return self._crop(_trim_strip(image, self.size))


class NativeView:
    """The whole image at its own aspect ratio, resized to whole patches.

    Args:
        patch: Patch height and width, pixels.
        max_patches: Largest number of patches.
        interpolation: Resampling filter; default bicubic.
    """

    def __init__(self, patch: tuple[int, int], max_patches: int, interpolation: str | None = None) -> None:
        self.patch, self.max_patches = patch, max_patches
        self._filter = InterpolationMode(interpolation or "bicubic")

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB image -> uint8 ``(3, rows * patch height, columns * patch width)``."""
        return to_tensor(self.resized(image))

    def resized(self, image: Image.Image) -> Image.Image:
        """The resized image."""
        return self._resized(image, self._filter)

    def labels(self, labels: NDArray[np.integer]) -> Tensor:
        """The label map of an image, integers ``(H, W)``, in the same way: int64, nearest neighbour."""
        picture = Image.fromarray(np.ascontiguousarray(labels, dtype=np.int32))
        return torch.from_numpy(np.array(self._resized(picture, InterpolationMode.NEAREST), dtype=np.int64))

    def _resized(self, image: Image.Image, interpolation: InterpolationMode) -> Image.Image:
        rows, columns = native_grid(image.height, image.width, self.patch, self.max_patches)
        resized: Image.Image = F.resize(image, [rows * self.patch[0], columns * self.patch[1]], interpolation)
        return resized


class NativeTransform(TrainTransform):
    """Flip and augment the whole image at its own aspect ratio; images have several sizes.

    Args:
        view: The size of each image.
        auto_augment, hflip: As for :class:`TrainTransform`.
    """

    def __init__(self, view: NativeView, auto_augment: str | None = None, hflip: float = 0.5) -> None:
        side = math.isqrt(view.max_patches)
        super().__init__(
            (side * view.patch[0], side * view.patch[1]), "none", auto_augment, hflip, decode="full"
        )
        self.patch = view.patch
        self._crop = view.resized


class EvalTransform:
    """The deterministic transform for evaluation.

    Args:
        size: Side in pixels, or (rows, columns).
        mode: ``crop`` resizes until the image covers the size, keeping the aspect ratio, then crops the centre
            (bicubic). ``square`` crops the largest centred piece with the target's aspect ratio, then resizes it
            (bilinear; nearest neighbour for label maps), as the probing benchmark does.
        preprocessing: What the model's folder states. ``crop`` follows it; ``square`` takes only its filter, as the
            benchmark shows all models the same part of an image.

    Raises:
        UserError: The size or mode is unknown.
    """

    def __init__(self, size: Size, mode: EvalMode = "crop", preprocessing: Preprocessing = UNSTATED) -> None:
        self.size = _rows_columns(size)
        _check_choice("eval transform", mode, get_args(EvalMode))
        self.mode = mode
        self.preprocessing = preprocessing
        stated = preprocessing.interpolation
        self._filter = InterpolationMode(stated or ("bicubic" if mode == "crop" else "bilinear"))
        self._resize = ResizeKeepRatio(  # type: ignore[no-untyped-call]
            preprocessing.scaled(self.size), interpolation=self._filter.value
        )
        self._centre = CenterCropOrPad(list(self.size), padding_mode="reflect")

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB image -> uint8 ``(3, rows, columns)``."""
        if self.mode == "square":
            return to_tensor(self._square(image, self._filter))
        if self.preprocessing.crop_pct is None and self.preprocessing.crop_mode is None:
            return to_tensor(self._centre(self._resize(_trim_strip(image, self.size))))
        return to_tensor(self._cropped(image))

    def _cropped(self, image: Image.Image) -> Image.Image:
        """Resize and crop as timm and transformers do. Of an odd rest, the larger half is right or below."""
        rows, columns = self.size
        scaled = self.preprocessing.scaled(self.size)
        if self.preprocessing.crop_mode == "squash":
            image = F.resize(image, list(scaled), self._filter)
        elif scaled[0] == scaled[1]:
            image = F.resize(_trim_strip(image, self.size), [scaled[0]], self._filter)
        else:
            image = self._resize(_trim_strip(image, self.size))
        top, left = (image.height - rows) // 2, (image.width - columns) // 2
        return image.crop((left, top, left + columns, top + rows))

    def labels(self, labels: NDArray[np.integer]) -> Tensor:
        """Transform the label map of an image in the same way.

        Args:
            labels: Integers ``(H, W)``, of the image's original size.

        Returns:
            int64 ``(rows, columns)``.

        Raises:
            UserError: The mode is ``crop``, whose interpolation does not work for labels.
        """
        if self.mode != "square":
            raise UserError("label maps need the eval transform 'square'")
        picture = Image.fromarray(np.ascontiguousarray(labels, dtype=np.int32))
        resized = self._square(picture, InterpolationMode.NEAREST)
        return torch.from_numpy(np.array(resized, dtype=np.int64))

    def _square(self, image: Image.Image, interpolation: InterpolationMode) -> Image.Image:
        rows, columns = self.size
        scale = min(image.height / rows, image.width / columns)
        piece = [max(1, round(rows * scale)), max(1, round(columns * scale))]
        resized: Image.Image = F.resize(F.center_crop(image, piece), list(self.size), interpolation)
        return resized


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> contiguous uint8 ``(3, H, W)``."""
    return torch.from_numpy(np.array(image, dtype=np.uint8).transpose(2, 0, 1).copy())


def _rows_columns(size: Size) -> tuple[int, int]:
    rows, columns = (size, size) if isinstance(size, int) else size
    if rows < 1 or columns < 1:
        raise UserError(f"an image size must be above 0, not {rows} x {columns} pixels")
    return rows, columns


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = did_you_mean(value, choices)
        raise UserError(f"unknown {option} {value!r}; the choices are {', '.join(choices)}{hint}")


def _train_crop(crop: TrainCrop, size: tuple[int, int]) -> Callable[[Image.Image], Image.Image]:
    _check_choice("crop", crop, get_args(TrainCrop))
    if crop == "rrc":
        return _RandomResizedCrop(size, interpolation="random")  # type: ignore[no-untyped-call]
    if crop == "none":
        return _Fit(size)
    if crop == "published":
        return _PublishedCrop(size, *CROP_RANGES[crop])
    return _KeepRatioCrop(size, *CROP_RANGES[crop])


class _KeepRatioCrop:
    """timm's ``rkrc``: resize until the image covers the target, with random scale and aspect, then crop the centre."""

    def __init__(
        self, size: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float]
    ) -> None:
        self.size = size
        self.draws = 0.5, scale, True, 0.5, aspect
        """timm's arguments: probability and range of the scale, which is one of areas; the same of the aspect."""
        names = "scale_prob", "scale_range", "scale_area", "aspect_prob", "aspect_range"
        random_options = {f"random_{name}": value for name, value in zip(names, self.draws, strict=True)}
        self.resize = ResizeKeepRatio(size, interpolation="random", **random_options)  # type: ignore
        self.centre = CenterCropOrPad(list(size), padding_mode="reflect")

    def __call__(self, image: Image.Image) -> Image.Image:
        cropped: Image.Image = self.centre(self.resize(image))
        return cropped


class _CropsUndecoded(ABC):
    """A crop that can also crop a JPEG that is not decoded yet."""

    @abstractmethod
    def __call__(self, image: Image.Image) -> Image.Image: ...

    @abstractmethod
    def crop_undecoded(self, image: UndecodedJpeg) -> Image.Image:
        """Crop with the same random draws as for a decoded image of the same size."""


class _PublishedCrop(_KeepRatioCrop, _CropsUndecoded):
    def crop_undecoded(self, image: UndecodedJpeg) -> Image.Image:
        placeholder = Image.new("1", image.size, None)  # timm reads only the size
        drawn = self.resize.get_params(placeholder, self.size, 0.0, *self.draws)  # type: ignore[no-untyped-call]
        interpolation = Image.Resampling[random.choice(self.resize.interpolation).name]
        # The part of the resized image that the crop shows, in pixels of the whole.
        shown = min(self.size[0], drawn[0]), min(self.size[1], drawn[1])
        top, left = (round((side - part) / 2) for side, part in zip(drawn, shown, strict=True))
        y_zoom, x_zoom = image.size[1] / drawn[0], image.size[0] / drawn[1]
        box = left * x_zoom, top * y_zoom, shown[1] * x_zoom, shown[0] * y_zoom
        padded: Image.Image = self.centre(image.resized_crop(box, shown, interpolation, context=True))
        return padded


class _RandomResizedCrop(RandomResizedCropAndInterpolation, _CropsUndecoded):
    def crop_undecoded(self, image: UndecodedJpeg) -> Image.Image:
        placeholder = Image.new("1", image.size, None)  # timm reads only the size
        box = self.get_params(placeholder, self.scale, self.ratio)  # type: ignore[no-untyped-call]
        top, left, height, width = box
        interpolation = random.choice(self.interpolation)
        return image.resized_crop((left, top, width, height), self.size, Image.Resampling[interpolation.name])


class _Fit:
    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        if (image.height, image.width) == self.size:
            return image
        resized: Image.Image = F.resize(image, list(self.size), InterpolationMode.BILINEAR)
        return resized


def _rand_augment(
    config: str | None, size: tuple[int, int], fill: tuple[int, int, int]
) -> Callable[[Image.Image], Image.Image] | None:
    if config is None:
        return None
    if not _RAND_AUGMENT.fullmatch(config):  # timm ignores unknown sections
        raise UserError(f"unknown augmentation {config!r}; write it like 'rand-m9-mstd0.5-inc1'")
    hparams = {"translate_const": int(min(size) * 0.45), "img_mean": fill}
    try:
        transform = rand_augment_transform(config, hparams)
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"unknown augmentation {config!r}: {error}") from None
    for operation in transform.ops:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    augment: Callable[[Image.Image], Image.Image] = transform
    return augment


def _posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """timm's posterize, which at full strength keeps 0 bits; newer versions of Pillow refuse that."""
    posterized: Image.Image = posterize(image, max(1, bits_to_keep), **kwargs)  # type: ignore[no-untyped-call]
    return posterized


def _trim_strip(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Cut the ends off an extreme strip; return any other image unchanged."""
    width, height = _trimmed_size(image.size, size)
    if (width, height) == image.size:
        return image
    trimmed: Image.Image = F.center_crop(image, [max(1, height), max(1, width)])
    return trimmed


def _trimmed_size(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of an image after the ends of an extreme strip are cut off."""
    (width, height), (rows, columns) = image_size, size
    scale = _MAX_ASPECT * min(height / rows, width / columns)
    return min(width, int(columns * scale)), min(height, int(rows * scale))
