"""Models of native resolution on a fixed grid: timm's NaFlexVit and transformers' SigLIP 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from foreign_folders import NAFLEX, NAFLEX_ARGUMENTS, PATCH, folder_of, naflex_folder, vision_model

from localign.alignment.student import prepare_backbone
from localign.backbones import create_backbone, load_backbone, save_backbone
from localign.errors import UserError


def images(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, rows * PATCH, columns * PATCH, generator=generator)


@pytest.mark.parametrize("kind", NAFLEX)
@pytest.mark.parametrize("prefix", ["", "local-dir:"])
@torch.no_grad()
def test_tokens_of_every_block_equal_timms(kind: str, prefix: str, tmp_path: Path) -> None:
    model, folder = naflex_folder(kind, tmp_path)
    backbone = create_backbone(f"{prefix}{folder}")
    assert backbone.grid == (4, 4)
    pixels = images(4, 4)
    torch.testing.assert_close(backbone(pixels), model.forward_features(pixels), atol=1e-5, rtol=1e-5)
    for layer in range(2):
        theirs = model.forward_intermediates(pixels, indices=[layer], intermediates_only=True, output_fmt="NLC",
                                             norm=False)[0]  # fmt: skip
        ours = backbone.tokens(pixels, layer, norm=False)[:, backbone.num_prefix_tokens :]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["siglip", "registers"])
@pytest.mark.parametrize("grid", [(6, 6), (3, 5), (8, 2)])
@torch.no_grad()
def test_tokens_on_another_grid_equal_timms(kind: str, grid: tuple[int, int], tmp_path: Path) -> None:
    model, folder = naflex_folder(kind, tmp_path / "in")
    backbone = create_backbone(folder, image_size=(grid[0] * PATCH, grid[1] * PATCH))
    assert backbone.grid == grid
    pixels = images(*grid)
    expected = model.forward_features(pixels)
    torch.testing.assert_close(backbone(pixels), expected, atol=1e-5, rtol=1e-5)
    again = load_backbone(save_backbone(backbone, tmp_path / "out"))
    assert torch.equal(again(pixels), backbone(pixels))
    assert again.position_interpolation == backbone.position_interpolation


@pytest.mark.parametrize("grid", [(4, 4), (6, 6), (3, 5), (8, 2)])
@torch.no_grad()
def test_tokens_of_siglip_2_on_any_grid_equal_transformers(grid: tuple[int, int], tmp_path: Path) -> None:
    model, folder = folder_of("siglip2", tmp_path)
    backbone = create_backbone(folder, image_size=(grid[0] * PATCH, grid[1] * PATCH))
    pixels = images(*grid)
    flat = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 4, 5, 1)
    patches = grid[0] * grid[1]
    states = vision_model(model)(
        pixel_values=flat.reshape(2, patches, -1),
        pixel_attention_mask=torch.ones(2, patches, dtype=torch.bool),
        spatial_shapes=torch.tensor([grid, grid]),
        output_hidden_states=True,
    ).hidden_states
    for layer in range(2):
        ours = backbone.tokens(pixels, layer, norm=False)
        torch.testing.assert_close(ours, states[layer + 1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_model_by_name_is_prepared_and_stored(tmp_path: Path) -> None:
    arguments = {**NAFLEX_ARGUMENTS, "pos_embed_grid_size": [4, 4]}
    backbone = create_backbone("naflexvit_base_patch16_siglip", weights="none", model_kwargs=arguments)
    prepared = prepare_backbone(backbone.copy(soft_cap=30.0))
    again = load_backbone(save_backbone(prepared, tmp_path))
    assert torch.equal(again(images(4, 4)), prepared(images(4, 4)))
    assert again.soft_cap == 30.0


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("naflexvit_base_patch16_parfac_gap", "factorized positions"),
        ("naflexvit_base_patch16_par_gap", "interpolation of positions"),
        ("naflexvit_base_patch16_radio_v3", "interpolation of positions|norm|positions|EvaBlock"),
    ],
)
def test_parts_that_a_plain_vit_lacks_are_named(name: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"{name} is a NaFlexVit with .*({problem})") as raised:
        create_backbone(name, weights="none", model_kwargs={"depth": 1, "embed_dim": 32, "num_heads": 2})
    assert "\n" not in str(raised.value)


def test_arguments_of_something_else_are_refused(tmp_path: Path) -> None:
    _, folder = naflex_folder("siglip", tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({**config, "model_args": {**config["model_args"], "checkpoint_path": "x.pth"}})
    )
    with pytest.raises(UserError, match="the argument 'checkpoint_path' is not one of a ViT's"):
        create_backbone(folder)
