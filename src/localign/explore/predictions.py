"""Classes that a probing head predicts on the pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localign.backbones import Backbone
from localign.errors import UserError
from localign.report.figures.predictions import predicted_by, predicted_names
from localign.report.picture_file import read_pictures
from localign.results import Pictures
from localign.text.printing import printable


@dataclass(frozen=True)
class Predictions:
    """The first images of a page with their classes; p images, n patches, C classes."""

    images: NDArray[np.uint8]
    """``(p, 3, height, width)``."""
    classes: list[str]
    truth: NDArray[np.bool_]
    """``(p, n, C)``, the classes of each patch."""
    probabilities: list[NDArray[np.uint8]]
    """By model, ``(p, n, C)``, 0..255; above 127 means above 0.5."""


def read_predictions(folder: str, models: Mapping[str, Backbone], limit: int) -> Predictions:
    """The pictures of `localign probe` or `localign demo`.

    Args:
        folder: The run folder.
        models: The page's models by name.
        limit: The largest number of images.

    Raises:
        UserError: The folder has no predictions of these models, or of another grid.
    """
    arrays, reason = read_pictures(Path(folder))
    shown = printable(folder)
    if reason:
        raise UserError(f"{shown} has no pictures for --probe: {printable(reason)}")
    names = predicted_names(arrays)
    if not names or not {"truth", "class_names", "images", "grid"} <= arrays.keys():
        raise UserError(
            f"the pictures of {shown} hold no predictions; give a run of `localign probe` or `demo`"
        )
    for name, backbone in models.items():
        if name not in names:
            raise UserError(
                f"{shown} has predictions of {', '.join(map(printable, names))}, not of {printable(name)}; name the "
                "models of explore like those"
            )
        _check_fit(arrays, name, backbone, names, shown)
    probabilities = [_bytes(predicted_by(arrays, name, limit).probability) for name in models]
    return Predictions(
        images=np.asarray(arrays["images"][:limit], dtype=np.uint8),
        classes=[printable(name) for name in arrays["class_names"]],
        truth=np.asarray(arrays["truth"][:limit], dtype=np.bool_),
        probabilities=probabilities,
    )


def _check_fit(arrays: Pictures, name: str, backbone: Backbone, names: Sequence[str], shown: str) -> None:
    """Raises UserError for pictures that a model does not see, or arrays that do not belong together."""
    images, truth, probability = arrays["images"], arrays["truth"], arrays[f"probability_{name}"]
    fits = (
        images.ndim == 4
        and images.dtype == np.uint8
        and truth.ndim == 3
        and truth.shape == probability.shape
        and f"grid_{name}" not in arrays
        and truth.shape == (len(images), backbone.num_patches, len(arrays["class_names"]))
        and tuple(images.shape[1:]) == (3, *backbone.image_size)
        and tuple(arrays["grid"]) == backbone.grid
    )
    if not fits:
        rows, columns = backbone.grid
        raise UserError(
            f"the pictures of {shown} are not of the input size of {printable(name)}, {backbone.image_size[0]} x "
            f"{backbone.image_size[1]} pixels in {rows} x {columns} patches; leave out --image-size, or probe again"
        )


def _bytes(probability: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Probabilities as 0..255; exactly those above 0.5 are above 127."""
    return np.asarray(np.ceil(probability.clip(0, 1) * 255 - 0.5).clip(0, 255), dtype=np.uint8)
