"""`localign data stats`: how many images and classes there are, and how large they are."""

from __future__ import annotations

import io
import json
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from localign.data.classification import ClassLabels, labels_of
from localign.data.decoding import FORMATS, UnreadableImage, unreadable_on_failure
from localign.data.parallel import in_processes, parts
from localign.data.sources import ImageSource
from localign.datatools.reading import encoded, open_files
from localign.errors import UserError
from localign.files import replace_text
from localign.options.datatools import StatsConfig


@dataclass(frozen=True)
class _Look:
    source: ImageSource
    places: tuple[int, ...]

    def __call__(self, part: tuple[int, int]) -> list[tuple[str, int, int, int]]:
        """(format, width, height, bytes) by the files' headers; of what cannot be opened ("", 0, 0, 0)."""
        seen = []
        for index in self.places[slice(*part)]:
            try:
                data = encoded(self.source, index)
                with unreadable_on_failure(""), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                        seen.append((image.format or "?", *image.size, len(data)))
            except UnreadableImage:
                seen.append(("", 0, 0, 0))
        return seen


def run_stats(config: StatsConfig) -> None:
    """Look at the images, and print how many and how large they are.

    Raises:
        UserError: The source does not exist, or no image can be opened.
        RunFailure: A process died.
    """
    found = image_stats(config)
    print(
        f"images     {found['images']:,}; of {found['opened']:,} opened {found['unreadable']:,} are unreadable"
    )
    print("formats    " + ", ".join(f"{name} {count:,}" for name, count in found["formats"].items()))
    spread = "{min:,.0f} to {max:,.0f}, median {median:,.0f}, mean {mean:,.1f}"
    for name in ("width", "height", "bytes"):
        print(f"{name:<10} {spread.format(**found[name])}")
    if (classes := found["classes"]) is not None:
        print(f"classes    {classes['count']:,}; images in each {spread.format(**classes)}")


def image_stats(config: StatsConfig) -> dict[str, Any]:
    """Look at the images.

    Returns:
        ``images``; ``opened`` of them; ``unreadable`` of these; ``formats``, their counts; ``width``, ``height``
        and ``bytes``, each with min, median, mean and max; ``classes``, None or their ``count`` and the images of
        the smallest, median and largest.

    Raises:
        UserError: The source does not exist, or no image can be opened.
        RunFailure: A process died.
    """
    source = open_files(config.source)
    count = min(config.images or len(source), len(source))
    places = tuple((np.arange(count) * len(source) // count).tolist())
    items = parts(count)
    look = _Look(source, places)
    found = [e for part in in_processes(look, items, len(items), config.processes, "opening") for e in part]
    good = [entry for entry in found if entry[0]]
    if not good:
        raise UserError(f"none of {count} images of {config.source} can be opened")
    columns = dict(zip(("width", "height", "bytes"), list(zip(*good, strict=True))[1:], strict=True))
    content = {
        "images": len(source),
        "opened": count,
        "unreadable": count - len(good),
        "formats": dict(Counter(entry[0] for entry in good).most_common()),
        **{name: _spread(values) for name, values in columns.items()},
        "classes": _classes(source, config.source),
    }
    if config.out is not None:
        replace_text(Path(config.out), json.dumps(content, indent=1) + "\n")
    return content


def _spread(values: Any) -> dict[str, float]:
    return {
        "min": int(min(values)),
        "median": float(np.median(values)),
        "mean": float(np.mean(values)),
        "max": int(max(values)),
    }


def _classes(source: ImageSource, spec: str) -> dict[str, float] | None:
    try:
        labels = labels_of(source, spec)
    except UserError:
        return None
    assert isinstance(labels, ClassLabels)
    counts = np.bincount(labels.codes, minlength=len(labels.classes))
    return {"count": len(counts), **_spread(counts)}
