"""What `import localign` offers: load a backbone, align one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from localign.alignment import AlignConfig, AlignTask, load_student
from localign.alignment.setup import resolve_align
from localign.alignment.student import Student
from localign.backbones import Backbone, export_folder, open_backbone
from localign.deprecated import with_new_names
from localign.engine import Outcome, train
from localign.errors import UserError
from localign.options.names import AttentionBackend


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
    if decoder:
        if kwargs:
            raise UserError(f"an export with its decoder takes no further arguments, got {', '.join(kwargs)}")
        return load_student(export_folder(path_or_name), attention=attention)
    return open_backbone(path_or_name, attention=attention, **kwargs)


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
    options = {"out": "runs/align", **with_new_names(options, "align", warn_of="localign.align")}
    try:
        config = AlignConfig(backbone=name, data=data, **options)
    except TypeError as error:
        raise UserError(f"align: {error}") from error
    config = resolve_align(config)
    return train(AlignTask(config, ready), config, "align")
