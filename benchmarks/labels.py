"""Reducing label maps to patch labels, against loops that call ``unique`` on each patch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.config import LabelsConfig
from localign import rng
from localign.bench.show import show, timing_table, write_measurements
from localign.bench.timing import Timing, hardware, timed
from localign.data.transforms import EvalTransform
from localign.engine.distributed import choose_device
from localign.errors import RunFailure, UserError
from localign.probing import PatchLabels, reduce_labels

IMAGES, IMAGE_SIZE, PATCH_SIZE = 64, 384, 14
CLASSES = 183
"""Classes of the synthetic maps, as many as in COCO-Stuff."""
CLASSES_PER_IMAGE, CELLS = 8, 4
"""Classes per synthetic map, and knots along a side of the smooth fields that separate them. At 384 pixels a quarter
of the 14-pixel patches hold several classes; in COCO-Stuff's maps it is a fifth."""
REPEATS = 5
OURS = "reduce_labels"
BATCH = 32
"""Label maps per call, as in training."""


def drawn_maps(count: int, size: int, seed: int) -> Tensor:
    """Synthetic label maps of smooth regions: each class has a random field, and each pixel takes the largest field.

    Returns:
        uint8 ``(count, size, size)``, values below ``CLASSES``.
    """
    maps = torch.empty(count, size, size, dtype=torch.uint8)
    for i in range(count):
        draw = rng.generator(seed, "bench label maps", i)
        fields = torch.from_numpy(
            draw.standard_normal((1, CLASSES_PER_IMAGE, CELLS, CELLS), dtype=np.float32)
        )
        winner = F.interpolate(fields, size=(size, size), mode="bicubic")[0].argmax(0)
        maps[i] = torch.from_numpy(draw.permutation(CLASSES)[:CLASSES_PER_IMAGE].astype(np.uint8))[winner]
    return maps


def read_maps(folder: Path, size: int) -> Tensor:
    """The label maps of a folder, cropped and resized: uint8 ``(maps, size, size)``.

    Raises:
        UserError: There are no maps, or a file is not a single-channel map of ids up to 255.
    """
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise UserError(f"no label maps (*.png) in the folder {folder}")
    view = EvalTransform(size, mode="square")
    maps = []
    for path in paths:
        try:
            with Image.open(path) as image:
                ids: NDArray[Any] = np.asarray(image)
        except OSError as error:
            raise UserError(f"cannot read the label map {path}: {error}") from None
        if ids.ndim != 2 or ids.dtype.kind not in "ui" or int(ids.max()) > 255:
            raise UserError(f"the label map {path} must have one channel with ids up to 255")
        maps.append(view.labels(ids).to(torch.uint8))
    return torch.stack(maps)


def torch_loop(maps: Tensor, patch: int, classes: int) -> PatchLabels:
    """The reduction as in a plain data loader: ``torch.unique`` on each patch."""
    rows, columns = maps.shape[1] // patch, maps.shape[2] // patch
    targets, images, majorities = [], [], []
    for labels in maps:
        image_target = torch.zeros(classes, dtype=torch.bool)
        for row in range(rows):
            for column in range(columns):
                tile = labels[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
                codes, counts = torch.unique(tile, return_counts=True)
                target = torch.zeros(classes, dtype=torch.bool)
                target[codes.long()] = True
                image_target |= target
                if len(codes) > 1:
                    target[0] = False
                targets.append(target)
                majorities.append(codes[counts.argmax()].long())
        images.append(image_target)
    shape = len(maps), rows * columns
    patches = torch.stack(targets).view(*shape, classes)
    return PatchLabels(patches, torch.stack(images), torch.stack(majorities).view(shape), classes)


def numpy_loop(
    maps: Tensor, patch: int, classes: int, attributes: NDArray[np.bool_] | None = None
) -> PatchLabels:
    """The same with ``numpy.unique`` and preallocated arrays, about the fastest loop over patches."""
    labels = maps.numpy()
    rows, columns = labels.shape[1] // patch, labels.shape[2] // patch
    table = np.eye(classes, dtype=bool) if attributes is None else attributes
    patches = np.zeros((len(labels), rows * columns, classes), dtype=bool)
    images = np.zeros((len(labels), classes), dtype=bool)
    majorities = np.zeros((len(labels), rows * columns), dtype=np.int64)
    for i, label_map in enumerate(labels):
        for n in range(rows * columns):
            row, column = divmod(n, columns)
            tile = label_map[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            codes, counts = np.unique(tile, return_counts=True)
            present = table[codes[0]] if len(codes) == 1 else table[codes].any(axis=0)
            patches[i, n] = present
            images[i] |= present
            patches[i, n, 0] &= present.sum() == 1
            majorities[i, n] = codes[counts.argmax()]
    return PatchLabels(
        torch.from_numpy(patches), torch.from_numpy(images), torch.from_numpy(majorities), len(table)
    )


def run_bench_labels(config: LabelsConfig) -> None:
    """Run the benchmark, write its JSON file, and print its tables."""
    content = write_measurements(config, bench_labels(config))
    show(labels_tables(content), config)


def bench_labels(config: LabelsConfig) -> dict[str, Any]:
    """Time all implementations on the same maps, and check that their results agree.

    Raises:
        UserError: The label maps or sizes are unusable.
        RunFailure: The results differ.
    """
    device = choose_device(config.device)
    size, patch = config.image_size or IMAGE_SIZE, config.patch_size or PATCH_SIZE
    if patch > size:
        raise UserError(f"maps of {size} pixels hold no patch of {patch}")
    if config.data is not None:
        maps = read_maps(Path(config.data), size)
        classes = int(maps.max()) + 1
    else:
        maps, classes = drawn_maps(config.images or IMAGES, size, config.seed), CLASSES
    batches = torch.split(maps.to(device), BATCH)

    def vectorised() -> PatchLabels:
        return PatchLabels.cat([reduce_labels(batch, patch, classes) for batch in batches])

    ways: dict[str, Callable[[], PatchLabels]] = {
        "loop of torch.unique": lambda: torch_loop(maps, patch, classes),
        "loop of numpy.unique": lambda: numpy_loop(maps, patch, classes),
        OURS: vectorised,
    }
    timings, results = {}, {}
    for name, way in ways.items():
        repeats = config.repeats or (REPEATS if name == OURS else 1)
        runs = [timed(way, device) for _ in range(repeats)]
        results[name] = runs[0][0].to("cpu")
        timings[name] = Timing.best([timing for _, timing in runs])
    for name in ways:
        _check_equal(name, results[name], results[OURS])
    return {
        "maps": len(maps),
        "size": size,
        "patch": patch,
        "classes": classes,
        "hardware": hardware(device),
        "ways": [_row(name, timing, timings[OURS], len(maps)) for name, timing in timings.items()],
    }


def _check_equal(name: str, found: PatchLabels, expected: PatchLabels) -> None:
    for part in ("patch", "image", "majority"):
        if not torch.equal(getattr(found, part), getattr(expected, part)):
            raise RunFailure(f"the {name} and {OURS} disagree about {part} labels")


def _row(name: str, timing: Timing, ours: Timing, count: int) -> dict[str, Any]:
    return {
        "way": name,
        "images_per_second": count / timing.wall,
        "times_slower": asdict(timing.over(ours)),
        "seconds": asdict(timing),
    }


def labels_tables(content: dict[str, Any]) -> list[Table]:
    """A table of the label maps that each implementation reduces per second."""
    title = "{maps} label maps of {size} pixels, patches of {patch}, {classes} classes".format(**content)
    table = timing_table(title, content, ("way",), ("images/s", "times slower", "in CPU time"))
    for row in content["ways"]:
        table.add_row(
            row["way"],
            f"{row['images_per_second']:,.0f}",
            f"{row['times_slower']['wall']:.1f}",
            f"{row['times_slower']['cpu']:.1f}",
        )
    return [table]
