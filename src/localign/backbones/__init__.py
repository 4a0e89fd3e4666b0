"""One ViT behind one small interface: tokens of any layer, patch grid, prefix tokens, pixel statistics."""

from localign.backbones.attention import AttentionBackend, SoftCapAttention, apply_soft_cap
from localign.backbones.backbone import Backbone
from localign.backbones.catalogue import CATALOGUE, Entry
from localign.backbones.create import EMBEDDED, create_backbone
from localign.backbones.export import load_backbone, save_backbone

__all__ = [
    "CATALOGUE",
    "EMBEDDED",
    "AttentionBackend",
    "Backbone",
    "Entry",
    "SoftCapAttention",
    "apply_soft_cap",
    "create_backbone",
    "load_backbone",
    "save_backbone",
]
