"""What `import localign` offers: load a backbone, align one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from localign.alignment import AlignConfig, AlignTask, load_student
from localign.alignment.setup import default_lr
from localign.alignment.student import Student
from localign.backbones import AttentionBackend, Backbone, create_backbone
from localign.engine import Outcome, train
from localign.engine.distributed import choose_device
from localign.errors import UserError

PUBLISHED_BATCH = 1024
CPU_BATCH = 8
"""Enough to see an alignment run on a laptop."""


def load(
    path_or_name: str | Path, *, decoder: bool = False, attention: AttentionBackend = "auto", **kwargs: Any
) -> Backbone | Student:
    """A backbone in eval mode, from an export folder or by name.

    Args:
        path_or_name: A folder that `localign align` or `localign export` wrote (a run folder will do), or
            any name that :func:`localign.backbones.create_backbone` knows.
        decoder: Give the aligned student instead: ``student.encoder.backbone`` is the backbone, and calling
            it with normalised images and keep-masks reconstructs the teacher's views.
        attention: Back-end of soft-capped attention.
        **kwargs: For names: ``weights``, ``image_size``, ``model_kwargs``, ``seed``.

    Returns:
        ``backbone.tokens(backbone.normalise(images))`` are the features of uint8 images.

    Raises:
        UserError: Unknown name, or a folder that is incomplete or damaged.
    """
    folder = Path(path_or_name)
    if (folder / "export").is_dir():
        folder = folder / "export"
    if decoder:
        if kwargs:
            raise UserError(f"an export with its decoder takes no further arguments, got {', '.join(kwargs)}")
        return load_student(folder, attention=attention)
    name = str(folder) if folder.is_dir() else str(path_or_name)
    return create_backbone(name, attention=attention, **kwargs)


def align(backbone: str | Backbone = "scenes-vit", data: str = "scenes", **options: Any) -> Outcome:
    """Locality alignment of a backbone by MaskEmbed; the same as `localign align`.

    Args:
        backbone: A name, an export folder, or a loaded backbone.
        data: A folder of images, a file list, or ``scenes``.
        **options: Fields of :class:`localign.alignment.AlignConfig`, for example ``steps=1000``.

    Returns:
        The run's folder and results; ``localign.load(outcome.folder)`` is the aligned backbone.

    Raises:
        UserError: Bad options or data.
        RunFailure: Training does not recover from non-finite losses.
    """
    ready = backbone if isinstance(backbone, Backbone) else None
    name = backbone.name if isinstance(backbone, Backbone) else backbone
    options.setdefault("out", "runs/align")
    try:
        config = AlignConfig(backbone=name, data=data, **options)
    except TypeError as error:
        raise UserError(f"align: {error}") from error
    config = resolve_align(config)
    return train(AlignTask(config, ready), config, "align")


def resolve_align(config: AlignConfig) -> AlignConfig:
    """The config with its defaults filled in: the backbone's published learning rate, a batch for the device."""
    on_cpu = choose_device(config.device).type == "cpu"
    return replace(
        config,
        lr=config.lr if config.lr is not None else default_lr(config),
        batch_size=config.batch_size or (CPU_BATCH if on_cpu else PUBLISHED_BATCH),
    )
