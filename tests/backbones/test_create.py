"""Backbones from names and weight files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from localign.backbones import CATALOGUE, CatalogueEntry, create_backbone, save_backbone
from localign.errors import UserError
from localign.options.names import EMBEDDED

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
NAME = "vit_tiny_patch16_224"


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_random_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = create_backbone(NAME, weights="none", model_kwargs=SMALL, seed=3)
    assert torch.equal(torch.rand(1), expected)
    assert same(first, create_backbone(NAME, weights="none", model_kwargs=SMALL, seed=3))
    assert not same(first, create_backbone(NAME, weights="none", model_kwargs=SMALL, seed=4))


@pytest.mark.parametrize(
    ("name", "near"),
    [("clip-vit-bb", "clip-vit-b"), ("vit_tiny_patch16_22", NAME), ("scenes-vitt", "scenes-vit")],
)
def test_an_unknown_name_is_answered_with_near_ones(name: str, near: str) -> None:
    with pytest.raises(UserError, match="unknown backbone") as caught:
        create_backbone(name)
    assert f"'{near}'" in str(caught.value)


def test_an_unknown_tag_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="augreg_in21k_ft_in1k"):
        create_backbone(f"{NAME}.no_such_tag", weights="none")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_weight_file_loads_whatever_its_classifier(tmp_path: Path, suffix: str) -> None:
    model: Any = timm.create_model(NAME, num_classes=7, **SMALL)
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, file)
    else:
        save_file(model.state_dict(), file)
    backbone = create_backbone(NAME, weights=str(file), model_kwargs=SMALL)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(backbone.tokens(images), model.eval().forward_features(images))


def test_a_weight_file_of_another_size_is_resampled_and_of_another_model_refused(tmp_path: Path) -> None:
    model: Any = timm.create_model(NAME, num_classes=0, **SMALL)
    file = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), file)
    small = create_backbone(NAME, weights=str(file), image_size=64, model_kwargs=SMALL)
    assert small.vit.pos_embed.shape == (1, 17, 48)
    assert torch.equal(small.vit.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    with pytest.raises(UserError, match=r"missing.*blocks\.2"):
        create_backbone(NAME, weights=str(file), model_kwargs={**SMALL, "depth": 3})


def test_moco_v3_needs_and_takes_the_authors_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--weights"):
        create_backbone("moco-vit-b")
    monkeypatch.setitem(CATALOGUE, "moco-small", CatalogueEntry(NAME, 64, 3e-4, True, loader="moco-v3"))
    trained = timm.create_model(NAME, num_classes=0, img_size=64, **SMALL).state_dict()
    state = {f"module.base_encoder.{k}": v for k, v in trained.items()}
    state |= {f"module.momentum_encoder.{k}": v + 1 for k, v in trained.items()}
    state["module.base_encoder.head.0.weight"] = torch.zeros(3, 48)
    torch.save({"epoch": 300, "state_dict": state}, tmp_path / "moco.pth.tar")
    backbone = create_backbone("moco-small", weights=str(tmp_path / "moco.pth.tar"), model_kwargs=SMALL)
    assert all(torch.equal(v, trained[k]) for k, v in backbone.vit.state_dict().items())
    torch.save(trained, tmp_path / "plain.pth")
    with pytest.raises(UserError, match="not a MoCo v3"):
        create_backbone("moco-small", weights=str(tmp_path / "plain.pth"), model_kwargs=SMALL)


def test_an_export_folder_is_a_name_whose_arguments_are_fixed(tmp_path: Path) -> None:
    backbone = create_backbone(NAME, weights="none", image_size=32, model_kwargs=SMALL)
    save_backbone(backbone, tmp_path)
    assert same(create_backbone(str(tmp_path)), backbone)
    changes: list[dict[str, Any]] = [{"weights": "none"}, {"model_kwargs": {"depth": 1}}]
    for name in (str(tmp_path), EMBEDDED):
        for change in changes:
            with pytest.raises(UserError, match="are fixed"):
                create_backbone(name, **change)


def test_a_local_timm_folder_is_built_again_without_the_folder(tmp_path: Path) -> None:
    trained = create_backbone(NAME, weights="none", image_size=32, model_kwargs=SMALL)
    save_backbone(trained, tmp_path / "v1.0")
    from_timm = create_backbone(f"local-dir:{tmp_path / 'v1.0'}")
    assert from_timm.architecture == NAME
    assert same(from_timm, trained)
    save_backbone(from_timm, tmp_path / "again")
    (tmp_path / "v1.0" / "model.safetensors").unlink()
    assert same(create_backbone(str(tmp_path / "again")), trained)


def test_what_cannot_be_built_is_a_user_error(tmp_path: Path) -> None:
    for weights in ("pretrained", "none"):
        with pytest.raises(UserError, match="cannot be downloaded or built"):
            create_backbone(f"local-dir:{tmp_path / 'absent'}", weights=weights)
    with pytest.raises(UserError, match="deepth"):
        create_backbone(NAME, weights="none", model_kwargs={"deepth": 2})
    with pytest.raises(UserError, match="no weight file"):
        create_backbone(NAME, weights=str(tmp_path / "absent.pth"), model_kwargs=SMALL)
