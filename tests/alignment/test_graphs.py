"""Exports as ONNX and torch.export: equal tokens, for any number of images, without localign."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_folders import folder_of, naflex_folder

from localign.alignment.student import prepare_backbone
from localign.backbones import Backbone, create_backbone, save_backbone
from localign.cli import main

EVA: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
FAMILIES = [
    "clip",
    "siglip",
    "siglip2",
    "dinov2",
    "dinov2-registers",
    "dinov3",
    "vit",
    "naflex",
    "eva",
    "beit",
]
CAPPED = {"clip", "siglip", "dinov2-registers", "vit"}

ELSEWHERE = """
import json, sys
for name in ("localign", "timm", "transformers"):
    sys.modules[name] = None
import numpy as np
folder = sys.argv[1]
facts = json.load(open(f"{folder}/config.json"))
images = np.load(f"{folder}/images.npy")
if facts["format"] == "onnx":
    import onnxruntime
    session = onnxruntime.InferenceSession(f"{folder}/{facts['file']}")
    tokens = session.run([facts["output"]["name"]], {facts["input"]["name"]: images})[0]
else:
    import torch
    tokens = torch.export.load(f"{folder}/{facts['file']}").module()(torch.from_numpy(images)).detach().numpy()
np.save(f"{folder}/tokens.npy", tokens)
"""


def exported(family: str, folder: Path) -> Path:
    """An export of an aligned model of a family, with random weights that matter."""
    if family in ("eva", "beit"):
        name = {"eva": "eva02_tiny_patch14_224", "beit": "beit_base_patch16_224"}[family]
        backbone = create_backbone(name, weights="none", image_size=32, model_kwargs=EVA)
    else:
        make = naflex_folder if family == "naflex" else folder_of
        backbone = create_backbone(make("siglip" if family == "naflex" else family, folder / "in")[1])
    aligned = prepare_backbone(backbone.copy(soft_cap=2.0 if family in CAPPED else None))
    return save_backbone(aligned, folder / "export")


def images_of(backbone: Backbone, count: int) -> torch.Tensor:
    return torch.randn(count, 3, *backbone.image_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "torch-export"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_tokens(
    family: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export, out = exported(family, tmp_path), tmp_path / "out"
    assert main(["export", str(export), "--format", name, "--out", str(out)]) == 0
    assert f"format {name}, tokens within" in capsys.readouterr().out
    backbone = create_backbone(export, attention="eager")
    facts = json.loads((out / "config.json").read_text())
    assert facts["grid"] == list(backbone.grid)
    assert facts["input"]["std"] == list(backbone.std)
    images = images_of(backbone, 3)
    np.save(out / "images.npy", images.numpy())
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(out)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        expected = backbone.tokens(images)
    found = torch.from_numpy(np.load(out / "tokens.npy"))
    assert facts["output"]["shape"][1:] == list(found.shape[1:])
    scale = expected.square().mean().sqrt()
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-4, rtol=0)


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    capsys.readouterr()
    assert main(["export", *command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_missing_package_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    out = tmp_path / "out"
    line = refused(capsys, str(exported("vit", tmp_path)), "--format", "onnx", "--out", str(out))
    assert "pip install 'localign[onnx]'" in line
    assert not out.exists()


def test_above_the_tolerance_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export, out = str(exported("vit", tmp_path)), tmp_path / "out"
    line = refused(capsys, export, "--format", "torch-export", "--tolerance", "-1", "--out", str(out))
    assert "more than the tolerance" in line
    assert not out.exists()
    baked = ("--format", "onnx", "--bake", "--images", "x", "--out", str(out))
    assert "keeps the soft-cap" in refused(capsys, export, *baked)


def test_a_graph_takes_the_place_of_another(tmp_path: Path) -> None:
    export, out = str(exported("vit", tmp_path)), tmp_path / "out"
    assert main(["export", export, "--format", "torch-export", "--out", str(out)]) == 0
    (out / "mine.txt").write_text("mine")
    assert (
        main(
            [
                "export",
                export,
                "--format",
                "vit",
                "--bake",
                "--images",
                "scenes",
                "--tolerance",
                "1",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert not (out / "model.pt2").exists()
    assert (out / "mine.txt").exists()
