"""The arrays of a report's pictures: models run on a few images, and the results are stored in ``pictures.npz``.

The report is built from this file without running a model. Features are stored as three principal components, which
keeps the file small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from localign import rng
from localign.alignment import AlignTask
from localign.alignment.objectives import MaskEmbed
from localign.alignment.student import Student
from localign.alignment.teacher import Teacher
from localign.backbones import Backbone
from localign.data.sources import UnreadableImage
from localign.files import replacing
from localign.probing import LabelledSource, Probed, reduce_labels
from localign.probing.features import eval_mode
from localign.probing.segmentation import attribute_table, ignores_pixels, labelled_batches
from localign.results import PICTURES_FILE, Pictures

PICTURES = 6
"""Images of a report."""


def example_images(task: AlignTask, count: int = PICTURES) -> Tensor:
    """The first readable held-out images of a run; training images if it has no held-out images.

    Returns:
        uint8 ``(count, 3, H, W)``, transformed for evaluation; fewer if the source has fewer.
    """
    source = task.data.val_source or task.data.source
    images: list[Tensor] = []
    for index in range(len(source)):
        if len(images) == count:
            break
        try:
            images.append(task.data.val_transform(source.load(index)))
        except UnreadableImage:
            continue
    return torch.stack(images)


def save_pictures(
    folder: Path,
    task: AlignTask,
    images: Tensor,
    *,
    heads_before: nn.Module | None = None,
    heads_after: nn.Module | None = None,
    truth: Tensor | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write ``pictures.npz`` of an alignment: feature maps and, where possible, reconstructions and predictions.

    Args:
        folder: The run folder.
        task: A finished alignment.
        images: uint8 ``(k, 3, H, W)``.
        heads_before, heads_after: Local-task heads for the baseline's and the aligned tokens; see
            :func:`gather_pictures`.
        truth: bool ``(k, n, C)``, the classes of each patch.
        class_names: C names.
    """
    keep = None  # only MaskEmbed reconstructs the teacher's tokens from embeddings of the whole image
    if isinstance(task.objective, MaskEmbed):
        keep = task.objective.draw(rng.key(task.seed, "pictures") >> 1, torch.arange(len(images)))
    arrays = gather_pictures(
        baseline=task.teacher.backbone,
        aligned_student=task.student,
        teacher=task.teacher,
        heads_before=heads_before,
        heads_after=heads_after,
        images=images,
        truth=truth,
        class_names=class_names,
        keep_masks=keep,
    )
    _write(folder / PICTURES_FILE, arrays)


def save_predictions(
    folder: Path,
    backbones: Mapping[str, Backbone],
    probed: Mapping[str, list[Probed]],
    source: LabelledSource,
) -> None:
    """Write ``pictures.npz`` of a probing run: predictions of the first seed's local head on the first images.

    An existing file is removed first. Without a local head, no file is written.

    Args:
        folder: The run folder.
        backbones: By name; they are moved to the CPU.
        probed: Results of each backbone, one per seed.
        source: The images and labels.
    """
    heads = {name: _local_head(seeds[0]) for name, seeds in probed.items()}
    path = folder / PICTURES_FILE
    path.unlink(missing_ok=True)
    models = {name: (backbones[name].cpu(), head.cpu()) for name, head in heads.items() if head is not None}
    if not models:
        return
    table = attribute_table(source)
    images, truth, majority = {}, {}, {}
    for name, (backbone, _) in models.items():
        images[name], maps = next(
            labelled_batches(source, backbone.image_size, PICTURES, preprocessing=backbone.preprocessing)
        )
        labels = reduce_labels(
            maps, backbone.patch_size, len(source.classes), table, ignores=ignores_pixels(source)
        )
        truth[name], majority[name] = labels.patch, labels.majority
    # With several classes per pixel, no single class has the most pixels of a patch.
    arrays = gather_predictions(models, images, truth, source.classes, majority if table is None else None)
    arrays["patch_size"] = np.asarray(next(iter(models.values()))[0].patch_size)
    _write(path, arrays)


def _write(path: Path, arrays: Pictures) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def _local_head(probed: Probed) -> nn.Module | None:
    """The local transformer head; if there is none, the first head with a local task."""
    local = {spec.label: head for spec, head in probed.trained.heads.items() if spec.task == "local"}
    return local.get("transformer", next(iter(local.values()), None))


@dataclass(frozen=True)
class Components:
    """The first three principal components of a set of vectors."""

    mean: NDArray[np.float64]
    """``(width,)``."""
    basis: NDArray[np.float64]
    """``(width, 3)``, orthonormal columns; the entry of largest magnitude in each column is positive."""
    share: NDArray[np.float64]
    """``(3,)``, share of the total variance of each component."""

    def __call__(self, tokens: Tensor) -> NDArray[np.float32]:
        """Scores ``(..., 3)`` of vectors ``(..., width)``."""
        centred = tokens.double().cpu().numpy() - self.mean
        return np.asarray(centred @ self.basis, dtype=np.float32)


def fit_components(tokens: Tensor) -> Components:
    """The first three principal components of vectors ``(..., width)``; width is at least 3."""
    flat = tokens.double().cpu().numpy().reshape(-1, tokens.shape[-1])
    mean = flat.mean(0)
    centred = flat - mean
    values, basis = _principal_axes(centred.T @ centred / max(1, len(flat)))
    return Components(mean, basis, values[:3] / max(values.sum(), 1e-30))


def _principal_axes(covariance: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """All variances, the largest first, and the first three directions ``(width, 3)``."""
    values, vectors = np.linalg.eigh(covariance)
    basis = vectors[:, ::-1][:, :3]
    largest = basis[np.abs(basis).argmax(0), np.arange(3)]
    # The sign of an eigenvector is arbitrary; a fixed sign gives equal runs equal colours.
    return values[::-1].clip(min=0), basis * np.where(largest < 0, -1.0, 1.0)


def joint_basis(covariances: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The first three principal directions ``(width, 3)`` of several models, each centred on its own mean.

    Each model counts with the same total variance, so that neither a shift between models nor a larger spread decides.

    Args:
        covariances: ``(width, width)`` of each model.
    """
    total = np.zeros_like(covariances[0])
    for covariance in covariances:
        total += covariance / max(float(np.trace(covariance)), 1e-30)
    return _principal_axes(total)[1]


def joint_components(tokens: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """The arrays ``joint_<side>`` and ``joint_<side>_share`` of :data:`~localign.results.Pictures`.

    Args:
        tokens: Side to vectors ``(..., width)`` of one width.
    """
    flat = {side: t.double().cpu().numpy() for side, t in tokens.items()}
    means = {side: t.reshape(-1, t.shape[-1]).mean(0) for side, t in flat.items()}
    covariances = {}
    for side, values in flat.items():
        centred = (values - means[side]).reshape(-1, values.shape[-1])
        covariances[side] = centred.T @ centred / max(1, len(centred))
    axes = joint_basis(list(covariances.values()))
    arrays: dict[str, NDArray[Any]] = {}
    for side, values in flat.items():
        variance = max(float(np.trace(covariances[side])), 1e-30)
        arrays[f"joint_{side}"] = ((values - means[side]) @ axes / np.sqrt(variance)).astype(np.float32)
        arrays[f"joint_{side}_share"] = np.einsum("dc,de,ec->c", axes, covariances[side], axes) / variance
    return arrays


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
    keep_masks: Tensor | None,
) -> dict[str, NDArray[Any]]:
    """Predictions, feature maps and reconstructions of a few images.

    Models run in eval mode on their own device, and return to their previous mode.

    Args:
        baseline: The backbone before alignment.
        aligned_student: The trained student; the backbone of its encoder is the aligned backbone.
        teacher: The student's teacher.
        heads_before: A local-task head trained on the baseline's tokens: ``(k, P + n, d)`` to logits
            ``(k, n, C)``. If this, ``heads_after`` or ``truth`` is None, there are no predictions.
        heads_after: The same head trained on the aligned tokens.
        images: uint8 ``(k, 3, H, W)``.
        truth: bool ``(k, n, C)``, the classes of each patch.
        class_names: C names; numbered classes by default.
        keep_masks: bool ``(k, masks, n)``, True = visible, in the order mask, complement, all-visible. None (for a
            student that does not reconstruct masked views) leaves the reconstructions out.

    Returns:
        The arrays of :data:`~localign.results.Pictures`, without object dtype. Always ``images``, ``grid``,
        ``patch_size``, ``mean_colour``, ``pca_*`` with one PCA per backbone over all images, and ``joint_*`` with one
        basis for both. With ``keep_masks``,
        the reconstructions: target and reconstruction share the target's PCA, or for target ``cls`` hold each channel
        in standard deviations from its mean. With heads and truth, the predictions.
    """
    arrays: dict[str, NDArray[Any]] = {
        "images": images.cpu().numpy(),
        "grid": np.asarray(baseline.grid),
        "patch_size": np.asarray(baseline.patch_size),
        "mean_colour": np.asarray(teacher.backbone.mean),
    }
    sides = (
        ("baseline", baseline, heads_before),
        ("aligned", aligned_student.encoder.backbone, heads_after),
    )
    both: dict[str, Tensor] = {}
    for name, backbone, head in sides:
        tokens = _tokens(backbone, images)
        patches = both[name] = tokens[:, backbone.num_prefix_tokens :]
        components = fit_components(patches)
        arrays |= {f"pca_{name}": components(patches), f"pca_{name}_share": components.share}
        if head is not None and truth is not None:
            arrays[f"probability_{name}"] = _probabilities(head, tokens)
    arrays |= joint_components(both)
    if truth is not None and heads_before is not None and heads_after is not None:
        names = class_names or [f"class {i}" for i in range(truth.shape[-1])]
        arrays |= {"truth": truth.cpu().numpy(), "class_names": np.asarray(list(names), dtype=np.str_)}
    if keep_masks is not None:
        arrays["keep_masks"] = keep_masks.cpu().numpy()
        arrays |= _reconstructions(aligned_student, teacher, images, keep_masks)
    return arrays


@torch.no_grad()
def gather_predictions(
    models: Mapping[str, tuple[Backbone, nn.Module]],
    images: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    class_names: Sequence[str],
    majority: Mapping[str, Tensor] | None = None,
) -> dict[str, NDArray[Any]]:
    """Predictions of local-task heads on the same few images, for several backbones.

    Args:
        models: Name to backbone and head, ``(k, P + n, d)`` to logits ``(k, n, C)``. Each runs in eval mode on its own
            device.
        images: Name to uint8 ``(k, 3, H, W)`` at the size of its backbone.
        truth: Name to bool ``(k, n, C)``, the classes of each patch.
        class_names: C names.
        majority: Name to int64 ``(k, n)``, the class with most pixels of each patch; None for label maps with several
            classes per pixel.

    Returns:
        The arrays of :data:`~localign.results.Pictures`: ``images``, ``grid``, ``truth``, ``class_names`` and, if
        given, ``majority`` of the first backbone, and ``probability_<name>`` of every backbone. Backbones with another
        grid than the first add ``grid_<name>``, ``truth_<name>`` and ``majority_<name>``.
    """
    first = next(iter(models))
    arrays: dict[str, NDArray[Any]] = {
        "images": images[first].cpu().numpy(),
        "class_names": np.asarray(list(class_names), dtype=np.str_),
    }
    for name, (backbone, head) in models.items():
        arrays[f"probability_{name}"] = _probabilities(head, _tokens(backbone, images[name]))
        if name != first and tuple(backbone.grid) == tuple(models[first][0].grid):
            continue
        suffix = "" if name == first else f"_{name}"
        arrays[f"grid{suffix}"] = np.asarray(backbone.grid)
        arrays[f"truth{suffix}"] = truth[name].cpu().numpy()
        if majority is not None:
            arrays[f"majority{suffix}"] = majority[name].cpu().numpy()
    return arrays


def _tokens(backbone: Backbone, images: Tensor) -> Tensor:
    with eval_mode(backbone):
        return backbone.tokens(backbone.normalise(images.to(_device(backbone)))).float()


def _probabilities(head: nn.Module, tokens: Tensor) -> NDArray[np.float16]:
    with eval_mode(head):
        logits = head(tokens.to(_device(head)))
    return np.asarray(logits.float().sigmoid().cpu().numpy(), dtype=np.float16)


def _reconstructions(
    student: Student, teacher: Teacher, images: Tensor, keep_masks: Tensor
) -> dict[str, NDArray[Any]]:
    """The teacher's tokens of every view (patch tokens or one class token), and the student's reconstruction."""
    count, masks, _ = keep_masks.shape
    device, teacher_device = _device(student), _device(teacher.backbone)
    with eval_mode(student):
        normalised = teacher.backbone.normalise(images.to(device))
        keep = keep_masks.to(device)
        predicted = student(normalised, keep).float()
    target = teacher(normalised.to(teacher_device), keep.to(teacher_device)).float().to(device)
    one_token = teacher.target == "cls"
    if one_token:
        predicted = predicted[:, 0]
    else:
        predicted, target = (tokens[:, student.num_prefix_tokens :] for tokens in (predicted, target))
    mean = target.flatten(0, -2).mean(dim=0)
    variance = (target - mean).square().mean().clamp(min=1e-12)
    error = (predicted - target).square().flatten(1).mean(dim=1) / variance
    arrays: dict[str, NDArray[Any]] = {"view_error": error.view(count, masks).cpu().numpy()}
    if one_token:
        # Too few vectors for a PCA: store the channels, in standard deviations from their mean over the views.
        deviation = (target - mean).square().mean(dim=0).sqrt().clamp(min=1e-6)
        for name, values in (("target", target), ("reconstruction", predicted)):
            arrays[name] = ((values - mean) / deviation).view(count, masks, -1).cpu().numpy()
        return arrays
    components = fit_components(target)
    shape = (count, masks, target.shape[1], 3)
    return arrays | {
        "target": components(target).reshape(shape),
        "reconstruction": components(predicted).reshape(shape),
        "target_share": components.share,
    }


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
