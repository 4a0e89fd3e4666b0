"""How a model's images were resized in training, as transformers' and timm's folders state it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from localign.errors import UserError
from localign.text.printing import printable

CropMode = Literal["center", "squash"]
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Names of Pillow's filters; a name's position is Pillow's number, which transformers writes."""


@dataclass(frozen=True)
class Preprocessing:
    """What a folder states about resizing; None where it states nothing.

    Raises:
        UserError: A value is none of the choices.
    """

    interpolation: str | None = None
    """Resampling filter: nearest, lanczos, bilinear, bicubic, box or hamming."""
    crop_pct: float | None = None
    """Side of the input divided by the side to which the image is resized before the centre is cropped."""
    crop_mode: CropMode | None = None
    """``center`` keeps the aspect ratio, ``squash`` does not."""

    def __post_init__(self) -> None:
        if self.interpolation not in (None, *_FILTERS):
            raise UserError(
                f"unknown resampling filter {_shown(self.interpolation)}; known: {', '.join(_FILTERS)}"
            )
        pct = self.crop_pct
        if pct is not None and (
            not isinstance(pct, int | float) or isinstance(pct, bool) or not 0.1 <= pct <= 1
        ):
            raise UserError(f"crop_pct must lie in 0.1..1, not {_shown(pct)}")
        if self.crop_mode not in (None, *get_args(CropMode)):
            raise UserError(f"unknown crop_mode {_shown(self.crop_mode)}; known: center, squash")

    @classmethod
    def of_timm(cls, config: Mapping[str, Any], where: object) -> Preprocessing:
        """Read timm's keys, as its ``pretrained_cfg`` or our exports state them.

        Args:
            config: The keys and values.
            where: Named in errors.

        Raises:
            UserError: A value is unknown. Random filters and added borders count as not stated.
        """
        filter_, mode = config.get("interpolation"), config.get("crop_mode")
        try:
            return cls(
                None if filter_ in ("random", "") else filter_,
                config.get("crop_pct"),
                None if mode in ("border", "") else mode,
            )
        except UserError as error:
            raise UserError(f"{printable(where)}: {error}") from None

    @classmethod
    def of_transformers(cls, config: Mapping[str, Any], where: object) -> Preprocessing:
        """Read the content of ``preprocessor_config.json``.

        Sizes that no resize and crop to the input express, such as crops larger than the image, count as not stated.

        Args:
            config: The content.
            where: Named in errors.

        Raises:
            UserError: ``resample`` is none of Pillow's filters.
        """
        resample = config.get("resample")
        if resample is not None and (
            not isinstance(resample, int) or isinstance(resample, bool) or not 0 <= resample < len(_FILTERS)
        ):
            raise UserError(
                f"{printable(where)}: resample is {_shown(resample)}, not one of Pillow's filters 0..5"
            )
        filter_ = None if resample is None else _FILTERS[resample]
        size, crop = config.get("size"), config.get("crop_size")
        crop = crop.get("height") if isinstance(crop, dict) else crop
        if not isinstance(size, dict) or config.get("do_resize") is False:
            return cls(filter_)  # a bare number means another thing in each class of transformers
        if not config.get("do_center_crop"):
            return cls(filter_, None, "squash") if {"height", "width"} <= size.keys() else cls(filter_)
        mode: CropMode = "center" if "shortest_edge" in size else "squash"
        side = size.get("shortest_edge", size.get("height"))
        if not isinstance(side, int) or not isinstance(crop, int) or not 0 < 0.1 * side <= crop <= side:
            return cls(filter_)
        return cls(filter_, crop / side, mode)

    def stated(self) -> dict[str, Any]:
        """timm's keys and their values, where there is one."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def to_transformers(self, size: tuple[int, int], default: CropMode) -> dict[str, Any]:
        """The keys of ``preprocessor_config.json`` about resizing; bicubic where no filter is stated.

        Args:
            size: Height and width of the input, pixels.
            default: The mode where none is stated.
        """
        sides = {"height": size[0], "width": size[1]}
        height, width = self.scaled(size)
        squash, cropped = (self.crop_mode or default) == "squash", (height, width) != size
        scaled = {"height": height, "width": width} if squash else {"shortest_edge": min(height, width)}
        content = {"resample": _FILTERS.index(self.interpolation or "bicubic"), "size": scaled}
        if squash and not cropped:
            return {**content, "do_center_crop": False}  # some classes crop unless told otherwise
        return {**content, "do_center_crop": True, "crop_size": sides}

    def scaled(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width, pixels, before the centre is cropped to ``size``."""
        share = self.crop_pct or 1.0
        rows, columns = (math.floor(side / share + 1e-6) for side in size)
        return rows, columns


def _shown(value: Any) -> str:
    return f"{printable(repr(value)):.40}"


UNSTATED = Preprocessing()
