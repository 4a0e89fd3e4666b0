"""Students aligned at one image size and used at another: encoder and decoder follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_runs import make_images
from foreign_folders import folder_of
from students import decoder_of

import localign
from localign.alignment import export_student, load_student
from localign.alignment.student import Student, build_student
from localign.backbones import create_backbone
from localign.backbones.export import read_config
from localign.cli import main
from localign.errors import UserError

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def exported(folder: Path, name: str = "vit_small_patch16_dinov3") -> Student:
    backbone = create_backbone(name, weights="none", image_size=32, model_kwargs=SMALL)
    torch.manual_seed(1)
    student = build_student(backbone, soft_cap=None, layer_scale=None).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(std=0.2)
    export_student(student, folder)
    return student


def inputs(size: tuple[int, int], patches: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 3, *size, generator=generator), torch.rand(2, 3, patches, generator=generator) < 0.5


@torch.no_grad()
def test_the_own_size_changes_nothing(tmp_path: Path) -> None:
    student = exported(tmp_path)
    pixels, keep = inputs((32, 32), 4)
    for size in (None, 32, (32, 32)):
        assert torch.equal(load_student(tmp_path, image_size=size)(pixels, keep), student(pixels, keep))


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3", "vit_tiny_patch16_224", "vit_base_patch16_siglip_224"]
)
@pytest.mark.parametrize("size", [(64, 64), (32, 64), (64, 48)])
@torch.no_grad()
def test_positions_of_the_decoder_are_resampled(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    student = exported(tmp_path / "first", name)
    before, prefix = decoder_of(student).pos_embed.clone(), student.num_prefix_tokens
    other = load_student(tmp_path / "first", image_size=size)
    grid = (size[0] // 16, size[1] // 16)
    assert other.encoder.backbone.grid == grid
    plain = before[:, prefix:].transpose(1, 2).reshape(1, -1, 2, 2)
    plain = F.interpolate(plain, size=grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    positions = decoder_of(other).pos_embed
    torch.testing.assert_close(positions[:, prefix:], plain, atol=1e-6, rtol=0)
    assert torch.equal(positions[:, :prefix], before[:, :prefix])
    assert decoder_of(other).config.num_tokens == prefix + grid[0] * grid[1]
    pixels, keep = inputs(size, grid[0] * grid[1])
    export_student(other, tmp_path / "second")
    assert torch.equal(load_student(tmp_path / "second")(pixels, keep), other(pixels, keep))


def test_python_takes_a_size(tmp_path: Path) -> None:
    exported(tmp_path)
    assert localign.load(tmp_path, image_size=(48, 64)).grid == (3, 4)
    assert localign.load(tmp_path, decoder=True, image_size=48).encoder.backbone.grid == (3, 3)
    with pytest.raises(UserError, match="without seed"):
        localign.load(tmp_path, decoder=True, seed=1)
    with pytest.raises(UserError, match="give --image-size 32 or 48"):
        localign.load(tmp_path, decoder=True, image_size=40)


@pytest.mark.slow
def test_a_run_is_exported_and_aligned_again_at_another_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, first, second, out = (str(tmp_path / name) for name in ("images", "first", "second", "out"))
    Path(images).mkdir()
    make_images(Path(images), 8)
    tower = str(folder_of("dinov2", tmp_path / "tower")[1])
    common = ["--data", images, "--steps", "2", "--batch-size", "4", "--workers", "0", "--device", "cpu"]
    assert main(["align", "--backbone", tower, "--image-size", "32x48", "--out", first, *common]) == 0
    assert localign.load(first).grid == (4, 6)
    assert main(["align", "--backbone", first, "--image-size", "48", "--out", second, *common]) == 0
    assert localign.load(second).grid == (6, 6)

    command = ["export", second, "--image-size", "40x24", "--out", out]
    assert main(command) == 0
    again = localign.load(out, decoder=True)
    assert again.encoder.backbone.image_size == (40, 24)
    described = read_config(out)
    assert described["pretrained_cfg"]["input_size"] == [3, 40, 24]
    assert described["localign"]["provenance"]["resampled_from"] == [48, 48]
    expected = localign.load(second, decoder=True, image_size=(40, 24))
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in again.state_dict().items())

    capsys.readouterr()
    assert main(["export", second, "--image-size", "41x24", "--out", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.strip().endswith("which do not divide 41; give --image-size 40 or 48")


@pytest.mark.parametrize(
    ("name", "fits"), [("clip", False), ("siglip", False), ("siglip2", False), ("dinov2", False), ("dinov3", True),
                       ("vit", True)]
)  # fmt: skip
def test_formats_of_transformers_at_two_sides(
    name: str, fits: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(name, tmp_path / "in")[1]
    command = [
        "export",
        str(folder),
        "--format",
        name,
        "--image-size",
        "32x48",
        "--out",
        str(tmp_path / "out"),
    ]
    code = main(command)
    said = capsys.readouterr().err.strip().splitlines()
    assert code == (0 if fits else 2), said
    if not fits:
        assert "square" in said[-1]
