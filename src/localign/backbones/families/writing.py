"""Writes a backbone as a folder that transformers' own class of its family loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from localign.backbones.backbone import Backbone
from localign.backbones.building import build_vit
from localign.backbones.families import TRANSFORMERS_FAMILIES
from localign.backbones.families.reading import CONFIG_FILE, PREPROCESSOR_FILE
from localign.backbones.preprocessing import CropMode
from localign.errors import UserError
from localign.weights import check_finite

_PROCESSORS = {
    "clip": "CLIPImageProcessor",
    "siglip": "SiglipImageProcessor",
    "siglip2": "Siglip2ImageProcessor",
    "dinov2": "BitImageProcessor",
    "dinov3": "DINOv3ViTImageProcessorFast",
    "vit": "ViTImageProcessor",
}
_CROPPING = ("clip", "dinov2")
"""Families whose processors keep the aspect ratio and crop the centre."""


def save_transformers(
    backbone: Backbone, folder: Path, family: str, *, extra: dict[str, Any] | None = None
) -> Path:
    """Write ``config.json``, ``model.safetensors`` and ``preprocessor_config.json`` into a new folder.

    Args:
        backbone: Not changed. A soft-cap is left out, since transformers' classes have none.
        folder: Exists, and is put in place as a whole by the caller.
        family: ``clip``, ``siglip``, ``siglip2``, ``dinov2``, ``dinov3`` or ``vit``.
        extra: Further keys of ``config.json``, such as provenance; transformers keeps keys that it does not know.

    Returns:
        The folder.

    Raises:
        UserError: The backbone has a part that the family lacks, or lacks one that the family needs, or a weight is not
            finite.
    """
    config, state = transformers_content(backbone, family)
    check_finite(state, f"the backbone {backbone.name} is not exported")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    contents = {
        PREPROCESSOR_FILE: preprocessor_config(backbone, family),
        CONFIG_FILE: {**config, **(extra or {})},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return folder


def transformers_content(backbone: Backbone, family: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The content of ``config.json``, and the tensors with transformers' names.

    Raises:
        UserError: As for :func:`save_transformers`.
    """
    chosen = TRANSFORMERS_FAMILIES[family]
    try:
        if backbone.final_norm != "norm":
            raise UserError(f"its last norm is {backbone.final_norm}")
        height, width = backbone.image_size
        if chosen.square and height != width:
            raise UserError(f"transformers' class takes square images only, not {height} x {width} pixels")
        config = chosen.config_of(backbone.vit)
        architecture, arguments = chosen.architecture(config)
        state = chosen.to_transformers(
            {k: v.detach().cpu().float() for k, v in backbone.vit.state_dict().items()}, config
        )
    except (
        UserError,
        AttributeError,
    ) as error:  # AttributeError: a part of the family that this timm model lacks
        raise UserError(f"{backbone.name} does not fit the format {family}: {error}") from None
    with torch.device("meta"):
        twin = build_vit(architecture, arguments, pretrained=False).state_dict()
    shapes = ({(k, tuple(v.shape)) for k, v in part.items()} for part in (twin, backbone.vit.state_dict()))
    if other := sorted({name for name, _ in set.symmetric_difference(*shapes)}):
        raise UserError(
            f"{backbone.name} does not fit the format {family}: it differs in {', '.join(other[:6])}"
        )
    return config, state


def preprocessor_config(backbone: Backbone, family: str) -> dict[str, Any]:
    """The content of ``preprocessor_config.json`` for the image processor of a family."""
    common = {
        "image_processor_type": _PROCESSORS[family],
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(backbone.mean),
        "image_std": list(backbone.std),
        "rescale_factor": 1 / 255,
    }
    default: CropMode = "center" if family in _CROPPING else "squash"
    resizing = backbone.preprocessing.to_transformers(backbone.image_size, default)
    if family == "siglip2":
        grid = {"patch_size": backbone.patch_size[0], "max_num_patches": backbone.num_patches}
        return {**common, **grid, "resample": resizing["resample"]}
    return {**common, **resizing}
