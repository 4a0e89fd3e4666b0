"""On a CPU the teacher computes in chunks with another attention, with the same results."""

from __future__ import annotations

import pytest
import torch

from localign.alignment import teacher as teachers
from localign.alignment.teacher import Teacher
from localign.backbones import Backbone, create_backbone


def build() -> Backbone:
    size = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    return create_backbone("vit_tiny_patch16_224", weights="none", image_size=48, model_kwargs=size)


@torch.no_grad()
def test_chunks_of_views_give_the_same_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Teacher(build())
    views = torch.randn(7, 3, 48, 48)
    expected = teacher.of_views(views)
    monkeypatch.setattr(teachers, "_CPU_VIEWS", 3)
    assert torch.allclose(teacher.of_views(views), expected, atol=1e-5)


def test_a_teacher_on_a_cpu_does_not_change_its_backbone() -> None:
    teacher = Teacher(build())
    kinds = [type(module) for module in teacher.backbone.modules()]
    weights = [id(parameter) for parameter in teacher.parameters()]
    views = torch.randn(2, 3, 48, 48)
    before = teacher(views)
    teacher.prepare(torch.device("cpu"))
    assert [type(module) for module in teacher.backbone.modules()] == kinds
    assert [id(parameter) for parameter in teacher.parameters()] == weights
    assert torch.allclose(teacher(views), before, atol=1e-5)
