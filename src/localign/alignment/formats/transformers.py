"""Exports in transformers' formats, compared with the backbone before they count as written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from localign import rng
from localign.backbones import Backbone
from localign.backbones.export import CONFIG_FILE, OTHER_FILES
from localign.backbones.families.parity import token_difference
from localign.backbones.families.writing import save_transformers
from localign.data.sources import open_source
from localign.data.transforms import EvalTransform
from localign.errors import UserError
from localign.files import refilling_folder
from localign.files.output import PROVENANCE_KEY
from localign.options.export import ExportConfig

IMAGES = 16
"""Images of the comparison."""
EXACT, BAKED = 1e-4, 0.05
"""Default tolerances, in units of the tokens' root mean square: rounding, and a dropped soft-cap."""


def export_transformers(backbone: Backbone, config: ExportConfig, provenance: dict[str, Any]) -> float:
    """Write a folder that transformers loads, and measure how far its tokens are from the backbone's.

    Args:
        backbone: In eval mode on the CPU.
        config: Options of the export.
        provenance: Stored in ``config.json`` under ``localign_provenance``.

    Returns:
        The largest difference, divided by the root mean square of the tokens.

    Raises:
        UserError: The backbone does not fit the format, or the difference is above the tolerance; then nothing is
            written.
    """
    if backbone.soft_cap is not None and not config.bake:
        raise UserError(
            f"{backbone.name} has soft-capped attention ({backbone.soft_cap:g}), which transformers' classes lack; "
            "--bake --images DIR drops the soft-cap and measures the change, --format timm keeps it"
        )
    facts = {PROVENANCE_KEY: {**provenance, "dropped_soft_cap": backbone.soft_cap}}
    tolerance = config.tolerance if config.tolerance is not None else BAKED if config.bake else EXACT
    with refilling_folder(config.out, OTHER_FILES, CONFIG_FILE) as folder:
        save_transformers(backbone, folder, config.format, extra=facts)
        difference = token_difference(backbone, folder, comparison_images(config, backbone))
        check_difference(difference, tolerance, backbone, config)
    return difference


def check_difference(difference: float, tolerance: float, backbone: Backbone, config: ExportConfig) -> None:
    """Raise a UserError unless the tokens' difference is within the tolerance."""
    if not difference <= tolerance:
        raise UserError(
            f"in the format {config.format} the tokens of {backbone.name} change by {difference:.2g} of their root "
            f"mean square, more than the tolerance of {tolerance:g}"
        )


def comparison_images(config: ExportConfig, backbone: Backbone) -> Tensor:
    """The first images of ``--images``, else random pixels: uint8 ``(images, 3, height, width)``."""
    if config.images is None:
        shape = (IMAGES, 3, *backbone.image_size)
        pixels = rng.generator(0, "export comparison").integers(0, 256, shape, dtype="uint8")
        return torch.from_numpy(pixels)
    size = backbone.image_size
    source = open_source(config.images, image_size=size)
    transform = EvalTransform(size, preprocessing=backbone.preprocessing)
    return torch.stack([transform(source.load(index)) for index in range(min(IMAGES, len(source)))])
