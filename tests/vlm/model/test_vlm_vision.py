"""The vision tower: its tokens in each configuration, and that its config rebuilds it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from tiny_vlm import tiny_backbone
from vlm_models import pixels

from localign.alignment.student import build_student
from localign.backbones import Backbone, create_backbone
from localign.backbones.building import build_vit
from localign.errors import UserError
from localign.vlm.model.presets import VisionSource, build_tower
from localign.vlm.model.vision import TowerConfig, VisionTower


def tower_of(
    *backbones: Backbone, layer: int = -2, norm: bool = False, keep_prefix: bool = False
) -> VisionTower:
    configs = [TowerConfig.of(b, layer=layer, norm=norm, keep_prefix=keep_prefix) for b in backbones]
    return VisionTower(configs, backbones)


def aligned_backbone(backbone: Backbone, **options: Any) -> Backbone:
    """An aligned backbone: soft-capped attention and a new final norm, here with large random weights."""
    aligned = build_student(backbone, soft_cap=1.0, **options).encoder.backbone.eval()
    torch.manual_seed(5)
    for parameter in aligned.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return aligned


def rebuilt(tower: VisionTower) -> VisionTower:
    """The tower's config through JSON, then its weights, strictly."""
    stored = json.loads(json.dumps([asdict(config) for config in tower.configs]))
    configs = [TowerConfig(**facts) for facts in stored]
    assert tuple(configs) == tower.configs
    twin = VisionTower(configs)
    twin.load_state_dict(tower.state_dict(), strict=True)
    return twin


def test_a_baseline_gives_the_patches_of_the_second_to_last_block_without_norm() -> None:
    backbone = tiny_backbone()
    tower = build_tower("mlp", [VisionSource(backbone)])
    expected = backbone.tokens(backbone.normalise(pixels()), layer=1, norm=False)[:, 1:]
    assert torch.equal(tower(pixels()), expected)
    assert (tower.num_tokens, tower.num_prefix_tokens, tower.width) == (4, 0, 16)
    assert tower.image_size == (16, 16)
    kept = build_tower("transformer", [VisionSource(backbone)])
    assert torch.equal(kept(pixels())[:, 1:], expected)
    assert (kept.num_tokens, kept.num_prefix_tokens) == (5, 1)


@pytest.mark.parametrize("kind", ["linear", "mlp", "transformer"])
def test_an_aligned_backbone_gives_all_tokens_of_the_last_block_after_the_norm(kind: Any) -> None:
    backbone = aligned_backbone(tiny_backbone())
    tower = build_tower(kind, [VisionSource(backbone, aligned=True)])
    assert torch.equal(tower(pixels()), backbone(backbone.normalise(pixels())))
    assert (tower.num_tokens, tower.num_prefix_tokens) == (5, 1)


@pytest.mark.parametrize(("aligned", "quirks"), [(False, False), (True, False), (True, True)])
def test_a_truncated_tower_ends_before_the_last_two_blocks(aligned: bool, quirks: bool) -> None:
    backbone = tiny_backbone()
    tower = build_tower("truncated", [VisionSource(backbone, aligned=aligned)], published_quirks=quirks)
    assert torch.equal(tower(pixels()), backbone.tokens(backbone.normalise(pixels()), layer=0, norm=False))
    assert tower.num_prefix_tokens == 1


def test_several_towers_are_concatenated_on_channels_each_with_its_own_statistics() -> None:
    first, second = tiny_backbone(width=16), tiny_backbone("other", prefix=False, width=24)
    second.mean, second.std = (0.1, 0.2, 0.3), (0.3, 0.2, 0.1)
    tower = build_tower("fused-mlp", [VisionSource(first), VisionSource(second)])
    tokens = tower(pixels())
    assert tokens.shape == (2, 4, 40)
    assert tower.width == 40
    assert torch.equal(tokens[..., :16], tower_of(first)(pixels()))
    expected = second.tokens((pixels().float() / 255 - torch.tensor(second.mean).view(3, 1, 1))
                             / torch.tensor(second.std).view(3, 1, 1), layer=-2, norm=False)  # fmt: skip
    assert torch.allclose(tokens[..., 16:], expected, atol=1e-6)
    fused = build_tower("fused-mlp", [VisionSource(first), VisionSource(second, aligned=True)])
    assert fused.configs[1].norm
    assert fused.configs[1].layer == 2
    assert fused.num_prefix_tokens == 0


def test_unused_parts_are_dropped_and_the_source_is_unchanged() -> None:
    backbone = tiny_backbone()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    tower = tower_of(backbone)
    assert len(tower.backbones[0].vit.blocks) == 2
    assert not [k for k in tower.state_dict() if "vit.norm" in k or "fc_norm" in k or "blocks.2" in k]
    pooled = tower_of(vit_of(POOLING["average after all blocks"]), layer=-1, norm=True)
    assert not [k for k in pooled.state_dict() if "fc_norm" in k]
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert len(before) == len(backbone.state_dict())
    assert all(p.requires_grad for p in backbone.parameters())


POOLING: dict[str, dict[str, Any]] = {
    "class token": {},
    "attention pool": {"class_token": False, "global_pool": "map"},
    "average after all blocks": {"class_token": False, "global_pool": "avg"},
    "no final norm": {"final_norm": False},
    "registers": {"reg_tokens": 2, "no_embed_class": True},
}


def vit_of(extra: dict[str, Any]) -> Backbone:
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, **extra}
    vit = build_vit("vit_tiny_patch16_224", kwargs, pretrained=False)
    return Backbone(vit, name="tiny", architecture="vit_tiny_patch16_224", model_kwargs=kwargs).eval()


@pytest.mark.parametrize("pooling", POOLING)
def test_a_tower_is_built_again_from_its_config_and_weights(pooling: str) -> None:
    backbone = vit_of(POOLING[pooling])
    for whole, aligned in ((backbone, False), (aligned_backbone(backbone), True)):
        for kind in ("mlp", "transformer", "truncated"):
            tower = build_tower(kind, [VisionSource(whole, aligned=aligned)])
            assert torch.equal(rebuilt(tower)(pixels()), tower(pixels()))
            assert not [k for k in tower.state_dict() if "attn_pool" in k]


def test_a_rebuilt_tower_has_the_eps_of_the_new_norm_and_the_soft_cap() -> None:
    aligned = aligned_backbone(tiny_backbone())
    tower = rebuilt(build_tower("mlp", [VisionSource(aligned, aligned=True)]))
    assert tower.backbones[0].vit.norm.eps == 1e-5
    assert tower.backbones[0].vit.blocks[0].norm1.eps == tiny_backbone().vit.blocks[0].norm1.eps == 1e-6
    assert tower.backbones[0].soft_cap == 1.0
    plain = tower_of(tiny_backbone(), layer=-1, norm=True)
    assert rebuilt(plain).backbones[0].vit.norm.eps == 1e-6


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_a_tower_from_the_meta_device_loads_weights_and_computes_its_buffers(name: str) -> None:
    kwargs: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    backbone = create_backbone(name, weights="none", image_size=32, model_kwargs=kwargs)
    tower = tower_of(backbone, layer=-1, norm=True)
    with torch.device("meta"):
        empty = VisionTower(tower.configs)
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu")
    for buffer in empty.buffers():
        buffer.fill_(7)  # to_empty leaves memory uninitialised
    empty.load_state_dict(tower.state_dict(), strict=True)
    empty.init_non_persistent_buffers()
    assert torch.equal(empty(pixels(size=32)), tower(pixels(size=32)))


def test_a_tower_is_frozen_until_it_is_set_trainable() -> None:
    tower = tower_of(tiny_backbone())
    assert not any(p.requires_grad for p in tower.parameters())
    assert not tower.train().training
    assert not any(module.training for module in tower.modules())
    assert not tower.requires_grad_(True)(pixels()).requires_grad
    tower.set_trainable(True)
    assert tower.training
    tower(pixels()).sum().backward()
    assert all(p.grad is not None for p in tower.parameters())
    assert not tower.eval().training
    tower.train()
    assert tower.set_trainable(False).backbones[0].training is False
    assert not tower(pixels()).requires_grad


def test_a_tower_in_bfloat16_gives_bfloat16_near_float32() -> None:
    tower = build_tower("mlp", [VisionSource(aligned_backbone(tiny_backbone()), aligned=True)])
    exact = tower(pixels())
    rounded = tower.to(torch.bfloat16)(pixels())
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


def test_pixels_of_another_type_or_size_are_refused() -> None:
    tower = tower_of(tiny_backbone())
    with pytest.raises(ValueError, match=r"must be uint8 \(batch, 3, 16, 16\), not torch\.float32"):
        tower(pixels().float())
    with pytest.raises(ValueError, match=r"not torch\.uint8 \(2, 3, 24, 24\)"):
        tower(pixels(size=24))


def test_backbones_that_cannot_be_fused_are_named() -> None:
    small, large = tiny_backbone("small"), tiny_backbone("large", image_size=32)
    with pytest.raises(
        UserError, match=r"small \(16 x 16 pixels, 2 x 2 patches\) and large \(32 x 32 pixels"
    ):
        tower_of(small, large)
    with pytest.raises(UserError, match="small and small can be fused only without their prefix tokens"):
        tower_of(small, small, keep_prefix=True)
    with pytest.raises(UserError, match="at least one backbone"):
        VisionTower([])
    with pytest.raises(UserError, match="small has 3 blocks; there is no layer -4"):
        build_tower("truncated", [VisionSource(small)], published_quirks=True)
