"""The paper's backbones exist in timm with the names and sizes of the catalogue."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg

from localign.backbones import CATALOGUE
from localign.backbones.building import build_vit
from localign.backbones.create import backbone_of

# name: image, patch, prefix tokens, width, depth
PUBLISHED = {
    "in1k-vit-t": (224, 16, 1, 192, 12),
    "in1k-vit-s": (224, 16, 1, 384, 12),
    "in1k-vit-b": (224, 16, 1, 768, 12),
    "in1k-vit-l": (224, 16, 1, 1024, 24),
    "moco-vit-b": (224, 16, 1, 768, 12),
    "clip-vit-b": (224, 16, 1, 768, 12),
    "clip-vit-l": (224, 14, 1, 1024, 24),
    "clip-vit-l-336px": (336, 14, 1, 1024, 24),
    "siglip-vit-b": (224, 16, 0, 768, 12),
    "siglip-vit-so400m": (224, 14, 0, 1152, 27),
    "siglip-vit-so400m-384px": (384, 14, 0, 1152, 27),
    "openclip-vit-b": (224, 16, 1, 768, 12),
    "dfn-vit-b": (224, 16, 1, 768, 12),
    "eva02-vit-b": (224, 16, 1, 768, 12),
    "mae-vit-b": (224, 16, 1, 768, 12),
    "beit-vit-b": (224, 16, 1, 768, 12),
    "beitv2-vit-b": (224, 16, 1, 768, 12),
    "dino-vit-b": (224, 16, 1, 768, 12),
    "dinov2-vit-b": (224, 14, 5, 768, 12),
}


def test_the_published_backbones_are_all_there() -> None:
    assert set(CATALOGUE) == set(PUBLISHED)
    assert len(CATALOGUE) == 19


@pytest.mark.parametrize("name", PUBLISHED)
def test_entry_exists_in_timm_and_builds(name: str) -> None:
    entry = CATALOGUE[name]
    image, patch, prefix, width, depth = PUBLISHED[name]
    assert entry.image_size == image
    if entry.loader == "timm":
        cfg = get_pretrained_cfg(entry.timm_name, allow_unregistered=False)
        assert cfg is not None
        assert cfg.has_weights
        assert cfg.input_size[-1] in (image, 518)  # DINOv2 is resampled from 518 pixels
    assert timm.is_model(entry.timm_name.partition(".")[0])
    with torch.device("meta"):
        vit = build_vit(entry.timm_name, {"img_size": entry.image_size}, pretrained=False)
    backbone = backbone_of(vit, name=name, architecture=entry.timm_name, model_kwargs={})
    assert backbone.image_size == (image, image)
    assert backbone.patch_size == (patch, patch)
    assert backbone.grid == (image // patch, image // patch)
    assert (backbone.num_prefix_tokens, backbone.width, backbone.depth) == (prefix, width, depth)


def test_published_settings() -> None:
    low = {"in1k-vit-l", "clip-vit-l", "clip-vit-l-336px", "siglip-vit-so400m", "siglip-vit-so400m-384px"}
    assert {n for n, e in CATALOGUE.items() if e.lr == 2e-4} == low
    assert {e.lr for e in CATALOGUE.values()} == {2e-4, 3e-4}
    assert {n for n, e in CATALOGUE.items() if not e.soft_cap} == {
        "eva02-vit-b",
        "beit-vit-b",
        "beitv2-vit-b",
    }
    long = {n for n, e in CATALOGUE.items() if (e.data, e.epochs) == ("IN1k", 50)}
    assert long == {"moco-vit-b", "mae-vit-b", "dino-vit-b"}
    assert all((e.data, e.epochs) == ("IN21k", 5) for n, e in CATALOGUE.items() if n not in long)


def test_the_soft_cap_fits_exactly_where_the_catalogue_says() -> None:
    for name, entry in CATALOGUE.items():
        with torch.device("meta"):
            vit = build_vit(entry.timm_name, {"depth": 1}, pretrained=False)
        assert (type(vit.blocks[0].attn).__module__ == "timm.layers.attention") == entry.soft_cap, name
