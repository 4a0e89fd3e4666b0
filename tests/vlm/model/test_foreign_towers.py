"""Towers from folders that transformers or timm wrote: built, trained, exported and planned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from foreign_folders import folder_of, hidden_states, timm_folder
from vlm_runs import arguments, trained

from localign.alignment import export_student
from localign.alignment.student import build_student
from localign.backbones import create_backbone
from localign.cli import main, parse
from localign.vlm.model.build import load_vlm, vision_sources


@pytest.fixture(params=["clip", "siglip", "dinov2", "timm"])
def tower(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "timm":
        return timm_folder(tmp_path / "tower", num_classes=0)
    return folder_of(request.param, tmp_path / "tower")[1]


def test_the_folder_is_the_tower(data: Path, tower: Path, tmp_path: Path) -> None:
    config = parse("vlm train", arguments(data, tmp_path / "run", "--backbone", str(tower))[2:])
    (source,) = vision_sources(config)
    assert not source.aligned
    assert source.backbone.grid == (4, 4)
    assert main(arguments(data, tmp_path / "run", "--backbone", str(tower), "--dry-run")) == 0


def test_the_embedded_backbone_is_planned(data: Path, tmp_path: Path) -> None:
    assert main(arguments(data, tmp_path / "run", "--backbone", "scenes-vit", "--dry-run")) == 0


@pytest.mark.slow
def test_a_model_is_trained_with_it(data: Path, tower: Path, tmp_path: Path) -> None:
    trained(data, tmp_path / "run", "--backbone", str(tower), "--steps", "2")
    model, _ = load_vlm(tmp_path / "run")
    assert len(model.vision.towers) == 1


@torch.no_grad()
def test_the_image_tokens_start_from_transformers_hidden_states(data: Path, tmp_path: Path) -> None:
    theirs, folder = folder_of("clip", tmp_path / "tower")
    config = parse("vlm train", arguments(data, tmp_path / "run", "--backbone", str(folder))[2:])
    (source,) = vision_sources(config)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    expected = hidden_states(theirs, pixels).hidden_states[-2]
    torch.testing.assert_close(source.backbone.tokens(pixels, layer=-2, norm=False), expected)


@pytest.mark.parametrize("size", ["48", "32x64"])
def test_an_aligned_tower_and_its_decoder_take_another_size(data: Path, size: str, tmp_path: Path) -> None:
    model = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    backbone = create_backbone("vit_tiny_patch16_224", weights="none", image_size=32, model_kwargs=model)
    student = build_student(backbone, soft_cap=None)
    folder = export_student(student, tmp_path / "aligned", provenance={"command": "align"})
    options = ("--backbone", str(folder), "--adapter", "decoder", "--image-size", size)
    trained(data, tmp_path / "run", *options, "--steps", "1")
    vlm, _ = load_vlm(tmp_path / "run")
    rows, columns = (int(n) for n in size.split("x")) if "x" in size else (int(size), int(size))
    assert vlm.vision.image_size == (rows, columns)
    found = vlm.adapter.get_parameter("decoder.pos_embed").detach()  # trained for one step
    assert student.decoder is not None
    before = student.decoder.pos_embed.detach()[:, 1:].transpose(1, 2).reshape(1, -1, 2, 2)
    grid = (rows // 16, columns // 16)
    expected = F.interpolate(before, size=grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found[:, 1:], expected, atol=5e-3, rtol=0)
    assert found.shape[1] == 1 + grid[0] * grid[1]
