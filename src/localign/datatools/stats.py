"""`localign data stats`: numbers and sizes of images and classes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from localign.data.classification import ClassLabels, labels_of
from localign.data.decoding import UnreadableImage, stored_size
from localign.data.image_source import ImageSource
from localign.data.parallel import in_processes, parts
from localign.datatools.reading import encoded_image, open_files
from localign.errors import UserError
from localign.files import replace_text
from localign.options.datatools import StatsConfig


class Summary(TypedDict):
    """Summary statistics of a quantity."""

    min: int
    median: float
    mean: float
    max: int


class ClassSummary(Summary):
    """The number of classes, and summary statistics of the images per class."""

    count: int


@dataclass(frozen=True)
class _HeaderReader:
    source: ImageSource
    indices: tuple[int, ...]

    def __call__(self, part: tuple[int, int]) -> list[tuple[str, int, int, int]]:
        """(format, width, height, bytes) from each file's header; ("", 0, 0, 0) if the file is unreadable."""
        headers = []
        for index in self.indices[slice(*part)]:
            try:
                data = encoded_image(self.source, index)
                headers.append((*stored_size(data, self.source.name(index)), len(data)))
            except UnreadableImage:
                headers.append(("", 0, 0, 0))
        return headers


def run_stats(config: StatsConfig) -> None:
    """Collect statistics of the images, and print them.

    Raises:
        UserError: The source does not exist, or no image can be opened.
        RunFailure: A worker process died.
    """
    found = image_stats(config)
    print(
        f"images     {found['images']:,}; {found['unreadable']:,} of {found['opened']:,} opened images are unreadable"
    )
    print("formats    " + ", ".join(f"{name} {count:,}" for name, count in found["formats"].items()))
    spread = "{min:,.0f} to {max:,.0f}, median {median:,.0f}, mean {mean:,.1f}"
    for name in ("width", "height", "bytes"):
        print(f"{name:<10} {spread.format(**found[name])}")
    if (classes := found["classes"]) is not None:
        print(f"classes    {classes['count']:,}; images per class {spread.format(**classes)}")


def image_stats(config: StatsConfig) -> dict[str, Any]:
    """Open evenly spaced images and collect statistics; write them to ``config.out`` if it is set.

    Returns:
        ``images``, the number of images; ``opened``, the number of opened images; ``unreadable``, the number of
        unreadable images among them; ``formats``, the number of images by format; ``width``, ``height`` and
        ``bytes``, each a :class:`Summary`; and ``classes``, a :class:`ClassSummary`, or None without labels.

    Raises:
        UserError: The source does not exist, or no image can be opened.
        RunFailure: A worker process died.
    """
    source = open_files(config)
    count = min(config.images or len(source), len(source))
    indices = tuple((np.arange(count) * len(source) // count).tolist())
    items = parts(count)
    read = _HeaderReader(source, indices)
    headers = [h for part in in_processes(read, items, len(items), config.processes, "opening") for h in part]
    readable = [header for header in headers if header[0]]
    if not readable:
        raise UserError(f"none of {count} images of {config.source} can be opened")
    formats, widths, heights, sizes = zip(*readable, strict=True)
    content = {
        "images": len(source),
        "opened": count,
        "unreadable": count - len(readable),
        "formats": dict(Counter(formats).most_common()),
        "width": _summary(widths),
        "height": _summary(heights),
        "bytes": _summary(sizes),
        "classes": _classes(source, config.source),
    }
    if config.out is not None:
        replace_text(Path(config.out), json.dumps(content, indent=1) + "\n")
    return content


def _summary(values: Sequence[int] | NDArray[np.integer]) -> Summary:
    return {
        "min": int(min(values)),
        "median": float(np.median(values)),
        "mean": float(np.mean(values)),
        "max": int(max(values)),
    }


def _classes(source: ImageSource, spec: str) -> ClassSummary | None:
    try:
        labels = labels_of(source, spec)
    except UserError:
        return None
    assert isinstance(labels, ClassLabels)
    counts = np.bincount(labels.codes, minlength=len(labels.classes))
    return {"count": len(counts), **_summary(counts)}
