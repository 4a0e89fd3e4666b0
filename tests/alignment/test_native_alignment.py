"""Alignment at native resolution: images of several sizes in one batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import TINY_VIT
from foreign_folders import folder_of
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

import localign
from localign.alignment.masks import MaskSampler
from localign.alignment.native import NativeAlignTask, align_task, padded_masks
from localign.alignment.task import AlignTask
from localign.backbones.native import native_grid
from localign.cli import main
from localign.data.loader import Batch
from localign.data.transforms import NativeView
from localign.engine import train
from localign.engine.distributed import DistributedContext
from localign.engine.task import BatchPlan, StepResult
from localign.errors import UserError
from localign.options.align import AlignConfig
from localign.options.plan import PlanConfig

SHAPES = [(40, 40), (64, 24), (20, 50), (90, 8), (33, 37), (24, 24), (16, 80), (31, 64)]
"""Widths and heights."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for number, shape in enumerate(SHAPES * 2):
        small = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        small.resize(shape, Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
    return folder


def config_of(photos: Path, out: Path, **options: Any) -> AlignConfig:
    values: dict[str, Any] = {
        "backbone": "vit_tiny_patch16_224", "weights": "none", "model_kwargs": TINY_VIT, "data": str(photos),
        "val": str(photos), "out": str(out), "steps": 6, "batch_size": 8, "micro_batch": 4, "lr": 1e-3,
        "scale_images": 16, "workers": 0, "log_every": 1, "checkpoint_every": 2, "device": "cpu",
        "decoder_layer_scale": 0.1, "warmup_steps": 2, "max_patches": 12,
    }  # fmt: skip
    return AlignConfig(**{**values, **options})


def batches(task: AlignTask, micro: int, start: int = 0) -> list[Batch]:
    plan = BatchPlan(task.seed, 8, micro, 0, 1, 0, start, start + 1, False)
    return list(task.batches(plan))


@pytest.mark.parametrize("most", [4, 12, 256, 1000])
def test_grids_are_those_of_siglip_2(most: int) -> None:
    draw = np.random.default_rng(1)
    shapes = [
        (224, 224),
        (480, 640),
        (640, 480),
        (3000, 2000),
        *draw.integers(16, 1500, (60, 2)).tolist(),
    ]
    for height, width in shapes:
        if max(height / width, width / height) > most / 2:
            continue
        theirs = get_image_size_for_max_num_patches(height, width, 16, most, eps=1e-7)
        assert native_grid(height, width, (16, 16), most) == (theirs[0] // 16, theirs[1] // 16)


def test_grids_stay_within_the_budget_whatever_the_shape() -> None:
    for height, width in [(1, 10_000), (10_000, 1), (7, 7), (1, 1), (5, 80)]:
        rows, columns = native_grid(height, width, (14, 16), 12)
        assert 1 <= rows * columns <= 12
    assert NativeView((8, 8), 12)(Image.new("RGB", (64, 16))).shape == (3, 16, 48)


def test_batches_hold_whole_images_in_row_order(photos: Path, tmp_path: Path) -> None:
    task = align_task(config_of(photos, tmp_path, hflip=0.0))
    (batch,) = batches(task, 8)
    assert len(set(map(tuple, batch.grids))) > 3
    view = NativeView(task.teacher.backbone.patch_size, 12)
    side = task.teacher.backbone.patch_size[0]
    for patches, (rows, columns), index in zip(
        batch.images, batch.grids, batch.indices.tolist(), strict=True
    ):
        picture = view(task.data.source.load(index))
        assert picture.shape == (3, rows * side, columns * side)
        for row in range(rows):
            for column in range(columns):
                piece = picture[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
                assert torch.equal(patches[row * columns + column], piece.flatten())
        assert not patches[rows * columns :].any()


def sums_of(task: AlignTask, micro: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss's sum and weight, and gradients, of one step."""
    student = task.student
    with torch.no_grad():  # the heads start at zero
        generator = torch.Generator().manual_seed(1)
        for parameter in student.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    student.zero_grad()
    results = [task.step(student, batch) for batch in batches(task, micro)]
    for result in results:
        result.loss_sum.backward()
    gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    total, weight = (
        torch.stack([getattr(r, n).detach() for r in results]).sum() for n in ("loss_sum", "weight")
    )
    return total, weight, gradients


@pytest.mark.parametrize(
    "options",
    [
        {}, {"loss_tokens": "hidden"}, {"loss_tokens": "visible", "mask": "bernoulli"}, {"soft_cap": None},
        {"backbone": "vit_base_patch16_siglip_224", "loss": "cosine", "target": "last"},
    ],
)  # fmt: skip
def test_the_loss_of_a_batch_is_that_of_its_images_alone(
    options: dict[str, Any], photos: Path, tmp_path: Path
) -> None:
    task = align_task(config_of(photos, tmp_path, **options))
    together, alone = sums_of(task, 8), sums_of(task, 1)
    assert together[1] == alone[1]
    if not options:
        prefix = task.student.num_prefix_tokens
        tokens = sum(rows * columns + prefix for rows, columns in batches(task, 8)[0].grids)
        assert together[1] == 3 * tokens
    torch.testing.assert_close(together[0], alone[0], rtol=1e-5, atol=1e-5)
    for first, second in zip(together[2], alone[2], strict=True):
        torch.testing.assert_close(
            first, second, rtol=2e-3, atol=2e-3 * float(second.abs().max().clamp(min=1))
        )


def test_padding_has_no_part_in_the_loss(photos: Path, tmp_path: Path) -> None:
    task = align_task(config_of(photos, tmp_path))
    (batch,) = batches(task, 8)
    images = batch.images.clone()
    for patches, (rows, columns) in zip(images, batch.grids, strict=True):
        patches[rows * columns :] = 255
    assert not torch.equal(images, batch.images)
    first, second = (task.step(task.student, b).loss_sum for b in (batch, batch._replace(images=images)))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["uniform", "bernoulli", "shapley"])
def test_masks_never_select_padding_and_depend_on_their_image_alone(kind: Any) -> None:
    sampler = MaskSampler(kind)
    grids = ((2, 3), (4, 4), (2, 3), (1, 7))
    positions = torch.tensor([5, 6, 7, 8])
    masks = padded_masks(sampler, 3, positions, grids, 16)
    for number, (rows, columns) in enumerate(grids):
        count = rows * columns
        assert not masks[number, :, count:].any()
        alone = sampler(3, positions[number : number + 1], (rows, columns))[0]
        assert torch.equal(masks[number, :, :count], alone)
        assert torch.equal(masks[number, 1, :count], ~masks[number, 0, :count])


def test_square_images_of_the_backbones_grid_have_the_loss_of_the_fixed_grid(tmp_path: Path) -> None:
    config = config_of(Path("scenes"), tmp_path, val=None, model_kwargs={**TINY_VIT, "img_size": 48, "patch_size": 12},
                       max_patches=16)  # fmt: skip
    native, fixed = align_task(config), align_task(replace(config, max_patches=None))
    assert isinstance(native, NativeAlignTask)
    assert not isinstance(fixed, NativeAlignTask)
    (first, second) = (sums_of(task, 8) for task in (native, fixed))
    assert first[1] == second[1]
    torch.testing.assert_close(first[0], second[0], rtol=1e-5, atol=1e-5)


class _Stopping(NativeAlignTask):
    """A run that is interrupted before its fifth step."""

    class Stopped(Exception):
        pass

    def step(self, model: nn.Module, batch: Batch) -> StepResult:
        if int(batch.positions[0]) >= 4 * 8:
            raise self.Stopped
        return super().step(model, batch)


def test_a_resumed_run_equals_an_uninterrupted_one(photos: Path, tmp_path: Path) -> None:
    whole = config_of(photos, tmp_path / "whole")
    expected = train(align_task(whole), whole, "align").results
    cut = config_of(photos, tmp_path / "cut")
    with pytest.raises(_Stopping.Stopped):
        train(_Stopping(cut), cut, "align")
    cut = replace(cut, resume="must")
    results = train(align_task(cut), cut, "align").results
    for name in ("final", "target_scale", "samples_digest"):
        assert results[name] == expected[name]
    first, second = (
        load_file(tmp_path / n / "checkpoints/step-0000006/model.safetensors") for n in ("whole", "cut")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_loss_falls(photos: Path, tmp_path: Path) -> None:
    config = config_of(photos, tmp_path, steps=30, checkpoint_every=100)
    task = align_task(config)
    final = train(task, config, "align").results["final"]["val_loss"]
    fresh = align_task(config)
    fresh.load_state_dict(task.state_dict())
    context = DistributedContext(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    with torch.no_grad():
        first = fresh.validate(fresh.module.eval(), context)["val_loss"]
    assert final < 0.97 * first


@torch.no_grad()
def test_validation_does_not_depend_on_the_micro_batch(photos: Path, tmp_path: Path) -> None:
    context = DistributedContext(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    losses = []
    for micro in (1, 8):
        task = align_task(config_of(photos, tmp_path, micro_batch=micro))
        losses.append(task.validate(task.module.eval(), context)["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_worst_case_is_as_large_as_the_budget(photos: Path, tmp_path: Path) -> None:
    task = align_task(config_of(photos, tmp_path))
    worst = task.worst_case_batch(4)
    assert worst.images.shape[1] == 12
    assert all(batch.images.shape[1] <= 12 for batch in batches(task, 4))
    assert torch.isfinite(task.step(task.student, worst).loss_sum)


@pytest.mark.slow
def test_the_command_aligns_siglip_2_and_its_export_is_a_backbone(photos: Path, tmp_path: Path) -> None:
    folder, run, out = (str(tmp_path / name) for name in ("in", "run", "out"))
    folder_of("siglip2", tmp_path / "in")
    common = ["--steps", "2", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--scale-images", "8"]
    command = [
        "align",
        "--backbone",
        folder,
        "--data",
        str(photos),
        "--max-patches",
        "20",
        "--soft-cap",
        "none",
    ]
    assert main([*command, "--micro-batch", "auto", "--out", run, *common]) == 0
    assert (tmp_path / "run" / "report.html").is_file()
    assert localign.load(run, decoder=True).encoder.backbone.grid == (4, 4)
    assert localign.load(run).position_interpolation == "bilinear"
    assert main(["export", run, "--format", "siglip2", "--out", out]) == 0
    assert '"patches_per_second"' in (tmp_path / "run" / "log.jsonl").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_patches": 3}, "--max-patches must be at least 4"),
        (
            {"objective": "averaging", "decoder_layer_scale": 1e-6},
            "--max-patches needs --objective maskembed",
        ),
        ({"target": "cls"}, "--target penultimate or last"),
        ({"mask": "block", "block_min_patches": 2}, "too narrow for blocks"),
        ({"crop": "rrc"}, "--crop"),
        ({"mixup": 0.2, "compile": True}, "--mixup, --compile does not apply"),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    options: dict[str, Any], said: str, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        config_of(photos, tmp_path, **options)


def test_backbones_and_plans_that_do_not_fit_are_one_line(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="need a ViT with a position embedding; beit_base"):
        align_task(config_of(photos, tmp_path, backbone="beit_base_patch16_224", soft_cap=None))
    with pytest.raises(UserError, match="plans count images of one size"):
        PlanConfig(max_patches=16)
