"""Vision transformers in transformers' format: one file per family, names in and names out."""

from localign.backbones.families.base import TransformersFamily
from localign.backbones.families.clip import CLIP
from localign.backbones.families.dinov2 import DINOv2
from localign.backbones.families.dinov3 import DINOv3
from localign.backbones.families.siglip import SigLIP, SigLIP2
from localign.backbones.families.vit import ViT

TRANSFORMERS_FAMILIES: dict[str, TransformersFamily] = {
    "clip": CLIP(),
    "siglip": SigLIP(),
    "siglip2": SigLIP2(),
    "dinov2": DINOv2(),
    "dinov3": DINOv3(),
    "vit": ViT(),
}
"""Names of the formats -> the families."""

__all__ = ["TRANSFORMERS_FAMILIES", "TransformersFamily"]
