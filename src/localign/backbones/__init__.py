"""Vision transformers behind one interface: tokens of any layer, patch grid, prefix tokens, pixel statistics."""

from localign.backbones.attention import SoftCapAttention, apply_soft_cap
from localign.backbones.backbone import Backbone
from localign.backbones.create import create_backbone
from localign.backbones.export import export_folder, find_export, load_backbone, save_backbone
from localign.options.names import EMBEDDED, AttentionBackend
from localign.recipes.catalogue import CATALOGUE, CatalogueEntry

__all__ = [
    "CATALOGUE",
    "EMBEDDED",
    "AttentionBackend",
    "Backbone",
    "CatalogueEntry",
    "SoftCapAttention",
    "apply_soft_cap",
    "create_backbone",
    "export_folder",
    "find_export",
    "load_backbone",
    "save_backbone",
]
