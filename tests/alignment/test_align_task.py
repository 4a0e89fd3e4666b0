"""The alignment task: target scale, loss of a step, validation, and errors at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from students import decoder_of

from localign.alignment import AlignConfig, AlignTask
from localign.backbones import Backbone, create_backbone, load_backbone
from localign.data.loader import Batch
from localign.engine.distributed import DistributedContext
from localign.engine.task import BatchPlan
from localign.errors import UserError

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for index in range(12):
        pixels = draw.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 48), Image.Resampling.BICUBIC).save(path / f"{index:02d}.png")
    return path


def backbone_of(size: int = 32, **kwargs: Any) -> Backbone:
    return create_backbone(
        "vit_tiny_patch16_224", weights="none", image_size=size, model_kwargs={**SMALL, **kwargs}
    )


def task_of(folder: Path, backbone: Backbone | None = None, **options: Any) -> AlignTask:
    defaults: dict[str, Any] = {"data": str(folder), "device": "cpu", "scale_images": 20, "workers": 0}
    return AlignTask(AlignConfig(**{**defaults, **options}), backbone or backbone_of())


def plan(batch: int = 8, micro: int = 8, steps: int = 1) -> BatchPlan:
    return BatchPlan(0, batch, micro, 0, 1, 0, 0, steps, False)


def alone() -> DistributedContext:
    return DistributedContext(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def test_the_scale_is_the_spread_of_training_targets_under_the_training_masks(folder: Path) -> None:
    task = task_of(folder)
    task.on_train_start(alone(), plan())
    fresh = task_of(folder)
    batches = fresh.batches(plan(batch=4, micro=4, steps=5))
    targets = [fresh.teacher(*fresh.views(batch)) for batch in batches]
    assert sum(len(t) for t in targets) == 20 * 3
    assert float(task.teacher.scale) == pytest.approx(float(torch.cat(targets).std(correction=0)), rel=1e-5)
    assert 0.01 < float(task.teacher.scale) < 100


def test_the_scale_does_not_depend_on_the_plan_or_an_earlier_estimate(folder: Path) -> None:
    scales = []
    for batch, micro in ((8, 8), (8, 2), (4, 1)):
        task = task_of(folder)
        task.on_train_start(alone(), plan(batch, micro))
        scales.append(float(task.teacher.scale))
    task.on_train_start(alone(), plan())
    assert scales == [float(task.teacher.scale)] * 3
    other = task_of(folder, mask="bernoulli", keep_ratio=0.25)
    other.on_train_start(alone(), plan())
    assert float(other.teacher.scale) != scales[0]


def test_the_state_keeps_the_exact_scale_and_cosine_needs_no_scale(folder: Path) -> None:
    task = task_of(folder)
    task.on_train_start(alone(), plan())
    again = task_of(folder)
    again.load_state_dict(task.state_dict())
    assert torch.equal(again.teacher.scale, task.teacher.scale)
    cosine = task_of(folder, loss="cosine")
    cosine.on_train_start(alone(), plan())
    assert float(cosine.teacher.scale) == 1


def test_mixing_works_with_any_number_of_scale_images(folder: Path) -> None:
    task = task_of(folder, scale_images=5, mixup=0.5)
    task.on_train_start(alone(), plan())
    assert float(task.teacher.scale) > 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "cosine"},
        {"loss": "l1", "loss_tokens": "hidden"},
        {"target": "cls"},
        {"loss_tokens": "visible"},
    ],
)
@torch.no_grad()
def test_a_step_gives_the_same_loss_for_any_micro_batch(folder: Path, options: dict[str, Any]) -> None:
    task = task_of(folder, **options)
    torch.nn.init.normal_(task.student.encoder.head.weight, std=0.2)
    sums = []
    for micro in (8, 2, 1):
        parts = [task.step(task.module, batch) for batch in task.batches(plan(8, micro))]
        sums.append(torch.stack([torch.stack([p.loss_sum, p.weight]) for p in parts]).sum(0))
    for other in sums[1:]:
        assert torch.allclose(sums[0], other, rtol=1e-4)
    tokens = 1 if options.get("target") == "cls" else 5
    views = {"hidden": 8 * (3 + 4), "visible": 8 * (4 + 4)}.get(
        options.get("loss_tokens", ""), 8 * 3 * tokens
    )
    assert sums[0][1] == views  # a mask and its complement share the four patches; the third view shows all


def test_training_and_validation_use_the_same_loss(folder: Path) -> None:
    """On the same pixels and masks, both give exactly the same loss."""
    task = task_of(folder, val=str(folder), loss_tokens="hidden")
    torch.nn.init.normal_(task.student.encoder.head.weight, std=0.2)
    task.seed = 7
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(images, torch.arange(4), torch.arange(4), ())
    step = task.step(task.module, batch)
    total, count = task._loss(task.module, *task.views(batch, purpose_seed=7))
    assert torch.equal(step.loss_sum, total)
    assert torch.equal(step.weight, count)


@torch.no_grad()
def test_validation_is_the_same_every_time_and_for_any_micro_batch(folder: Path) -> None:
    losses = []
    for micro in (4, 4, 1):
        task = task_of(folder, val=str(folder), micro_batch=micro)
        losses.append(task.validate(task.module.eval(), alone())["val_loss"])
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert task_of(folder).validate(task.module, alone()) == {}


def test_the_student_is_a_function_of_the_seed(folder: Path) -> None:
    backbone = backbone_of()
    torch.manual_seed(1)
    first = decoder_of(task_of(folder, backbone).module).pos_embed
    torch.manual_seed(2)
    assert torch.equal(decoder_of(task_of(folder, backbone).module).pos_embed, first)
    assert not torch.equal(decoder_of(task_of(folder, backbone, seed=1).module).pos_embed, first)


def test_only_the_student_is_trained_and_saved(folder: Path) -> None:
    task = task_of(folder)
    task.step(task.module, next(iter(task.batches(plan())))).loss_sum.backward()
    assert not any("teacher" in k for k in task.module.state_dict())
    assert all(p.grad is None for p in task.teacher.parameters())
    second = AlignTask(
        task.config, task.teacher.backbone
    )  # the teacher's frozen backbone can start another run
    assert all(p.requires_grad for p in second.module.parameters())


def test_the_soft_cap_follows_the_backbone_family_by_default(folder: Path) -> None:
    assert task_of(folder).module.encoder.backbone.soft_cap == 30.0
    assert task_of(folder).teacher.backbone.soft_cap is None
    assert task_of(folder, soft_cap="none").module.encoder.backbone.soft_cap is None
    assert task_of(folder, soft_cap=5.0).module.encoder.backbone.soft_cap == 5.0
    beit = create_backbone("beit_base_patch16_224", weights="none", image_size=32, model_kwargs=SMALL)
    assert task_of(folder, beit).module.encoder.backbone.soft_cap is None
    with pytest.raises(UserError, match="--soft-cap none"):
        task_of(folder, beit, soft_cap=30.0)
    capped = backbone_of().copy(soft_cap=20.0)
    assert task_of(folder, capped).module.encoder.backbone.soft_cap == 20.0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mask": "block"}, "do not fit"),
        ({"train_blocks": 3}, "--train-blocks 3"),
        ({"train_blocks": -1}, "--train-blocks -1"),
        ({"reinit_blocks": 3}, "--reinit-blocks 3"),
        ({"decoder_width": 50}, "not a multiple of"),
        ({"decoder_mlp": "gated"}, "not SwiGLU"),
        ({"soft_cap": -1.0}, "above 0"),
        ({"data": "/no/such/folder"}, "no folder"),
        ({"device": "gpu"}, "gpu"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_training(
    folder: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        task_of(folder, **options)


def test_the_export_of_a_task_is_its_students_backbone(folder: Path, tmp_path: Path) -> None:
    task = task_of(folder)
    task.export(task.module, tmp_path, {"run": "r"})
    loaded = load_backbone(tmp_path)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.tokens(images), task.module.eval().encoder.backbone.tokens(images))
