"""Masked views of a few steps: the teacher's tokens of each view, and the decoder's reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localign import rng
from localign.alignment.export import load_student
from localign.alignment.student import Student
from localign.alignment.teacher import Teacher
from localign.backbones import Backbone, find_export
from localign.backbones.export import content_hash, read_config
from localign.engine.progress import ProgressCallback
from localign.explore.features import COLOUR_RANGE, to_rgb
from localign.pictures import fit_components

HIDDEN = (0.0, 0.25, 0.5, 0.75, 0.9)
"""Shares of hidden patches."""
MAX_ERROR = 1.0
"""The largest stored error of a patch, in variances of the target."""
_TARGETS = ("penultimate", "last")


@dataclass(frozen=True)
class MaskedViews:
    """Views in which more and more patches are hidden; k images, s steps, n patches."""

    hidden: list[int]
    """Hidden patches of each step."""
    order: NDArray[np.uint16]
    """``(k, n)``: patch p is hidden in a step that hides more than ``order[p]`` patches."""
    target: NDArray[np.uint8]
    """``(k, s, n, 3)``, the teacher's tokens of the view in three principal components."""
    reconstruction: NDArray[np.uint8]
    """The student's, in the same components and colours."""
    patch_error: NDArray[np.uint8]
    """``(k, s, n)``, squared error over the variance of the targets; 255 stands for :data:`MAX_ERROR` or more."""
    error: NDArray[np.float32]
    """``(k, s)``, its mean."""


def aligned_student(source: str, backbone: Backbone, baseline: Backbone) -> tuple[Student, Teacher] | str:
    """The student and teacher behind an aligned backbone.

    Args:
        source: Name or path of the aligned backbone.
        backbone: The aligned backbone.
        baseline: The model that may be its teacher.

    Returns:
        Both in eval mode; or in words why there are none.
    """
    folder = find_export(source)
    if folder is None:
        return "is no alignment by localign"
    section = read_config(folder)["localign"]
    facts: dict[str, Any] = section["provenance"]
    if section["decoder"] is None:
        return "has no decoder"
    run = facts.get("run")
    target = run.get("target") if isinstance(run, dict) else None
    if target not in _TARGETS:
        return "does not say that its target was patch tokens"
    if facts.get("teacher_sha256") != content_hash(baseline.vit.state_dict()):
        return "has another teacher than the first model"
    student = load_student(folder, image_size=backbone.image_size)
    teacher = Teacher(baseline, target, statistics=(backbone.mean, backbone.std))
    scale = facts.get("target_scale", 1.0)
    teacher.scale.fill_(float(scale) if isinstance(scale, int | float) and scale > 0 else 1.0)
    return student, teacher


@torch.inference_mode()
def masked_views(
    student: Student,
    teacher: Teacher,
    images: Sequence[Tensor],
    *,
    device: torch.device,
    seed: int,
    progress: ProgressCallback,
) -> MaskedViews:
    """Reconstructions of masked views.

    Args:
        student, teacher: As :func:`aligned_student` returns them.
        images: uint8 ``(3, height, width)`` at the teacher's size.
        device: Device to compute on.
        seed: Seed of the order in which patches are hidden.
        progress: Called after each image.
    """
    student, teacher = student.to(device), teacher.to(device)
    n, prefix = teacher.backbone.num_patches, student.num_prefix_tokens
    hidden = sorted({round(share * n) for share in HIDDEN})
    orders, targets, reconstructions = [], [], []
    for index, image in enumerate(images):
        order = rng.generator(seed, "explore masks", index).permutation(n)
        keep = torch.stack([torch.from_numpy(order >= count) for count in hidden])[None].to(device)
        pixels = student.encoder.backbone.normalise(image[None].to(device))
        targets.append(teacher(pixels, keep)[:, prefix:].half().cpu())
        reconstructions.append(student(pixels, keep)[:, prefix:].half().cpu())
        orders.append(order.astype(np.uint16))
        progress("masked views", index + 1, len(images))
    target, predicted = torch.stack(targets).float(), torch.stack(reconstructions).float()
    mean = target.flatten(0, -2).mean(dim=0)
    variance = (target - mean).square().sum(dim=-1).mean().clamp(min=1e-12)
    error = (predicted - target).square().sum(dim=-1) / variance
    components = fit_components(target)
    scores, again = components(target), components(predicted)
    low, high = np.percentile(scores.reshape(-1, 3), COLOUR_RANGE, axis=0)
    return MaskedViews(
        hidden=hidden,
        order=np.stack(orders),
        target=to_rgb(scores, low, high),
        reconstruction=to_rgb(again, low, high),
        patch_error=(error.clamp(max=MAX_ERROR) * (255 / MAX_ERROR)).round().to(torch.uint8).numpy(),
        error=error.mean(dim=-1).numpy().astype(np.float32),
    )
