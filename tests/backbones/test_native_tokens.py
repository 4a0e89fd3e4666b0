"""Images of several sizes in one batch: each image's tokens are those that it has alone, and those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_folders import PATCH, folder_of, vision_model
from torch import Tensor

from localign.backbones import Backbone, create_backbone
from localign.backbones.building import set_image_size
from localign.backbones.native import NativeImages, check_native, native_tokens, patchify
from localign.errors import UserError

GRIDS = ((4, 4), (2, 3), (5, 1), (3, 5), (2, 3))
SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def pictures(grids: tuple[tuple[int, int], ...] = GRIDS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, rows * PATCH, columns * PATCH, generator=generator) for rows, columns in grids]


def batch_of(images: list[Tensor], padding: float = 0.0) -> NativeImages:
    patches = [patchify(image, (PATCH, PATCH)) for image in images]
    longest = max(map(len, patches))
    padded = [F.pad(p, (0, 0, 0, longest - len(p)), value=padding) for p in patches]
    return NativeImages(
        torch.stack(padded), tuple((i.shape[1] // PATCH, i.shape[2] // PATCH) for i in images)
    )


def plain(name: str, **more: Any) -> Backbone:
    backbone = create_backbone(
        name, weights="none", image_size=32, model_kwargs={**SMALL, "patch_size": PATCH, **more}
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.2)
    return backbone


KINDS = {
    "class token": lambda: plain("vit_tiny_patch16_224"),
    "registers": lambda: plain("vit_small_patch14_reg4_dinov2"),
    "no prefix": lambda: plain("vit_base_patch16_siglip_224"),
    "norm before": lambda: plain("vit_base_patch16_clip_224"),
    "soft-cap": lambda: plain("vit_tiny_patch16_224").copy(soft_cap=2.0, attention="eager"),
    "soft-cap, flex": lambda: plain("vit_tiny_patch16_224").copy(soft_cap=2.0, attention="flex"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, -1])
@torch.no_grad()
def test_every_image_has_the_tokens_that_it_has_alone(kind: str, layer: int) -> None:
    backbone, images = KINDS[kind](), pictures()
    prefix = backbone.num_prefix_tokens
    tokens = native_tokens(backbone, batch_of(images, padding=1e3), layer)
    assert tokens.shape == (len(GRIDS), prefix + 16, backbone.width)
    for image, found, (rows, columns) in zip(images, tokens, GRIDS, strict=True):
        alone = set_image_size(backbone.copy(), (rows * PATCH, columns * PATCH))
        expected = alone.tokens(image[None], layer)[0]
        torch.testing.assert_close(found[: prefix + rows * columns], expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_images_of_the_own_size_have_the_tokens_of_the_fixed_grid() -> None:
    for kind in ("class token", "registers", "soft-cap"):
        backbone, images = KINDS[kind](), pictures(((4, 4),) * 3)
        native = batch_of(images)
        assert native.attention_mask(1) is None
        torch.testing.assert_close(
            native_tokens(backbone, native), backbone(torch.stack(images)), atol=2e-5, rtol=1e-5
        )


@torch.no_grad()
def test_tokens_equal_siglip_2_of_transformers(tmp_path: Path) -> None:
    model, folder = folder_of("siglip2", tmp_path)
    backbone, native = create_backbone(folder), batch_of(pictures())
    flat = native.patches.unflatten(-1, (3, PATCH, PATCH)).permute(0, 1, 3, 4, 2).flatten(2)
    states = vision_model(model)(
        pixel_values=flat,
        pixel_attention_mask=native.valid(),
        spatial_shapes=torch.tensor(GRIDS),
        output_hidden_states=True,
    ).hidden_states
    valid = native.valid()
    for layer in range(2):
        ours = native_tokens(backbone, native, layer, norm=False)
        torch.testing.assert_close(ours[valid], states[layer + 1][valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["class token", "soft-cap"])
def test_gradients_are_those_of_the_images_alone(kind: str) -> None:
    backbone, images = KINDS[kind](), pictures()
    native = batch_of(images, padding=1e3)
    valid = native.valid(backbone.num_prefix_tokens)

    def gradients(losses: list[Tensor]) -> list[Tensor]:
        backbone.zero_grad()
        torch.stack(losses).sum().backward()
        return [p.grad.clone() for p in backbone.parameters() if p.grad is not None]

    alone = [native_tokens(backbone, batch_of([image])).square().sum() for image in images]
    expected = gradients(alone)
    found = gradients([native_tokens(backbone, native)[valid].square().sum()])
    backbone.vit.set_grad_checkpointing(True)
    recomputed = gradients([native_tokens(backbone, native)[valid].square().sum()])
    assert len(expected) > 20
    for first, second, third in zip(expected, found, recomputed, strict=True):
        torch.testing.assert_close(second, first, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(third, second)


def test_views_hide_patches_and_never_show_padding() -> None:
    native = batch_of(pictures())
    keep = torch.rand(len(GRIDS), 3, 16, generator=torch.Generator().manual_seed(3)) < 0.5
    views = native.masked(keep)
    assert views.grids[:4] == ((4, 4), (4, 4), (4, 4), (2, 3))
    assert torch.equal(
        (views.patches != 0).any(-1), keep.flatten(0, 1) & native.valid().repeat_interleave(3, 0)
    )


@pytest.mark.parametrize(
    "name", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "vit_small_patch16_dinov3"]
)
def test_models_with_other_positions_are_one_line(name: str) -> None:
    with pytest.raises(UserError, match="need a ViT with a position embedding") as raised:
        check_native(plain(name))
    assert "\n" not in str(raised.value)
