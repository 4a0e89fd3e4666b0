"""``maskembed+``: its terms, what they leave unchanged, and that they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localign.alignment import AlignConfig, AlignTask, load_student
from localign.alignment.objectives import Objective
from localign.alignment.plus import PlusPrediction, PlusStudent
from localign.alignment.setup import build_objective, build_teacher, fresh_student, student_of_run
from localign.alignment.student import Student
from localign.backbones import Backbone, create_backbone
from localign.cli import main
from localign.engine import train
from localign.errors import UserError
from localign.options.names import ObjectiveName

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
NONE: dict[str, Any] = {"readout_weight": 0.0, "pooled_weight": 0.0, "preserve_weight": 0.0}


def backbone_of(name: str = "vit_tiny_patch16_224") -> Backbone:
    return create_backbone(name, weights="none", image_size=64, model_kwargs=SMALL)


def parts(
    backbone: Backbone, objective: ObjectiveName = "maskembed+", **options: Any
) -> tuple[Objective, Student]:
    """An objective, and a student none of whose layers is zero."""
    config = AlignConfig(objective=objective, **options)
    student = fresh_student(config, backbone)
    draw = torch.Generator().manual_seed(0)
    nn.init.normal_(student.encoder.head.weight, std=0.3, generator=draw)
    if isinstance(student, PlusStudent):
        for layer in (student.readout, student.pooled_head):
            nn.init.normal_(layer.weight, std=0.1, generator=draw)
    return build_objective(config, build_teacher(config, backbone)), student


def images_of(backbone: Backbone, count: int = 4) -> Tensor:
    return torch.randn(count, 3, *backbone.image_size, generator=torch.Generator().manual_seed(1))


def loss_and_gradients(
    objective: Objective, student: Student, images: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    views = objective.draw(0, torch.arange(len(images)))
    target = objective.target(images, views)
    total, count = objective.loss(objective.predict(student, images, views), target, views)
    (total / count).backward()
    return (total / count).detach(), {k: p.grad for k, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("target", ["penultimate", "last"])
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "beit_base_patch16_224"]
)
def test_without_weights_it_is_maskembed(name: str, target: str) -> None:
    """The same loss and gradients, whatever the pooling: class token, attention, average."""
    backbone = backbone_of(name)
    images = images_of(backbone)
    plain = loss_and_gradients(*parts(backbone, "maskembed", target=target), images)
    plus = loss_and_gradients(*parts(backbone, target=target, **NONE), images)
    assert torch.equal(plain[0], plus[0])
    assert plain[1].keys() == plus[1].keys()  # the layers of terms left out get no gradient
    for key, gradient in plain[1].items():
        assert torch.allclose(gradient, plus[1][key], atol=1e-7), key


@pytest.mark.parametrize("readout", ["sum", "mean"])
def test_each_term_is_what_it_says(readout: str) -> None:
    backbone = backbone_of()
    objective, student = parts(backbone, readout=readout)
    objective.teacher.scale.fill_(0.7)
    objective.teacher.pooled_scale.fill_(1.3)
    images = images_of(backbone, 3)
    views = objective.draw(0, torch.arange(3))
    target = objective.target(images, views)
    prediction: PlusPrediction = objective.predict(student, images, views)
    unit = 0.7 * 1.3
    from localign.alignment.teacher import mask_images

    seen = mask_images(images, views, backbone.grid, backbone.patch_size)
    pooled = backbone.pooled(seen) / unit
    assert torch.allclose(target[:, 0] / 1.3, pooled, atol=1e-5)
    vectors = prediction.vectors[:, None].expand(-1, 3, -1, -1)
    errors = []
    for image in range(3):
        for view in range(3):
            shown = vectors[image, view][views[image, view]]
            wanted = pooled.view(3, 3, -1)[image, view]
            if readout == "sum":
                empty = backbone.pooled(torch.zeros_like(images[:1]))[0] / unit
                errors.append((shown.sum(0) / 4 + empty - wanted).square())  # 16 patches
            elif len(shown):
                errors.append((shown.mean(0) - wanted).square())
    readout_loss = torch.stack(errors).mean()
    pooled_loss = F.mse_loss(prediction.pooled, pooled)
    own = backbone.vit.forward_head(backbone.vit.norm(prediction.last), pre_logits=True) / unit
    preserve_loss = F.mse_loss(own, pooled.view(3, 3, -1)[:, -1])
    tokens = F.mse_loss(prediction.tokens, target[:, 1:])
    total, count = objective.loss(prediction, target, views)
    expected = tokens + 0.3 * readout_loss + 0.3 * pooled_loss + 0.1 * preserve_loss
    assert float(total / count) == pytest.approx(float(expected), rel=1e-5)


def test_nothing_is_lost_before_the_first_step() -> None:
    """The student starts as the teacher, so its pooled output is the teacher's."""
    backbone = backbone_of()
    config = AlignConfig(objective="maskembed+", soft_cap="none")
    student, images = fresh_student(config, backbone), images_of(backbone)
    last = student.encoder.backbone.tokens(images, norm=False)
    assert torch.allclose(backbone.pool(last), backbone.pooled(images), atol=1e-5)


def test_one_pass_of_the_teacher_gives_tokens_and_pooled_output() -> None:
    for name in ("vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "eva02_base_patch16_clip_224"):
        backbone = backbone_of(name).eval()
        images = images_of(backbone)
        for layer in (-1, -2):
            tokens, pooled = backbone.tokens_and_pooled(images, layer)
            assert torch.allclose(tokens, backbone.tokens(images, layer), atol=1e-6)
            assert torch.allclose(pooled, backbone.pooled(images), atol=1e-6)


def test_a_run_trains_resumes_and_exports(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "objective": "maskembed+", "data": "scenes:pretrain", "target": "last", "batch_size": 4, "workers": 0,
        "scale_images": 8, "decoder_layer_scale": 0.1, "lr": 1e-3, "checkpoint_every": 2, "device": "cpu",
    }  # fmt: skip
    whole = AlignConfig(out=str(tmp_path / "whole"), steps=4, **options)
    train(AlignTask(whole), whole, "align")
    again = AlignConfig(out=str(tmp_path / "whole"), steps=4, resume="must", **options)
    (tmp_path / "whole" / "results.json").unlink()
    for path in (tmp_path / "whole" / "checkpoints").glob("step-0000004*"):
        path.rename(tmp_path / path.name)
    before = {k: v.clone() for k, v in student_state(tmp_path / "whole" / "export").items()}
    train(AlignTask(again), again, "align")
    assert all(torch.equal(v, before[k]) for k, v in student_state(tmp_path / "whole" / "export").items())
    student, facts = student_of_run(tmp_path / "whole")
    assert isinstance(student, PlusStudent)
    assert facts["pooled_scale"] > 0
    assert not hasattr(load_student(tmp_path / "whole" / "export"), "readout")  # it serves training alone


@pytest.mark.parametrize("form", ["timm", "onnx"])
def test_an_export_that_keeps_the_pooling_replaces_the_start(form: str, tmp_path: Path) -> None:
    run = AlignConfig(
        out=str(tmp_path / "run"), objective="maskembed+", data="scenes:pretrain", target="last", batch_size=4,
        steps=2, workers=0, scale_images=4, lr=1e-2, device="cpu",
    )  # fmt: skip
    train(AlignTask(run), run, "align")
    assert main(["export", run.out, "--keep-pooling", "--format", form, "--out", str(tmp_path / "kept")]) == 0
    if form == "onnx":
        return  # its tokens are compared when it is written
    student, start = student_of_run(run.out)[0], create_backbone("scenes-vit")
    kept = create_backbone(tmp_path / "kept")
    images = images_of(start)
    with torch.no_grad():
        last = student.encoder.backbone.tokens(images, norm=False)
        assert torch.allclose(kept.pooled(images), start.pool(last), atol=1e-5)
        assert torch.allclose(kept.tokens(images, norm=False), last, atol=1e-5)
        assert not torch.allclose(kept.pooled(images), start.pooled(images), atol=1e-3)
    assert kept.soft_cap == student.encoder.backbone.soft_cap


def test_pooling_is_kept_of_runs_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["export", "scenes-vit", "--keep-pooling", "--out", str(tmp_path / "out")]) == 2
    assert "--keep-pooling applies to runs" in capsys.readouterr().err


def student_state(folder: Path) -> dict[str, Tensor]:
    return load_student(folder).state_dict()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"objective": "maskembed", "readout_weight": 1.0}, "needs --objective maskembed+"),
        ({"objective": "maskembed+", "preserve_weight": -1.0}, "--preserve-weight must be 0 or more"),
        ({"objective": "maskembed+", "all_visible": False}, "--preserve-weight needs --all-visible true"),
        ({"objective": "maskembed+", "target": "cls"}, "needs --target penultimate or last"),
        ({"objective": "maskembed+", "max_patches": 64}, "--max-patches needs --objective maskembed"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason.replace("+", r"\+")):
        AlignConfig(**options)


def test_a_backbone_without_pooling_is_refused() -> None:
    backbone = backbone_of()
    backbone.vit.reset_classifier(0, "")
    config = AlignConfig(objective="maskembed+")
    with pytest.raises(UserError, match="no pooling"):
        build_teacher(config, backbone)
