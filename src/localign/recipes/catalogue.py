"""The backbones of the paper by name, with the settings of their published alignment runs (Table 6)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CatalogueEntry:
    """One published backbone."""

    timm_name: str
    """timm architecture and weight tag; for MoCo v3 only the architecture."""
    image_size: int
    """Side of the square input, pixels."""
    lr: float
    """Peak learning rate of the alignment at batch size 1024."""
    soft_cap: bool
    """Whether the alignment used soft-capped attention, with cap 30."""
    data: str = "IN21k"
    """Training images of the alignment."""
    epochs: int = 5
    """Epochs of the alignment."""
    loader: str = "timm"
    """Source of the weights: "timm", or "moco-v3" for the checkpoint file of MoCo v3's authors."""


CATALOGUE: dict[str, CatalogueEntry] = {
    "in1k-vit-t": CatalogueEntry("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 224, 3e-4, True),
    "in1k-vit-s": CatalogueEntry("vit_small_patch16_224.augreg_in21k_ft_in1k", 224, 3e-4, True),
    "in1k-vit-b": CatalogueEntry("vit_base_patch16_224.augreg_in21k_ft_in1k", 224, 3e-4, True),
    "in1k-vit-l": CatalogueEntry("vit_large_patch16_224.augreg_in21k_ft_in1k", 224, 2e-4, True),
    "moco-vit-b": CatalogueEntry("vit_base_patch16_224", 224, 3e-4, True, "IN1k", 50, loader="moco-v3"),
    "clip-vit-b": CatalogueEntry("vit_base_patch16_clip_quickgelu_224.openai", 224, 3e-4, True),
    "clip-vit-l": CatalogueEntry("vit_large_patch14_clip_quickgelu_224.openai", 224, 2e-4, True),
    "clip-vit-l-336px": CatalogueEntry("vit_large_patch14_clip_quickgelu_336.openai", 336, 2e-4, True),
    "siglip-vit-b": CatalogueEntry("vit_base_patch16_siglip_224.webli", 224, 3e-4, True),
    "siglip-vit-so400m": CatalogueEntry("vit_so400m_patch14_siglip_224.webli", 224, 2e-4, True),
    "siglip-vit-so400m-384px": CatalogueEntry("vit_so400m_patch14_siglip_384.webli", 384, 2e-4, True),
    "openclip-vit-b": CatalogueEntry("vit_base_patch16_clip_224.laion2b", 224, 3e-4, True),
    "dfn-vit-b": CatalogueEntry("vit_base_patch16_clip_224.dfn2b", 224, 3e-4, True),
    "eva02-vit-b": CatalogueEntry("eva02_base_patch16_clip_224.merged2b", 224, 3e-4, False),
    "mae-vit-b": CatalogueEntry("vit_base_patch16_224.mae", 224, 3e-4, True, "IN1k", 50),
    "beit-vit-b": CatalogueEntry("beit_base_patch16_224.in22k_ft_in22k_in1k", 224, 3e-4, False),
    "beitv2-vit-b": CatalogueEntry("beitv2_base_patch16_224.in1k_ft_in22k_in1k", 224, 3e-4, False),
    "dino-vit-b": CatalogueEntry("vit_base_patch16_224.dino", 224, 3e-4, True, "IN1k", 50),
    "dinov2-vit-b": CatalogueEntry("vit_base_patch14_reg4_dinov2.lvd142m", 224, 3e-4, True),
}
