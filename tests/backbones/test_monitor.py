"""The monitor reads the logits before capping."""

from __future__ import annotations

import math

import pytest
import torch

from localign.backbones import Backbone, create_backbone
from localign.backbones.monitor import attention_logit_stats

ONE_HEAD = {"depth": 1, "embed_dim": 16, "num_heads": 1}


def build(name: str = "vit_tiny_patch16_224", soft_cap: float | None = None) -> Backbone:
    backbone = create_backbone(name, weights="none", image_size=32, model_kwargs=ONE_HEAD)
    return backbone.copy(soft_cap=soft_cap) if soft_cap else backbone


def set_logits(backbone: Backbone, query: float, key: float) -> None:
    """Make every query and key one constant vector: each logit is width * query * key / sqrt(width)."""
    attn, width = backbone.vit.blocks[0].attn, backbone.width
    with torch.no_grad():
        attn.qkv.weight.zero_()
        attn.qkv.bias.zero_()
        attn.qkv.bias[:width] = query
        attn.qkv.bias[width : 2 * width] = key


@pytest.mark.parametrize("soft_cap", [None, 30.0])
def test_constant_logits(soft_cap: float | None) -> None:
    backbone = build(soft_cap=soft_cap)
    images = torch.randn(2, 3, 32, 32)
    set_logits(backbone, query=-5.0, key=3.0)
    stats = attention_logit_stats(backbone, images)
    assert stats["attention_logit_max"] == pytest.approx(16 * 15 / 4)
    assert stats["attention_near_cap"] == 1.0
    set_logits(backbone, query=1.0, key=1.0)
    assert attention_logit_stats(backbone, images) == {"attention_logit_max": 4.0, "attention_near_cap": 0.0}


def test_near_the_cap_means_nine_tenths_of_it_after_capping() -> None:
    backbone = build(soft_cap=10.0)
    images = torch.randn(1, 3, 32, 32)
    edge = 10 * math.atanh(0.9) / 4  # 4 = sqrt(width)
    for factor, share in ((0.999, 0.0), (1.001, 1.0)):
        set_logits(backbone, query=edge * factor, key=1.0)
        assert attention_logit_stats(backbone, images)["attention_near_cap"] == share


def test_reading_leaves_no_hook_and_other_families_give_nothing() -> None:
    backbone = build()
    attention_logit_stats(backbone, torch.randn(1, 3, 32, 32))
    assert not backbone.vit.blocks[0].attn._forward_pre_hooks
    assert attention_logit_stats(build("beit_base_patch16_224"), torch.randn(1, 3, 32, 32)) == {}
