"""Backbones that transformers or timm wrote: aligned, exported, and loaded by the software they came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from engine_runs import make_images
from foreign_folders import FORMATS, SIZE, folder_of, hidden_states, timm_folder

import localign
from localign.backbones import create_backbone
from localign.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 8)


def align(backbone: object, images: Path, out: Path, *options: object) -> int:
    fixed = ("--steps", 2, "--batch-size", 4, "--scale-images", 4, "--workers", 0, "--device", "cpu")
    command = ["align", "--backbone", backbone, "--data", images, "--out", out, *fixed, *options]
    return main([str(word) for word in command])


@pytest.mark.parametrize("name", FORMATS)
def test_align_and_return(name: str, images: Path, tmp_path: Path) -> None:
    model, folder = folder_of(name, tmp_path / "in")
    run, out = tmp_path / "run", tmp_path / "out"
    assert align(folder, images, run, "--soft-cap", "none", "--lr", "1e-3") == 0
    assert (
        main(["export", str(run), "--format", FORMATS[name], "--tolerance", "1e-4", "--out", str(out)]) == 0
    )
    kwargs = {"vision_use_head": False} if FORMATS[name].startswith("siglip") else {}
    again = type(model).from_pretrained(out, **kwargs).eval()
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    aligned = localign.load(run)
    states = hidden_states(again, pixels).hidden_states[-1]
    with torch.no_grad():
        torch.testing.assert_close(aligned.tokens(pixels, norm=False), states, atol=1e-4, rtol=1e-4)
    assert not torch.equal(states, hidden_states(model, pixels).hidden_states[-1])


@pytest.mark.parametrize(
    "arguments", [{"num_classes": 0}, {"num_classes": 5}, {"num_classes": 0, "global_pool": "avg"}]
)
@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_folder_of_timm(arguments: dict[str, Any], prefix: str, images: Path, tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "in", **arguments)
    assert align(f"{prefix}{folder}", images, tmp_path / "run") == 0
    export = tmp_path / "run" / "export"
    ours = localign.load(export)
    theirs: Any = timm.create_model(f"local-dir:{export}", pretrained=True).eval()
    for name, tensor in ours.vit.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name


def test_a_run_folder_is_a_backbone(images: Path, tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "in", num_classes=0)
    assert align(folder, images, tmp_path / "first") == 0
    assert align(tmp_path / "first", images, tmp_path / "second") == 0
    first, export = (create_backbone(str(tmp_path / "first" / part)) for part in ("", "export"))
    assert all(torch.equal(v, export.vit.state_dict()[k]) for k, v in first.vit.state_dict().items())
