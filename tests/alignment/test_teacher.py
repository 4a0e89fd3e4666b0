"""The teacher is frozen, and sees masked images exactly as the paper defines them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from localign.alignment.student import prepare_backbone
from localign.alignment.teacher import Teacher, mask_images
from localign.backbones import Backbone, create_backbone
from localign.errors import UserError

SMALL: dict[str, Any] = {"depth": 3, "embed_dim": 48, "num_heads": 3}


def build(name: str = "vit_tiny_patch16_224", size: Any = 32, **kwargs: Any) -> Backbone:
    return create_backbone(name, weights="none", image_size=size, model_kwargs={**SMALL, **kwargs})


def sample(backbone: Backbone, batch: int = 2, masks: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, *backbone.image_size, generator=generator)
    keep = torch.rand(batch, masks, backbone.num_patches, generator=generator) < 0.5
    keep[:, -1] = True
    return images, keep


def test_hidden_patches_are_zero_and_visible_ones_unchanged() -> None:
    images = torch.randn(2, 3, 4, 9)
    keep = torch.tensor([[[1, 0, 1, 0, 1, 1]], [[0, 1, 1, 1, 0, 0]]]).bool()
    views = mask_images(images, keep, grid=(2, 3), patch=(2, 3))
    for image in range(2):
        for patch in range(6):
            rows = slice(patch // 3 * 2, patch // 3 * 2 + 2)
            columns = slice(patch % 3 * 3, patch % 3 * 3 + 3)
            expected = images[image, :, rows, columns] * keep[image, 0, patch]
            assert torch.equal(views[image, :, rows, columns], expected)


def test_views_of_one_image_are_adjacent() -> None:
    images = torch.stack([torch.full((3, 2, 2), 1.0), torch.full((3, 2, 2), 2.0)])
    keep = torch.tensor([True, False, True]).view(1, 3, 1).expand(2, 3, 1)
    views = mask_images(images, keep, (1, 1), (2, 2))
    assert views[:, 0, 0, 0].tolist() == [1, 0, 1, 2, 0, 2]


def test_a_hidden_patch_has_the_mean_colour() -> None:
    backbone = create_backbone(
        "vit_base_patch16_clip_224.openai", weights="none", image_size=32, model_kwargs=SMALL
    )
    views = mask_images(torch.randn(1, 3, 32, 32), torch.zeros(1, 1, 4).bool(), (2, 2), (16, 16))
    mean = torch.tensor(backbone.mean).view(3, 1, 1)
    assert torch.equal(views[0] * torch.tensor(backbone.std).view(3, 1, 1) + mean, mean.expand(3, 32, 32))


def test_spare_pixels_are_zero_in_every_view() -> None:
    backbone = build("vit_so400m_patch14_siglip_384", 45)
    images, keep = sample(backbone)
    views = mask_images(images, keep, backbone.grid, backbone.patch_size).unflatten(0, (2, 3))
    assert backbone.grid == (3, 3)
    assert views[..., 42:, :].abs().max() == 0
    assert views[..., :, 42:].abs().max() == 0
    assert torch.equal(views[:, -1, :, :42, :42], images[..., :42, :42])


@pytest.mark.parametrize(("target", "layer"), [("penultimate", -2), ("last", -1)])
def test_targets_are_tokens_of_masked_images(target: Any, layer: int) -> None:
    backbone = build(size=(32, 64))
    teacher = Teacher(backbone, target)
    images, keep = sample(backbone)
    targets = teacher(images, keep)
    assert targets.shape == (6, 9, 48)
    for image in range(2):
        for mask in range(3):
            view = mask_images(
                images[image : image + 1], keep[image : image + 1, mask : mask + 1], (2, 4), (16, 16)
            )
            alone = backbone.tokens(view, layer=layer)[0]
            assert torch.allclose(targets[3 * image + mask], alone, atol=1e-5)


def test_penultimate_stops_before_the_last_block() -> None:
    backbone = build()
    ran: list[int] = []
    for index, block in enumerate(backbone.vit.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    Teacher(backbone)(*sample(backbone))
    assert ran == [0, 1]


def test_targets_are_divided_by_the_scale() -> None:
    backbone = build()
    teacher = Teacher(backbone)
    images, keep = sample(backbone)
    plain = teacher(images, keep)
    teacher.scale.fill_(4.0)
    assert torch.equal(teacher(images, keep), plain / 4)


def test_cls_is_the_pooled_output_and_needs_one_prefix_token() -> None:
    backbone = build()
    images, keep = sample(backbone)
    targets = Teacher(backbone, "cls")(images, keep)
    views = mask_images(images, keep, backbone.grid, backbone.patch_size)
    assert torch.equal(targets, backbone.tokens(views)[:, 0])
    for name, size in (("vit_so400m_patch14_siglip_384", 28), ("vit_small_patch14_reg4_dinov2", 28)):
        with pytest.raises(UserError, match="exactly one prefix token"):
            Teacher(build(name, size), "cls")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224", 32),
        ("vit_so400m_patch14_siglip_384", 28),  # attention pooling, no class token
        ("vit_small_patch14_reg4_dinov2", 28),
        ("beit_base_patch16_224", 32),  # average pooling
        ("eva02_base_patch16_clip_224", 32),
    ],
)
def test_pooled_is_the_backbones_own_pooled_output(name: str, size: int) -> None:
    backbone = build(name, size)
    images, keep = sample(backbone)
    targets = Teacher(backbone, "pooled")(images, keep)
    views = mask_images(images, keep, backbone.grid, backbone.patch_size)
    with torch.no_grad():
        assert torch.equal(
            targets, backbone.vit(views)
        )  # built without a classifier, so this is the pooled output
    assert targets.shape == (6, 48)


@pytest.mark.parametrize("target", ["cls", "pooled"])
def test_an_aligned_backbone_has_no_pooled_output(target: Any) -> None:
    aligned = prepare_backbone(build())
    with pytest.raises(UserError, match="needs a pooled output"):
        Teacher(aligned, target)
    Teacher(aligned, "last")


def test_without_keep_masks_the_images_are_the_views() -> None:
    backbone = build()
    images, _ = sample(backbone)
    everything = torch.ones(2, 1, backbone.num_patches, dtype=torch.bool)
    teacher = Teacher(backbone)
    assert torch.equal(teacher(images), teacher(images, everything))


def test_the_teacher_stays_in_eval_mode_without_gradients() -> None:
    backbone = build(proj_drop_rate=0.5).train().requires_grad_(True)
    teacher = Teacher(backbone)
    images, keep = sample(backbone)
    first = teacher.train()(images.requires_grad_(), keep)
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not first.requires_grad
    assert torch.equal(first, teacher(images, keep))


def test_bad_targets_are_refused() -> None:
    with pytest.raises(UserError, match="needs two blocks"):
        Teacher(build(depth=1))
    Teacher(build(depth=1), "last")
    with pytest.raises(UserError, match="unknown target"):
        Teacher(build(), "first")  # type: ignore[arg-type]
