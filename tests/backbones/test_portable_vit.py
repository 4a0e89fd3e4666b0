"""transformers loads export folders with the code in them, and refuses them without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoImageProcessor, CLIPVisionModel, Dinov2Model, SiglipVisionModel, ViTModel

from localign.alignment.student import prepare_backbone
from localign.backbones import Backbone, create_backbone, load_backbone, save_backbone
from localign.portable.modeling_localign_vit import LocalignViT

SMALL: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
CASES: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "clip, soft-capped": ("vit_base_patch16_clip_quickgelu_224", {}, 3.0),
    "siglip, attention pooling, soft-capped": ("vit_base_patch16_siglip_224", {}, 3.0),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {}, None),
    "another epsilon": ("vit_tiny_patch16_224", {"norm_eps": 1e-3}, 3.0),
    "eva": ("eva02_tiny_patch14_224", {}, None),
    "beit, pooled before the norm": ("beit_base_patch16_224", {}, None),
}

ELSEWHERE = """
import socket, sys
sys.modules["localign"] = None
def refuse(*_): raise RuntimeError("fetched something")
socket.socket.connect = refuse
import torch
from transformers import AutoModel
for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        tokens = model(torch.load(f"{folder}/images.pt")).last_hidden_state
    torch.save(tokens, f"{folder}/tokens.pt")
"""


def backbone_of(case: str, *, aligned: bool = True) -> Backbone:
    name, kwargs, soft_cap = CASES[case]
    kwargs = {**SMALL, **kwargs}
    backbone = create_backbone(name, weights="none", image_size=(16, 24), model_kwargs=kwargs)
    if aligned:
        backbone = prepare_backbone(backbone.copy(soft_cap=soft_cap))
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return backbone.eval()


def images(backbone: Backbone) -> Tensor:
    return torch.randn(2, 3, *backbone.image_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_its_tokens_are_the_backbones(case: str, aligned: bool, tmp_path: Path) -> None:
    backbone = backbone_of(case, aligned=aligned)
    save_backbone(backbone, tmp_path)
    load: Any = LocalignViT.from_pretrained
    model, info = load(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not (aligned and info["unexpected_keys"])  # an unaligned export also has its pooling
    pixels = images(backbone)
    assert torch.equal(model.eval()(pixels).last_hidden_state, backbone.tokens(pixels))
    assert model.config.hidden_size == backbone.width
    assert torch.equal(load_backbone(tmp_path).tokens(pixels), backbone.tokens(pixels))


@pytest.mark.slow
@torch.no_grad()
def test_a_process_without_localign_gives_the_same_tokens(tmp_path: Path) -> None:
    folders = {}
    for number, case in enumerate(CASES):
        backbone = backbone_of(case)
        folders[save_backbone(backbone, tmp_path / str(number))] = backbone
        torch.save(images(backbone), tmp_path / str(number) / "images.pt")
    environment = {"PATH": "", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, folders)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for folder, backbone in folders.items():
        assert torch.equal(torch.load(folder / "tokens.pt"), backbone.tokens(images(backbone)))


@pytest.mark.parametrize("other", [CLIPVisionModel, SiglipVisionModel, Dinov2Model, ViTModel])
def test_other_classes_do_not_fill_it_with_random_weights(other: Any, tmp_path: Path) -> None:
    save_backbone(backbone_of("clip, soft-capped"), tmp_path)
    with pytest.raises(Exception, match=r"load this folder with AutoModel.*trust_remote_code=True"):
        other.from_pretrained(tmp_path)


def test_the_image_processor_needs_no_code(tmp_path: Path) -> None:
    backbone = backbone_of("clip, soft-capped")
    save_backbone(backbone, tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert (processor.crop_size["height"], processor.crop_size["width"]) == backbone.image_size
    assert processor.size["shortest_edge"] == min(backbone.image_size)
    assert tuple(processor.image_mean) == backbone.mean
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "localign_vit"


def test_a_config_follows_no_name_to_the_hub(tmp_path: Path) -> None:
    save_backbone(backbone_of("eva"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architecture": "hf-hub:someone/model"}))
    load: Any = LocalignViT.from_pretrained
    with pytest.raises(ValueError, match="timm has no model 'hf-hub:someone/model'"):
        load(tmp_path)
