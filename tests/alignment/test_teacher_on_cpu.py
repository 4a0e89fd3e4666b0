"""How a teacher computes on a CPU: in pieces, with unfused attention, and with the same results."""

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
    teacher.prepare(torch.device("cpu"))
    assert [type(module) for module in teacher.backbone.modules()] == kinds
    assert [id(parameter) for parameter in teacher.parameters()] == weights
    assert torch.allclose(teacher(views), before, atol=1e-5)
