"""Tokens of any layer, and the geometry they have, for every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from localign.backbones import Backbone, create_backbone
from localign.errors import UserError

SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3}
# name, constructor arguments, image size, grid, prefix tokens
FAMILIES: list[tuple[str, dict[str, Any], Any, tuple[int, int], int]] = [
    ("vit_tiny_patch16_224", SMALL, None, (14, 14), 1),
    ("vit_tiny_patch16_224", SMALL, 64, (4, 4), 1),
    ("vit_tiny_patch16_224", SMALL, (48, 96), (3, 6), 1),
    ("vit_small_patch14_reg4_dinov2", SMALL, 56, (4, 4), 5),
    ("vit_so400m_patch14_siglip_384", {**SMALL, "depth": 2}, None, (27, 27), 0),
    ("vit_base_patch16_clip_quickgelu_224", SMALL, 64, (4, 4), 1),
    ("vit_tiny_patch16_224", {**SMALL, "global_pool": "avg"}, 64, (4, 4), 1),
    ("eva02_tiny_patch14_224", SMALL, 56, (4, 4), 1),
    ("eva02_base_patch16_clip_224", SMALL, 64, (4, 4), 1),
    ("beit_base_patch16_224", {**SMALL, "depth": 2}, 64, (4, 4), 1),
]


def build(name: str = "vit_tiny_patch16_224", size: Any = 32, **kwargs: Any) -> Backbone:
    return create_backbone(name, weights="none", image_size=size, model_kwargs={**SMALL, **kwargs})


def images_for(backbone: Backbone, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *backbone.image_size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "kwargs", "size", "grid", "prefix"), FAMILIES)
@torch.no_grad()
def test_geometry_and_last_tokens_are_those_of_timm(
    name: str, kwargs: dict[str, Any], size: Any, grid: tuple[int, int], prefix: int
) -> None:
    backbone = create_backbone(name, weights="none", image_size=size, model_kwargs=kwargs)
    assert (backbone.grid, backbone.num_prefix_tokens) == (grid, prefix)
    assert backbone.num_patches == grid[0] * grid[1]
    assert (backbone.width, backbone.num_heads, backbone.depth) == (48, 3, kwargs["depth"])
    images = images_for(backbone, 1)
    tokens = backbone.tokens(images)
    assert tokens.shape == (1, prefix + grid[0] * grid[1], 48)
    assert torch.equal(tokens, backbone.vit.forward_features(images))
    assert torch.equal(tokens, backbone(images))
    assert not backbone.training


def test_pixels_beyond_the_last_full_patch_are_spare() -> None:
    backbone = build("vit_so400m_patch14_siglip_384", None, depth=1)
    assert backbone.image_size == (384, 384)
    assert backbone.grid[0] * backbone.patch_size[0] == 378


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "eva02_base_patch16_clip_224", "beit_base_patch16_224"]
)
@torch.no_grad()
def test_an_early_layer_runs_no_later_block(name: str) -> None:
    backbone = build(name)
    ran: list[int] = []
    for index, block in enumerate(backbone.vit.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    images = images_for(backbone)
    for layer, expected in ((0, [0]), (-2, [0, 1]), (1, [0, 1]), (-1, [0, 1, 2])):
        ran.clear()
        backbone.tokens(images, layer=layer)
        assert ran == expected
    ran.clear()
    assert torch.equal(backbone.tokens(images, layer=-2), backbone.tokens(images, layer=1))


@torch.no_grad()
def test_tokens_of_an_early_layer_are_the_block_output_after_the_final_norm() -> None:
    backbone = build()
    caught: list[Tensor] = []
    backbone.vit.blocks[1].register_forward_hook(lambda module, inputs, output: caught.append(output))
    images = images_for(backbone)
    plain = backbone.tokens(images, layer=1, norm=False)
    assert torch.equal(plain, caught[0])
    assert torch.equal(backbone.tokens(images, layer=1), backbone.vit.norm(caught[0]))
    assert torch.equal(backbone.tokens(images, layer=1), backbone.normalise_tokens(plain))


def test_only_existing_layers_are_given() -> None:
    backbone = build()
    assert [backbone.block_index(layer) for layer in (0, 2, -1, -3)] == [0, 2, 2, 0]
    for layer in (3, -4):
        with pytest.raises(UserError, match=f"no layer {layer}"):
            backbone.block_index(layer)


@torch.no_grad()
def test_a_norm_after_pooling_is_left_out_of_the_tokens_unless_asked_for() -> None:
    backbone = build(global_pool="avg")
    images = images_for(backbone)
    assert torch.equal(backbone.tokens(images), backbone.tokens(images, norm=False))
    assert not torch.equal(backbone.pooled(images), backbone.tokens(images)[:, 1:].mean(1))
    backbone.final_norm = "fc_norm"
    assert torch.equal(backbone.tokens(images), backbone.vit.fc_norm(backbone.tokens(images, norm=False)))
    backbone.final_norm = "none"
    assert torch.equal(backbone.tokens(images), backbone.tokens(images, norm=False))


@torch.no_grad()
def test_pooled_output_of_a_class_token_model_is_that_token() -> None:
    backbone = build()
    images = images_for(backbone)
    assert torch.equal(backbone.pooled(images), backbone.tokens(images)[:, 0])


def test_pixels_are_normalised_with_the_models_own_statistics() -> None:
    backbone = create_backbone(
        "vit_base_patch16_clip_224.openai", weights="none", image_size=32, model_kwargs=SMALL
    )
    mean, std = torch.tensor(backbone.mean), torch.tensor(backbone.std)
    assert backbone.mean[0] == pytest.approx(0.4815, abs=1e-4)
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).expand(1, 3, 1, 3)
    normalised = backbone.normalise(pixels)
    assert normalised.dtype == torch.float32
    expected = (torch.tensor([0.0, 128 / 255, 1.0]) - mean[:, None]) / std[:, None]
    assert torch.allclose(normalised[0, :, 0], expected)


def test_quantities_of_the_mlp_and_the_attention() -> None:
    assert build("vit_base_patch16_clip_quickgelu_224").activation.__name__ == "QuickGELU"
    assert build().activation.__name__ == "GELU"
    assert build().qkv_bias
    assert not build(qkv_bias=False).qkv_bias
    assert build("beit_base_patch16_224").qkv_bias  # kept outside of its linear layer
    assert build("eva02_tiny_patch14_224", 56).qkv_bias


def test_a_copy_shares_no_weights() -> None:
    backbone = build()
    twin = backbone.copy()
    with torch.no_grad():
        twin.vit.cls_token.add_(1)
    assert not torch.equal(twin.vit.cls_token, backbone.vit.cls_token)


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("resnet18", {}, "is a ResNet"),
        ("vit_tiny_r_s16_p8_224", {}, "hybrids"),
        ("vit_base_patch16_xp_224", {"depth": 1}, "parallel blocks"),
        ("swin_tiny_patch4_window7_224", {}, "localign takes timm's"),
    ],
)
def test_other_models_are_refused(name: str, kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        create_backbone(name, weights="none", model_kwargs=kwargs)


@torch.no_grad()
def test_a_soft_capped_backbone_can_be_exported_by_torch() -> None:
    backbone = build().copy(soft_cap=30.0, attention="eager")
    images = images_for(backbone)
    program = torch.export.export(backbone, (images,))
    assert torch.allclose(program.module()(images), backbone(images), atol=1e-6)
