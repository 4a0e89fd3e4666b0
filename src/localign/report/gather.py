"""What the report's pictures are drawn from, as plain arrays that a run folder can keep.

``numpy.savez(folder / "pictures.npz", **gather_pictures(...))`` is all a command does; the report is then
built from the folder alone. Features are reduced to three principal components here, so the file stays small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from localign.alignment.student import Student
from localign.alignment.teacher import Teacher
from localign.backbones import Backbone

PICTURES_FILE = "pictures.npz"


@dataclass(frozen=True)
class Components:
    """The first three principal components of a set of vectors."""

    mean: NDArray[np.float64]
    """``(width,)``."""
    basis: NDArray[np.float64]
    """``(width, 3)``, orthonormal columns; of each, the entry largest in size is positive."""
    share: NDArray[np.float64]
    """``(3,)``, share of the total variance."""

    def __call__(self, tokens: Tensor) -> NDArray[np.float32]:
        """Scores ``(..., 3)`` of vectors ``(..., width)``."""
        centred = tokens.double().cpu().numpy() - self.mean
        return np.asarray(centred @ self.basis, dtype=np.float32)


def fit_components(tokens: Tensor) -> Components:
    """Principal components of vectors ``(..., width)``, all with the same weight; width at least 3."""
    flat = tokens.double().cpu().numpy().reshape(-1, tokens.shape[-1])
    mean = flat.mean(0)
    centred = flat - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / max(1, len(flat)))
    values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
    basis = vectors[:, :3]
    largest = basis[np.abs(basis).argmax(0), np.arange(3)]
    # Eigenvectors have no sign of their own; without a rule, equal runs could differ in colour.
    basis = basis * np.where(largest < 0, -1.0, 1.0)
    return Components(mean, basis, values[:3] / max(values.sum(), 1e-30))


@torch.no_grad()
def gather_pictures(
    baseline: Backbone,
    aligned_student: Student,
    teacher: Teacher,
    heads_before: nn.Module | None,
    heads_after: nn.Module | None,
    images: Tensor,
    truth: Tensor | None,
    class_names: Sequence[str] | None,
    keep_masks: Tensor,
) -> dict[str, NDArray[Any]]:
    """Predictions, feature maps and reconstructions of a few images.

    Every model is used in eval mode on the device where it is, and left in the mode it was in.

    Args:
        baseline: The backbone before alignment.
        aligned_student: The trained student; its encoder's backbone is the aligned one.
        teacher: What the student learned from. With target ``cls`` there is no map to reconstruct, and the
            reconstruction arrays are left out.
        heads_before: A local-task head trained on the baseline's tokens: ``(k, P + n, d)`` to logits
            ``(k, n, C)``. None leaves the predictions out, as it does for ``heads_after`` or ``truth``.
        heads_after: The same head trained on the aligned tokens.
        images: uint8 ``(k, 3, H, W)``.
        truth: bool ``(k, n, C)``, the classes of each patch.
        class_names: C names.
        keep_masks: bool ``(k, masks, n)``, True = visible, in the order mask, complement, all-visible.

    Returns:
        Arrays without object dtype. Always ``images``, ``grid``, ``patch_size``, ``mean_colour``,
        ``keep_masks``, ``pca_baseline`` and ``pca_aligned`` (float32 ``(k, n, 3)``, one PCA per backbone over
        all images) with ``..._share``; ``target`` and ``reconstruction`` (float32 ``(k, masks, n, 3)``, both
        in the target's PCA), ``target_share`` and ``view_error`` (``(k, masks)``, squared error over the
        variance of the targets); ``truth``, ``class_names``, ``probability_baseline`` and
        ``probability_aligned`` (float16 ``(k, n, C)``).
    """
    arrays: dict[str, NDArray[Any]] = {
        "images": images.cpu().numpy(),
        "grid": np.asarray(baseline.grid),
        "patch_size": np.asarray(baseline.patch_size),
        "mean_colour": np.asarray(teacher.backbone.mean),
        "keep_masks": keep_masks.cpu().numpy(),
    }
    sides = (
        ("baseline", baseline, heads_before),
        ("aligned", aligned_student.encoder.backbone, heads_after),
    )
    for name, backbone, head in sides:
        tokens = _tokens(backbone, images)
        patches = tokens[:, backbone.num_prefix_tokens :]
        components = fit_components(patches)
        arrays |= {f"pca_{name}": components(patches), f"pca_{name}_share": components.share}
        if head is not None and truth is not None:
            arrays[f"probability_{name}"] = _probabilities(head, tokens)
    if truth is not None and heads_before is not None and heads_after is not None:
        names = class_names or [f"class {i}" for i in range(truth.shape[-1])]
        arrays |= {"truth": truth.cpu().numpy(), "class_names": np.asarray(list(names), dtype=np.str_)}
    if teacher.target != "cls":
        arrays |= _reconstructions(aligned_student, teacher, images, keep_masks)
    return arrays


def _tokens(backbone: Backbone, images: Tensor) -> Tensor:
    with _evaluating(backbone):
        return backbone.tokens(backbone.normalise(images.to(_device(backbone)))).float()


def _probabilities(head: nn.Module, tokens: Tensor) -> NDArray[np.float16]:
    with _evaluating(head):
        logits = head(tokens.to(_device(head)))
    return logits.float().sigmoid().cpu().numpy().astype(np.float16)


def _reconstructions(
    student: Student, teacher: Teacher, images: Tensor, keep_masks: Tensor
) -> dict[str, NDArray[Any]]:
    """The teacher's patch tokens of every view and the student's attempt at them."""
    prefix, (count, masks, patches) = student.num_prefix_tokens, keep_masks.shape
    device = _device(student)
    with _evaluating(student):
        normalised = teacher.backbone.normalise(images.to(device))
        keep = keep_masks.to(device)
        predicted = student(normalised, keep).float()[:, prefix:]
    there = _device(teacher.backbone)
    wanted = teacher(normalised.to(there), keep.to(there)).float()[:, prefix:].to(device)
    variance = (wanted - wanted.mean(dim=(0, 1))).square().mean().clamp(min=1e-12)
    error = ((predicted - wanted).square().mean(dim=(1, 2)) / variance).view(count, masks)
    components = fit_components(wanted)
    shape = (count, masks, patches, 3)
    return {
        "target": components(wanted).reshape(shape),
        "reconstruction": components(predicted).reshape(shape),
        "target_share": components.share,
        "view_error": error.cpu().numpy(),
    }


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
