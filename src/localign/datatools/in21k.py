"""`localign data in21k-p`: the processed ImageNet-21k of Ridnik et al. (2021), as shards.

The authors drop classes with few images, take 50 images of every other class for validation, and shrink the images.
They draw the validation images at random; here the choice is a function of the seed and the image names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localign import rng
from localign.data.image_source import ImageSource
from localign.data.sources import ExcludingSource, TarSource
from localign.data.sources.tar_index import SHARD
from localign.datatools.packing import (
    QUALITY,
    Facts,
    Packing,
    check_same_files,
    facts_of,
    output_folders,
    pack,
    publish,
    show_packed,
)
from localign.datatools.reading import open_files
from localign.datatools.shard import read_about
from localign.errors import UserError
from localign.options.datatools import In21kConfig


def run_in21k(config: In21kConfig) -> None:
    """Pack the training and validation split, and print a summary.

    Raises:
        UserError: As :func:`write_in21k` does.
        RunFailure: A worker process died.
    """
    made = write_in21k(config)
    print(f"classes    {made['kept']:,} of {made['classes']:,} have {config.min_images} images")
    for part in ("train", "val"):
        show_packed(made[part], Path(config.out) / part)


def write_in21k(config: In21kConfig) -> dict[str, Any]:
    """Pack the training and validation split.

    Returns:
        ``classes``, the number of classes in the source; ``kept``, the number of classes with enough images; and
        ``train`` and ``val``, the content of ``about.json`` of each split.

    Raises:
        UserError: The source has no classes, no class is large enough, or the output folder holds something else.
        RunFailure: A worker process died.
    """
    source = open_files(config, config.exclude)
    names, codes, inside = classes_of(source, config.source)
    kept, train, val = split(names, codes, source, config)
    final, temporary = output_folders(config.out)
    facts = facts_of(source, config)
    result: dict[str, Any] = {"classes": len(names), "kept": len(kept)}
    for part, order in (("train", train), ("val", val)):
        part_facts: Facts = {**facts, "split": part, "classes": len(kept)}
        if final.exists():
            check_same_files(final / part, source)
            result[part] = read_about(final / part, part_facts)
            continue
        folders = None if inside else [names[code] for code in codes[order]]
        packing = Packing(
            source,
            order,
            folders,
            config.shard_images,
            config.resize,
            config.quality or QUALITY,
            temporary / part,
        )
        result[part] = pack(packing, config.processes, part_facts)
    if not final.exists():
        publish(temporary, final)
    return result


def classes_of(source: ImageSource, spec: str) -> tuple[list[str], NDArray[np.int64], bool]:
    """Class names, the class of each image as an index into them, and whether image names begin with the class.

    Raises:
        UserError: An image has no class.
    """
    class_tars = _class_tars(source)
    if class_tars is not None:
        return *class_tars, False
    split_names = [source.place(i)[1].partition("/") for i in range(len(source))]
    if not all(slash for _, slash, _ in split_names):
        raise UserError(f"{spec} must hold one folder or one tar file per class")
    names = sorted({folder for folder, _, _ in split_names})
    code_of = {name: code for code, name in enumerate(names)}
    return names, np.array([code_of[folder] for folder, _, _ in split_names]), True


def _class_tars(source: ImageSource) -> tuple[list[str], NDArray[np.int64]] | None:
    """Class names and codes from the names of tar files, if no image in them lies in a folder; else None."""
    inner = source.source if isinstance(source, ExcludingSource) else source
    if not isinstance(inner, TarSource) or any("/" in source.place(i)[1] for i in range(len(source))):
        return None
    codes = np.array(inner.index.records[:, SHARD])
    if isinstance(source, ExcludingSource):
        codes = codes[source.indices]
    return [shard.stem for shard in inner.shards], codes


def split(
    names: list[str], codes: NDArray[np.int64], source: ImageSource, config: In21kConfig
) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    """The classes with enough images, and the shuffled indices of their training and validation images.

    Raises:
        UserError: No class is large enough.
    """
    by_class = np.argsort(codes, kind="stable")
    counts = np.bincount(codes, minlength=len(names))
    ends = np.cumsum(counts)
    kept, train, val = [], [], []
    for name, count, end in zip(names, counts, ends, strict=True):
        if count < config.min_images:
            continue
        kept.append(name)
        # Sorted by name, so that the order of files on the disk or in a tar file does not matter.
        images = sorted(by_class[end - count : end].tolist(), key=source.name)
        draw = rng.generator(config.seed, f"in21k-p {name}").permutation(int(count))
        shuffled = np.array(images)[draw]
        val.append(shuffled[: config.val_images])
        train.append(shuffled[config.val_images :])
    if not kept:
        raise UserError(
            f"none of {len(names)} classes has {config.min_images} images; the largest class has {counts.max()}"
        )
    order = rng.generator(config.seed, "in21k-p order")
    return kept, order.permutation(np.concatenate(train)), order.permutation(np.concatenate(val))
