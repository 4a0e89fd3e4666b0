"""Attention as it is computed on a CPU for speed gives the same results."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention

from localign.backbones import Backbone, create_backbone
from localign.backbones.attention import attention_eager, fuse_attention, soft_cap

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
CPU = torch.device("cpu")


def build(name: str = "vit_tiny_patch16_224", **kwargs: Any) -> Backbone:
    return create_backbone(name, weights="none", image_size=48, model_kwargs={**SMALL, **kwargs})


def test_the_cap_on_queries_is_the_cap_on_logits() -> None:
    query, key, value = (torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    fast = attention_eager(query, key, value, 3.0)
    logits = query @ key.transpose(-2, -1) * 8**-0.5
    plain = soft_cap(logits, 3.0).softmax(dim=-1) @ value
    assert torch.allclose(fast, plain)
    for ours, expected in zip(
        torch.autograd.grad(fast.square().sum(), (query, key, value)),
        torch.autograd.grad(plain.square().sum(), (query, key, value)),
        strict=True,
    ):
        assert torch.allclose(ours, expected)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "eva02_base_patch16_clip_224"]
)
def test_unfused_attention_is_the_same_forward_and_backward(name: str) -> None:
    fused = build(name)
    plain = copy.deepcopy(fused)
    fuse_attention(plain, CPU)
    fuse_attention(fused, torch.device("cuda"))
    assert all(b.attn.fused_attn for b in fused.vit.blocks)
    assert not any(b.attn.fused_attn for b in plain.vit.blocks)
    images, slope = torch.randn(2, 3, 48, 48), torch.randn(48)
    results = []
    for backbone in (fused, plain):
        tokens = backbone.tokens(images)
        # A sum of squares would have no gradient, because it is constant after a norm.
        torch.autograd.backward((tokens @ slope).sum())
        gradient = backbone.vit.patch_embed.proj.weight.grad
        results.append((tokens.detach(), gradient))
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, atol=1e-4 * float(expected.abs().max()))


def test_timm_still_has_the_switch() -> None:
    assert isinstance(Attention(8, num_heads=2).fused_attn, bool)
