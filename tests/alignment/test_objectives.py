"""Views, targets, predictions and losses of each objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localign.alignment import AlignConfig
from localign.alignment.objectives import Objective
from localign.alignment.objectives.base import visible_mean, visible_sum
from localign.alignment.objectives.clipself import (
    CLIPSelf,
    crop_windows,
    draw_windows,
    sampled_windows,
    smallest_side,
    window_masks,
)
from localign.alignment.setup import build_objective, fresh_student
from localign.alignment.student import Student
from localign.alignment.teacher import Teacher, mask_images
from localign.backbones import Backbone, create_backbone

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "maskembed": {},
    "averaging": {"mask": "bernoulli"},
    "averaging-one-mask": {"objective": "averaging", "complement": False, "all_visible": False},
    "additive": {},
    "additive-shapley": {"objective": "additive", "mask": "shapley"},
    "clipself": {},
    "clipself-transformer": {"objective": "clipself", "decoder": "transformer"},
    "mim": {},
}


def config_of(variant: str, **options: Any) -> AlignConfig:
    return AlignConfig(**{"objective": variant, **VARIANTS[variant], **options})


def backbone_of(name: str = "vit_tiny_patch16_224", size: Any = 64) -> Backbone:
    return create_backbone(name, weights="none", image_size=size, model_kwargs=SMALL)


def parts(config: AlignConfig, backbone: Backbone) -> tuple[Objective, Student]:
    """An objective, and a student whose head is no longer zero."""
    assert config.target is not None
    student = fresh_student(config, backbone)
    draw = torch.Generator().manual_seed(0)
    nn.init.normal_(student.encoder.head.weight, std=0.3, generator=draw)
    return build_objective(config, Teacher(backbone, config.target)), student


def images_of(backbone: Backbone, count: int = 4) -> Tensor:
    return torch.randn(count, 3, *backbone.image_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_takes_prediction_and_target(variant: str) -> None:
    backbone = backbone_of()
    objective, student = parts(config_of(variant), backbone)
    images, views = images_of(backbone), objective.draw(0, torch.arange(4))
    target = objective.target(images, views)
    prediction = objective.predict(student, images, views)
    assert not target.requires_grad
    loss, weight = objective.loss(prediction, target, views)
    loss.backward()
    masks = {"averaging-one-mask": 1, "clipself": 1, "clipself-transformer": 1, "additive-shapley": 2}
    per_view = 17 if target.ndim == 3 else 1
    assert weight == 4 * masks.get(variant, 3) * per_view
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert any(p.grad.abs().max() > 0 for p in student.encoder.backbone.parameters() if p.grad is not None)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_views_and_losses_depend_on_positions_not_on_batches(variant: str) -> None:
    backbone = backbone_of()
    objective, student = parts(config_of(variant), backbone)
    images, positions = images_of(backbone), torch.tensor([9, 40, 2, 7])
    views = objective.draw(5, positions)

    def loss(which: slice) -> Tensor:
        some = objective.draw(5, positions[which])
        assert torch.equal(some, views[which])
        target = objective.target(images[which], some)
        return torch.stack(objective.loss(objective.predict(student, images[which], some), target, some))

    split = loss(slice(0, 1)) + loss(slice(1, 4))
    assert torch.allclose(loss(slice(None)), split, rtol=1e-4)
    assert not torch.equal(objective.draw(6, positions), views)


@pytest.mark.parametrize("objective", ["averaging", "additive", "clipself"])
@pytest.mark.parametrize(
    "name", ["vit_so400m_patch14_siglip_384", "vit_small_patch14_reg4_dinov2", "beit_base_patch16_224"]
)
@torch.no_grad()
def test_any_pooling_can_be_the_target(objective: Any, name: str) -> None:
    backbone = backbone_of(name, 64 if "16" in name.split("_")[2] else 60)  # 60: four spare pixels
    config = AlignConfig(objective=objective, target="pooled", soft_cap="none")
    asked, student = parts(config, backbone)
    images, views = images_of(backbone), asked.draw(0, torch.arange(4))
    target, prediction = asked.target(images, views), asked.predict(student, images, views)
    loss, weight = asked.loss(prediction, target, views)
    assert target.shape[-1] == prediction.shape[-1] == 48
    assert float(loss / weight) > 0


# -- sums and means over visible patches -----------------------------------------------------------------


def test_sums_and_means_over_what_is_visible() -> None:
    embeddings = torch.arange(12.0).view(2, 3, 2)
    keep = torch.tensor([[[1, 0, 1], [0, 0, 0]], [[0, 1, 0], [1, 1, 1]]]).bool()
    assert visible_sum(embeddings, keep).tolist() == [[4, 6], [0, 0], [8, 9], [24, 27]]
    assert visible_mean(embeddings, keep).tolist() == [[2, 3], [0, 0], [8, 9], [8, 9]]


def test_sums_over_many_patches_stay_exact_under_autocast() -> None:
    embeddings = torch.ones(1, 729, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = visible_sum(embeddings, torch.ones(1, 1, 729, dtype=torch.bool))
    assert total.dtype == torch.float32
    assert total.unique().tolist() == [729]


@pytest.mark.parametrize("loss", ["mse", "cosine", "l1"])
def test_a_view_without_visible_patches_has_no_average_and_does_not_count(loss: Any) -> None:
    backbone = backbone_of()
    objective, student = parts(config_of("averaging", loss=loss), backbone)
    images = images_of(backbone, 1)
    views = torch.ones(1, 2, 16, dtype=torch.bool)
    views[0, 1] = False
    target = objective.target(images, views)
    both, count = objective.loss(objective.predict(student, images, views), target, views)
    first = views[:, :1]
    alone, _ = objective.loss(objective.predict(student, images, first), target[:1], first)
    assert count == 1
    assert both.item() == pytest.approx(alone.item())
    both.backward()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


@torch.no_grad()
def test_averaging_is_the_mean_of_the_visible_embeddings() -> None:
    backbone = backbone_of()
    objective, student = parts(config_of("averaging"), backbone)
    images, views = images_of(backbone, 2), objective.draw(0, torch.arange(2))
    prediction = objective.predict(student, images, views).view(2, 3, 48)
    embeddings = student.encoder(images)[:, 1:]
    for image in range(2):
        for mask in range(3):
            expected = embeddings[image][views[image, mask]].mean(0)
            assert torch.allclose(prediction[image, mask], expected, atol=1e-5)
    target = objective.target(images, views)
    masked = mask_images(images, views, backbone.grid, backbone.patch_size)
    assert torch.equal(target, backbone.pooled(masked))


@torch.no_grad()
def test_additive_sums_grow_with_the_root_of_the_number_of_patches() -> None:
    """The sum of independent unit vectors has unit size, so the first steps do not overshoot on any grid."""
    backbone = backbone_of()
    objective, student = parts(config_of("additive"), backbone)
    images, views = images_of(backbone, 2), objective.draw(0, torch.arange(2))
    vectors = objective.predict(student, images, views)
    assert torch.allclose(vectors, student.encoder(images)[:, 1:] / 4)
    independent = torch.randn(1, 16, 1000, generator=torch.Generator().manual_seed(0)) / 4
    assert visible_sum(independent, torch.ones(1, 1, 16, dtype=torch.bool)).std() == pytest.approx(1, abs=0.1)


# -- crops -----------------------------------------------------------------------------------------------


def test_crops_span_at_least_three_fourteenths_of_a_side() -> None:
    sides = {14: 3, 16: 3, 24: 5, 27: 6, 37: 8, 7: 2, 6: 1, 5: 1, 2: 1, 1: 1}
    assert {side: smallest_side(side) for side in sides} == sides


@pytest.mark.parametrize("grid", [(14, 14), (5, 8), (1, 2)])
def test_windows_lie_inside_and_their_sides_are_uniform(grid: tuple[int, int]) -> None:
    count = 20000
    windows = draw_windows(0, torch.arange(count), grid)
    corner, side = windows[:, :2], windows[:, 2:]
    assert (corner >= 0).all()
    assert (corner + side <= torch.tensor(grid)).all()
    for axis, whole in enumerate(grid):
        least = smallest_side(whole)
        counts = torch.bincount(side[:, axis], minlength=whole + 1)
        choices = whole - least + 1
        assert counts[:least].sum() == 0
        expected = count / choices
        assert ((counts[least:] - expected) ** 2 / expected).sum() < choices - 1 + 5 * (2 * choices) ** 0.5
        smallest = corner[side[:, axis] == least, axis]
        places = torch.bincount(smallest, minlength=choices)
        assert len(places) == choices
        assert (places > 0.7 * len(smallest) / choices).all()


def test_a_window_as_a_mask() -> None:
    windows = torch.tensor([[1, 2, 2, 1], [0, 0, 3, 4]])
    masks = window_masks(windows, (3, 4))
    assert masks.shape == (2, 1, 12)
    assert masks[0, 0].view(3, 4).int().tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]
    assert masks[1].all()


def test_a_crop_is_the_window_enlarged() -> None:
    images = torch.randn(12, 3, 38, 50, generator=torch.Generator().manual_seed(0))
    grid, patch = (4, 6), (9, 8)  # two spare pixels on either side
    windows = draw_windows(3, torch.arange(12), grid)
    crops = crop_windows(images, windows, grid, patch)
    assert crops.shape == images.shape
    for i, (top, left, height, width) in enumerate(windows.tolist()):
        cut = images[i : i + 1, :, top * 9 : (top + height) * 9, left * 8 : (left + width) * 8]
        expected = F.interpolate(cut, size=(36, 48), mode="bilinear", antialias=True)[0]
        torch.testing.assert_close(crops[i, :, :36, :48], expected, atol=1e-5, rtol=1e-5)
    assert crops[..., 36:, :].abs().max() == 0
    assert crops[..., 48:].abs().max() == 0


def test_the_largest_crop_is_the_image() -> None:
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(crop_windows(images, torch.tensor([[0, 0, 2, 2]]), (2, 2), (16, 16)), images)


@torch.no_grad()
def test_clipself_averages_the_students_features_inside_the_window() -> None:
    backbone = backbone_of()
    objective, student = parts(config_of("clipself"), backbone)
    images, views = images_of(backbone), objective.draw(0, torch.arange(4))
    prediction, target = objective.predict(student, images, views), objective.target(images, views)
    features = student.encoder(images)[:, 1:].unflatten(1, (4, 4))
    crops = crop_windows(images, views, (4, 4), (16, 16))
    assert torch.equal(target, backbone.pooled(crops))
    for i, (top, left, height, width) in enumerate(views.tolist()):
        inside = features[i, top : top + height, left : left + width]
        assert torch.allclose(prediction[i], inside.mean((0, 1)), atol=1e-5)
    loss, count = objective.loss(prediction, target, views)
    assert float(loss / count) == pytest.approx(float(1 - F.cosine_similarity(prediction, target).mean()))


@torch.no_grad()
def test_clipself_with_a_decoder_hides_embeddings_outside_the_window() -> None:
    backbone = backbone_of()
    objective, student = parts(config_of("clipself-transformer"), backbone)
    assert isinstance(objective, CLIPSelf)
    images, views = images_of(backbone), objective.draw(0, torch.arange(4))
    expected = student.decode(student.encoder(images), window_masks(views, (4, 4)))[:, 0]
    assert torch.equal(objective.predict(student, images, views), expected)


def test_a_cosine_loss_without_a_decoder_starts_with_a_bounded_gradient() -> None:
    """With a zero head, the first gradient would be unbounded."""
    backbone = backbone_of()
    config = config_of("clipself")
    student = fresh_student(config, backbone)
    objective = build_objective(config, Teacher(backbone, "cls"))
    images, views = images_of(backbone), objective.draw(0, torch.arange(4))
    prediction = objective.predict(student, images, views)
    loss, _ = objective.loss(prediction, objective.target(images, views), views)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None])
    assert 1e-3 < float(norm) < 1e3
    for variant in ("averaging", "additive", "mim", "maskembed"):
        assert fresh_student(config_of(variant), backbone).encoder.head.weight.abs().max() == 0


# -- masked image modelling ------------------------------------------------------------------------------


@torch.no_grad()
def test_in_masked_image_modelling_the_student_is_masked_and_the_teacher_is_not() -> None:
    backbone = backbone_of()
    objective, student = parts(config_of("mim"), backbone)
    images, views = images_of(backbone, 2), objective.draw(0, torch.arange(2))
    masked = mask_images(images, views, backbone.grid, backbone.patch_size)
    assert torch.equal(objective.predict(student, images, views), student.encoder(masked))
    target = objective.target(images, views).unflatten(0, (2, 3))
    whole = backbone.tokens(images, layer=-2)
    assert torch.allclose(target, whole[:, None].expand(2, 3, 17, 48), atol=1e-6)


@torch.no_grad()
def test_the_loss_of_masked_image_modelling_can_go_over_hidden_tokens_alone() -> None:
    backbone = backbone_of()
    objective, student = parts(config_of("mim", loss_tokens="hidden", all_visible=False), backbone)
    images, views = images_of(backbone, 2), objective.draw(0, torch.arange(2))
    target = objective.target(images, views)
    _, count = objective.loss(objective.predict(student, images, views), target, views)
    assert count == 2 * (16 + 2)  # a mask and its complement; the class token in both


@pytest.mark.parametrize("size", [(48, 48), (52, 41)], ids=["whole patches", "pixels beyond the last patch"])
def test_windows_are_sampled_at_once_as_one_by_one(size: tuple[int, int]) -> None:
    """As on GPUs, where reading the windows would make the host wait."""
    grid, patch = (size[0] // 8, size[1] // 8), (8, 8)
    images = torch.randn(64, 3, *size)
    windows = draw_windows(0, torch.arange(64), grid)
    full = grid[0] * 8, grid[1] * 8
    expected = crop_windows(images, windows, grid, patch)[..., : full[0], : full[1]]
    torch.testing.assert_close(sampled_windows(images, windows, full, patch), expected, atol=1e-4, rtol=0)
