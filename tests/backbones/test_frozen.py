"""What a CPU computes otherwise for speed is the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers import Attention

from localign.alignment import teacher as teachers
from localign.alignment.teacher import Teacher
from localign.backbones import Backbone, create_backbone
from localign.backbones.attention import attention_eager, fuse_attention, soft_cap
from localign.backbones.frozen import FrozenLinear, fuse_frozen, fuses_here

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
        (tokens @ slope).sum().backward()  # a norm's output has a square that is always the same
        gradient = backbone.vit.patch_embed.proj.weight.grad
        results.append((tokens.detach(), gradient))
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_frozen_layers_give_the_same_and_keep_their_names(approximate: str) -> None:
    backbone = build().requires_grad_(False)
    for block in backbone.vit.blocks:
        block.mlp.act.approximate = approximate
    frozen = copy.deepcopy(backbone)
    fuse_frozen(frozen.vit.blocks)
    fuse_frozen(frozen.vit.blocks)  # a second time there is nothing left to do
    before, after = backbone.vit.state_dict(), frozen.vit.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert isinstance(frozen.vit.blocks[0].mlp.fc1, FrozenLinear) == fuses_here()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(frozen.tokens(images), backbone.tokens(images))
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = frozen.tokens(images), backbone.tokens(images)
        exact = backbone.tokens(images)
    # The activation is applied before rounding instead of after it.
    assert (ours - exact).abs().mean() < 1.05 * (theirs - exact).abs().mean()
    assert (ours - exact).abs().mean() > 0


@torch.no_grad()
def test_views_in_pieces_are_the_views(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Teacher(build())
    views = torch.randn(7, 3, 48, 48)
    whole = teacher.of_views(views)
    monkeypatch.setattr(teachers, "_CPU_VIEWS", 3)
    assert torch.allclose(teacher.of_views(views), whole, atol=1e-5)


def test_a_teacher_on_a_cpu_leaves_its_backbone_as_it_was() -> None:
    teacher = Teacher(build())
    kinds = [type(module) for module in teacher.backbone.modules()]
    weights = [id(parameter) for parameter in teacher.parameters()]
    views = torch.randn(2, 3, 48, 48)
    before = teacher(views)
    teacher.prepare(CPU)
    assert [type(module) for module in teacher.backbone.modules()] == kinds
    assert [id(parameter) for parameter in teacher.parameters()] == weights
    assert torch.allclose(teacher(views), before, atol=1e-5)
    assert any(isinstance(module, FrozenLinear) for module in teacher.modules()) == fuses_here()


def test_timm_still_has_the_switch() -> None:
    assert isinstance(Attention(8, num_heads=2).fused_attn, bool)
