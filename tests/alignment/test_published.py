"""Reading checkpoints of the authors' release; errors name the tensors that do not fit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from students import decoder_block, decoder_of
from torch import Tensor, nn

from localign.alignment.published import fold_layer_scale, read_published
from localign.alignment.student import Student, build_student
from localign.backbones import Backbone, create_backbone
from localign.errors import UserError

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def backbone_of(**kwargs: Any) -> Backbone:
    return create_backbone(
        "vit_tiny_patch16_224", weights="none", image_size=32, model_kwargs={**SMALL, **kwargs}
    )


def student_of(backbone: Backbone, **options: Any) -> Student:
    torch.manual_seed(1)
    student = build_student(backbone, soft_cap=30.0, **options).eval()
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.2)
    return student


def published_state(student: Student) -> dict[str, Tensor]:
    state = {f"encoder.{k}": v for k, v in student.encoder.backbone.vit.state_dict().items()}
    state |= {f"encoder.head.{k}": v for k, v in student.encoder.head.state_dict().items()}
    return state | {f"decoder.{k}": v for k, v in decoder_of(student).state_dict().items()}


def save(path: Path, state: dict[str, Tensor], **extra: Any) -> Path:
    content = {
        "state_dict": state,
        "epoch": 4,
        "arch": "vit",
        "version": 2,
        "args": argparse.Namespace(lr=3e-4),
    }
    torch.save({**content, **extra}, path)
    return path


def outputs(student: Student) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    keep = torch.rand(2, 2, 4, generator=generator) < 0.5
    with torch.no_grad():
        reconstruction: Tensor = student(images, keep)
    return reconstruction


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("options", [{}, {"decoder_depth": 3, "layer_scale": None}])
def test_reading_a_published_file_restores_the_student(
    tmp_path: Path, prefix: str, options: dict[str, Any]
) -> None:
    backbone = backbone_of()
    student = student_of(backbone, **options)
    before = {k: v.clone() for k, v in backbone.vit.state_dict().items()}
    state = {prefix + k: v for k, v in published_state(student).items()}
    read = read_published(save(tmp_path / "a.pth.tar", state), backbone, soft_cap=30.0)
    assert torch.equal(outputs(read), outputs(student))
    assert not read.training
    assert all(torch.equal(v, before[k]) for k, v in backbone.vit.state_dict().items())
    assert backbone.soft_cap is None


def test_a_gated_decoder_is_read(tmp_path: Path) -> None:
    backbone = create_backbone(
        "eva02_base_patch16_clip_224",
        weights="none",
        image_size=32,
        model_kwargs={"depth": 2, "embed_dim": 48, "num_heads": 3},
    )
    student = build_student(backbone, soft_cap=None).eval()
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.2)
    read = read_published(save(tmp_path / "a.pth.tar", published_state(student)), backbone, soft_cap=None)
    assert decoder_of(read).config.gated_width == backbone.vit.blocks[0].mlp.fc2.in_features
    assert torch.equal(outputs(read), outputs(student))


def test_averaged_weights_are_preferred_and_decoder_heads_come_from_the_arguments(tmp_path: Path) -> None:
    backbone = backbone_of()
    student = student_of(backbone)
    state = published_state(student)
    plain = {k: v + 1 for k, v in state.items()}
    path = save(
        tmp_path / "a.pth.tar", plain, state_dict_ema=state, args=argparse.Namespace(decoder_num_heads=6)
    )
    read = read_published(path, backbone, soft_cap=30.0)
    assert torch.equal(read.encoder.head.weight, student.encoder.head.weight)
    assert decoder_block(read, 0).attn.num_heads == 6


@torch.no_grad()
def test_layer_scale_folds_into_the_layers_before_it() -> None:
    scaled = backbone_of(init_values=0.5)
    for block in scaled.vit.blocks:
        nn.init.uniform_(block.ls1.gamma, 0.1, 2)
        nn.init.uniform_(block.ls2.gamma, 0.1, 2)
    plain = backbone_of()
    folded = fold_layer_scale(scaled.vit.state_dict(), plain.vit)
    plain.vit.load_state_dict(folded, strict=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(plain.tokens(images), scaled.tokens(images), atol=1e-5)
    kept = fold_layer_scale(scaled.vit.state_dict(), scaled.vit)
    assert all(torch.equal(v, kept[k]) for k, v in scaled.vit.state_dict().items())


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    backbone = backbone_of()
    state = published_state(student_of(backbone))
    path = tmp_path / "a.pth.tar"

    def refused(changed: dict[str, Tensor], reason: str) -> None:
        with pytest.raises(UserError, match=reason) as caught:
            read_published(save(path, changed), backbone, soft_cap=30.0)
        assert "a.pth.tar" in str(caught.value)

    def without(*names: str) -> dict[str, Tensor]:
        return {k: v for k, v in state.items() if not k.startswith(names)}

    refused(without("encoder.blocks.1.mlp.fc1.bias"), r"missing 1 \(blocks\.1\.mlp\.fc1\.bias\)")
    refused(without("encoder.head.bias"), r"encoder\.head does not fit: missing 1 \(bias\)")
    refused(
        without("decoder.blocks.0.norm1.weight"),
        r"decoder does not fit: missing 1 \(blocks\.0\.norm1\.weight\)",
    )
    refused(without("decoder.pos_embed"), "lacks pos_embed")
    refused(without("decoder."), "not a published alignment checkpoint")
    refused(without("encoder."), "not a published alignment checkpoint")
    refused({**state, "encoder.extra": torch.ones(1)}, r"extra 1 \(extra\)")
    refused({**state, "encoder.pos_embed": torch.ones(1, 9, 48)}, r"pos_embed \(1, 9, 48\) for \(1, 5, 48\)")
