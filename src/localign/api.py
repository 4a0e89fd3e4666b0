"""The Python interface: load a backbone, align a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, overload

from localign.alignment import AlignConfig, load_student
from localign.alignment.native import align_task
from localign.alignment.setup import resolve_align
from localign.alignment.student import Student
from localign.backbones import Backbone, create_backbone, export_folder
from localign.deprecated import with_new_names
from localign.engine import Outcome, train
from localign.errors import UserError
from localign.options.names import AttentionBackend


@overload
def load(
    path_or_name: str | Path,
    *,
    decoder: Literal[False] = False,
    attention: AttentionBackend = "auto",
    **kwargs: Any,
) -> Backbone: ...


@overload
def load(
    path_or_name: str | Path, *, decoder: Literal[True], attention: AttentionBackend = "auto", **kwargs: Any
) -> Student: ...


def load(
    path_or_name: str | Path, *, decoder: bool = False, attention: AttentionBackend = "auto", **kwargs: Any
) -> Backbone | Student:
    """Load a backbone from an export folder or by name.

    Args:
        path_or_name: A run or export folder of `localign align`, an export folder of `localign export`, or a name that
            :func:`localign.backbones.create_backbone` accepts.
        decoder: Return the aligned student with its decoder. ``student.encoder.backbone`` is the backbone, and calling
            the student with normalised images and keep-masks reconstructs the teacher's tokens.
        attention: Implementation of soft-capped attention: eager, flex, or auto (flex on CUDA).
        **kwargs: ``image_size``, a side or (height, width) in pixels to which positions are resampled; for names only:
            ``weights``, ``model_kwargs``, ``seed``.

    Returns:
        The backbone or student in eval mode. ``backbone.tokens(backbone.normalise(images))`` are the features of uint8
        images.

    Raises:
        UserError: The name is unknown, or the folder is incomplete or damaged.
    """
    if decoder:
        if other := kwargs.keys() - {"image_size"}:
            raise UserError(f"decoder=True accepts export folders only, without {', '.join(sorted(other))}")
        return load_student(export_folder(path_or_name), attention=attention, **kwargs)
    return create_backbone(path_or_name, attention=attention, **kwargs)


def align(backbone: str | Backbone = "scenes-vit", data: str = "scenes", **options: Any) -> Outcome:
    """Align a backbone, as `localign align` does.

    Args:
        backbone: A name, an export folder, or a loaded backbone.
        data: Training images: a folder, a file list, ``scenes``, or anything else that ``--data`` accepts.
        **options: Fields of :class:`localign.alignment.AlignConfig`, for example ``steps=1000``.

    Returns:
        The run's folder and results. ``localign.load(outcome.folder)`` is the aligned backbone.

    Raises:
        UserError: Options or data are invalid.
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
    return train(align_task(config, ready), config, "align")
