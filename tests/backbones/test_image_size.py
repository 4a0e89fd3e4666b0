"""Backbones at another image size than that of their weights: positions are resampled, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from foreign_folders import PATCH, SIZE, folder_of, timm_folder

from localign.backbones import create_backbone, load_backbone, save_backbone
from localign.backbones.building import image_sides, set_image_size
from localign.errors import UserError
from localign.options.names import EMBEDDED

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
ARCHITECTURES = {
    "class token": ("vit_tiny_patch16_224", {}),
    "no prefix": ("vit_base_patch16_siglip_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}),
    "rotary": ("vit_small_patch16_dinov3", {}),
    "rotary and absolute": ("eva02_tiny_patch14_224", {"patch_size": 16}),
    "relative": ("beit_base_patch16_224", {}),
}
OTHERS = [48, (32, 48), (64, 48)]


def exported(kind: str, folder: Path, size: int = 32) -> Path:
    name, arguments = ARCHITECTURES[kind]
    backbone = create_backbone(name, weights="none", image_size=size, model_kwargs={**SMALL, **arguments})
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.2)
    return save_backbone(backbone, folder)


def images(size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_the_own_size_changes_nothing(kind: str, tmp_path: Path) -> None:
    folder = exported(kind, tmp_path)
    plain = load_backbone(folder)
    for size in (32, (32, 32)):
        same = create_backbone(folder, image_size=size)
        assert torch.equal(same(images((32, 32))), plain(images((32, 32))))
        assert same.model_kwargs == plain.model_kwargs


def resampled(
    positions: torch.Tensor, prefix: int, old: tuple[int, int], new: tuple[int, int]
) -> torch.Tensor:
    """A plain reference: the grid of positions as an image of one pixel per patch."""
    grid = positions[0, prefix:].T.reshape(1, -1, *old)
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True)
    return torch.cat([positions[:, :prefix], grid.flatten(2).transpose(1, 2)], dim=1)


@pytest.mark.parametrize("size", OTHERS)
@pytest.mark.parametrize("kind", ["class token", "no prefix", "registers", "rotary and absolute"])
@torch.no_grad()
def test_absolute_positions_are_resampled(kind: str, size: Any, tmp_path: Path) -> None:
    folder = exported(kind, tmp_path)
    plain, other = load_backbone(folder), create_backbone(folder, image_size=size)
    rows, columns = image_sides(size)
    assert other.image_size == (rows, columns)
    assert other.grid == (rows // 16, columns // 16)
    before = plain.vit.pos_embed
    expected = resampled(before, before.shape[1] - plain.num_patches, plain.grid, other.grid)
    torch.testing.assert_close(other.vit.pos_embed, expected, atol=1e-6, rtol=0)
    assert all(
        torch.equal(value, other.vit.state_dict()[name])
        for name, value in plain.vit.state_dict().items()
        if name != "pos_embed"
    )


@pytest.mark.parametrize("size", OTHERS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_the_size_is_kept_in_exports_which_timm_reads(kind: str, size: Any, tmp_path: Path) -> None:
    other = create_backbone(exported(kind, tmp_path / "first"), image_size=size)
    folder = save_backbone(other, tmp_path / "second")
    pixels = images(other.image_size)
    again = load_backbone(folder)
    assert again.image_size == other.image_size
    assert torch.equal(again(pixels), other(pixels))
    theirs: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(theirs.forward_features(pixels), other(pixels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", OTHERS)
@torch.no_grad()
def test_timm_resamples_a_weight_file_to_the_same_tokens(size: Any, tmp_path: Path) -> None:
    folder = exported("class token", tmp_path)
    file = folder / "model.safetensors"
    ours = create_backbone(folder, image_size=size)
    theirs = create_backbone("vit_tiny_patch16_224", weights=str(file), image_size=size, model_kwargs=SMALL)
    assert torch.equal(ours(images(ours.image_size)), theirs(images(ours.image_size)))


@pytest.mark.parametrize("size", [(48, 48), (24, 24), (64, 40)])
@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "dinov2-registers", "vit"])
@torch.no_grad()
def test_tokens_at_other_sizes_are_those_of_transformers(
    name: str, size: tuple[int, int], tmp_path: Path
) -> None:
    model, folder = folder_of(name, tmp_path / "first")
    pixels = images(size)
    always = {"interpolate_pos_encoding": True} if name in ("clip", "siglip", "vit") else {}
    states = model(pixel_values=pixels, output_hidden_states=True, **always).hidden_states
    backbone = create_backbone(folder, image_size=size)
    for block in range(backbone.depth):
        found = backbone.tokens(pixels, layer=block, norm=False)
        torch.testing.assert_close(found, states[block + 1], atol=1e-5, rtol=1e-5)
    again = load_backbone(
        save_backbone(create_backbone(folder), tmp_path / "second")
    )  # an export resamples so, too
    assert torch.equal(set_image_size(again, size).tokens(pixels), backbone.tokens(pixels))


@pytest.mark.parametrize(("size", "nearest"), [(40, "32 or 48"), ((32, 40), "32 or 48"), ((8, 32), "16")])
@pytest.mark.parametrize("kind", ["class token", "rotary", "relative"])
def test_a_size_that_the_patches_do_not_divide_is_one_line(
    kind: str, size: Any, nearest: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"which do not divide .*give --image-size {nearest}$"):
        create_backbone(exported(kind, tmp_path), image_size=size)


@pytest.mark.parametrize("size", [0, -32, (32,), (32, 0), (1, 2, 3), 10**9, (32, 10**12)])
@pytest.mark.parametrize("name", [EMBEDDED, "vit_tiny_patch16_224"])
def test_what_is_no_size_is_one_line(name: str, size: Any) -> None:
    with pytest.raises(UserError, match="--image-size takes a side or HEIGHTxWIDTH") as raised:
        create_backbone(name, weights="pretrained" if name == EMBEDDED else "none", image_size=size)
    assert "\n" not in str(raised.value)


def test_positions_that_do_not_fit_in_memory_are_one_line(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "timm", patch_size=1, img_size=4)
    backbone = create_backbone(folder)
    with pytest.raises(UserError, match="do not fit in this machine's memory"):
        set_image_size(backbone, 2**16)
    assert backbone.image_size == (4, 4)


def test_folders_of_transformers_take_two_sides(tmp_path: Path) -> None:
    _, folder = folder_of("clip", tmp_path)
    assert create_backbone(folder, image_size=[SIZE, SIZE + PATCH]).grid == (4, 5)
    with pytest.raises(UserError, match="give --image-size 32 or 40"):
        create_backbone(folder, image_size=SIZE + 3)
