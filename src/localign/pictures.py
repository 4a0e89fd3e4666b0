"""The pictures of a report, gathered once from a finished alignment and kept as plain arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from localign import rng
from localign.alignment import AlignTask
from localign.alignment.objectives import MaskEmbed
from localign.data.sources import UnreadableImage
from localign.files import replacing
from localign.report import PICTURES_FILE, gather_pictures

PICTURES = 6


def example_images(task: AlignTask, count: int = PICTURES) -> Tensor:
    """The first readable held-out images of a run (training images where there are none).

    Returns:
        uint8 ``(count, 3, H, W)``, as the backbone would see them; fewer where there are fewer.
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
    """Write ``pictures.npz``: feature maps, and masked views, reconstructions and predictions where there are any.

    Args:
        folder: The run folder.
        task: A finished alignment.
        images: uint8 ``(k, 3, H, W)``.
        heads_before, heads_after: Local-task heads for the baseline's and the aligned tokens.
        truth: bool ``(k, patches, classes)``.
        class_names: Of the classes.
    """
    baseline = task.teacher.backbone
    keep = None  # only MaskEmbed reconstructs the teacher's tokens from embeddings of the whole image
    if isinstance(task.objective, MaskEmbed):
        keep = task.objective.draw(rng.key(task.seed, "pictures") >> 1, torch.arange(len(images)))
    arrays = gather_pictures(
        baseline=baseline,
        aligned_student=task.student,
        teacher=task.teacher,
        heads_before=heads_before,
        heads_after=heads_after,
        images=images,
        truth=truth,
        class_names=class_names,
        keep_masks=keep,
    )
    with replacing(folder / PICTURES_FILE) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
