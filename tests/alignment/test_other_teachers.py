"""A teacher that is not the start: another model, a run, a weight file, other statistics of pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from localign.alignment import AlignConfig, AlignTask
from localign.alignment.setup import build_teacher, student_of_run
from localign.alignment.teacher import Teacher, mask_images
from localign.backbones import Backbone, create_backbone, save_backbone
from localign.engine import train
from localign.errors import UserError

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
RUN: dict[str, Any] = {
    "data": "scenes:pretrain", "target": "last", "batch_size": 4, "steps": 2, "workers": 0, "scale_images": 4,
    "device": "cpu", "checkpoint_every": 1,
}  # fmt: skip


def backbone_of(name: str = "vit_tiny_patch16_224", seed: int = 0, size: int = 48, **kwargs: Any) -> Backbone:
    return create_backbone(name, weights="none", image_size=size, model_kwargs={**SMALL, **kwargs}, seed=seed)


def folder_of(backbone: Backbone, path: Path) -> str:
    save_backbone(backbone, path)
    return str(path)


def test_statistics_of_pixels_are_converted(tmp_path: Path) -> None:
    """A patch is hidden where it has the teacher's mean colour; the pixels are those the student sees."""
    start, teacher_model = backbone_of(), backbone_of(seed=1)
    teacher_model.mean, teacher_model.std = (0.2, 0.3, 0.4), (0.3, 0.2, 0.1)
    config = AlignConfig(teacher=folder_of(teacher_model, tmp_path / "teacher"), target="last")
    teacher = build_teacher(config, start)
    pixels = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    keep = torch.rand(2, 3, 9) < 0.5
    seen = mask_images(teacher_model.normalise(pixels), keep, (3, 3), (16, 16))
    expected = teacher_model.eval().tokens(seen)
    assert torch.allclose(teacher(start.normalise(pixels), keep), expected, atol=1e-5)
    same = build_teacher(AlignConfig(teacher=folder_of(backbone_of(seed=1), tmp_path / "same")), start)
    assert same.statistics is None  # equal statistics change no bit


def test_native_resolution_does_not_convert_statistics(tmp_path: Path) -> None:
    other = backbone_of(seed=1)
    other.mean = (0.2, 0.3, 0.4)
    given = folder_of(other, tmp_path / "teacher")
    with pytest.raises(UserError, match=r"normalises pixels differently .* --max-patches does not convert"):
        build_teacher(AlignConfig(teacher=given, max_patches=9), backbone_of())
    assert build_teacher(AlignConfig(teacher=given), backbone_of()).statistics is not None


def test_the_start_is_the_teacher_unless_another_is_given() -> None:
    start = backbone_of()
    assert build_teacher(AlignConfig(), start).backbone is start


def test_an_encoder_from_scratch_learns_from_a_trained_teacher(tmp_path: Path) -> None:
    trained = backbone_of(seed=1)
    start: dict[str, Any] = {
        "backbone": "vit_tiny_patch16_224",
        "model_kwargs": SMALL,
        "image_size": 48,
        "weights": "none",
    }
    config = AlignConfig(teacher=folder_of(trained, tmp_path / "trained"), **start, **RUN)
    task = AlignTask(config)
    taught = task.teacher.backbone.parameters()
    assert all(torch.equal(a, b) for a, b in zip(taught, trained.parameters(), strict=True))
    mine = dict(task.student.encoder.backbone.named_parameters())
    assert not torch.equal(mine["vit.blocks.0.mlp.fc1.weight"], trained.vit.blocks[0].mlp.fc1.weight)
    facts = task.fingerprint()
    assert facts["teacher"] != facts["starting weights"]
    assert "teacher" not in AlignTask(AlignConfig(**start, **RUN)).fingerprint()


def test_a_run_teaches_the_next_round(tmp_path: Path) -> None:
    first = AlignConfig(out=str(tmp_path / "first"), **RUN)
    train(AlignTask(first), first, "align")
    second = AlignConfig(out=str(tmp_path / "second"), teacher=first.out, backbone=first.out, **RUN)
    task = AlignTask(second)
    aligned, _ = student_of_run(first.out)
    images = torch.randn(2, 3, *aligned.encoder.backbone.image_size)
    with torch.no_grad():
        expected = aligned.encoder.backbone.tokens(images)
        assert torch.allclose(task.teacher(images), expected, atol=1e-5)
    train(task, second, "align")
    again = AlignConfig(**{**vars(second), "resume": "must"})
    train(AlignTask(again), again, "align")
    assert student_of_run(second.out)[1]["steps"] == 2


def test_a_weight_file_of_the_same_architecture_teaches(tmp_path: Path) -> None:
    tuned = backbone_of(seed=1)
    save_file(tuned.vit.state_dict(), tmp_path / "tuned.safetensors")
    start: dict[str, Any] = {
        "backbone": "vit_tiny_patch16_224",
        "model_kwargs": SMALL,
        "image_size": 48,
        "weights": "none",
    }
    teacher = build_teacher(
        AlignConfig(teacher=str(tmp_path / "tuned.safetensors"), **start, **RUN), backbone_of()
    )
    taught = teacher.backbone.vit.state_dict()
    assert all(torch.equal(v, taught[k]) for k, v in tuned.vit.state_dict().items())


def test_a_teacher_may_be_wider(tmp_path: Path) -> None:
    wide = folder_of(backbone_of(embed_dim=96), tmp_path / "wide")
    narrow = folder_of(backbone_of(), tmp_path / "narrow")
    config = AlignConfig(out=str(tmp_path / "run"), backbone=narrow, teacher=wide, image_size=96, **RUN)
    train(AlignTask(config), config, "align")
    student, _ = student_of_run(config.out)
    assert student.decoder is not None
    assert student.decoder.config.output_width == 96
    assert student.encoder.backbone.width == 48


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"name": "vit_tiny_patch16_224", "class_token": False, "global_pool": "avg"}, "0 prefix tokens"),
        ({"name": "vit_base_patch32_224"}, "patches of 32x32 pixels"),
    ],
)
def test_a_teacher_of_other_tokens_is_refused(other: dict[str, Any], reason: str, tmp_path: Path) -> None:
    given = folder_of(backbone_of(size=64, **other), tmp_path / "other")
    with pytest.raises(UserError, match=f"does not fit: .*{reason}"):
        build_teacher(AlignConfig(teacher=given), backbone_of(size=64))


def test_a_wider_teachers_pooled_output_cannot_be_preserved(tmp_path: Path) -> None:
    wide = folder_of(backbone_of(embed_dim=96), tmp_path / "wide")
    config = AlignConfig(teacher=wide, objective="maskembed+")
    with pytest.raises(UserError, match="--preserve-weight needs a teacher of the student's width"):
        build_teacher(config, backbone_of())
    config = AlignConfig(teacher=wide, objective="maskembed+", preserve_weight=0.0)
    assert isinstance(build_teacher(config, backbone_of()), Teacher)
