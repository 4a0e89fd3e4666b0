"""`localign data in21k-p`: the processed ImageNet-21k of Ridnik et al. (2021), as shards.

Their rules: classes with few images go, 50 images of each other class become its validation images, and images are
made smaller. The choice of validation images is theirs to draw; here it is a function of the seed and of the names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localign import rng
from localign.data.sources import ExcludingSource, ImageSource, TarSource
from localign.data.sources.tar_index import SHARD
from localign.datatools.packing import QUALITY, Packing, facts_of, pack, partial, put_whole, show_packed
from localign.datatools.reading import open_files
from localign.datatools.shard import finished
from localign.errors import UserError
from localign.options.datatools import In21kConfig


def run_in21k(config: In21kConfig) -> None:
    """Pack both splits, and print what was packed.

    Raises:
        UserError: See :func:`write_in21k`.
        RunFailure: A process died.
    """
    made = write_in21k(config)
    print(f"classes    {made['kept']:,} of {made['classes']:,} have {config.min_images} images")
    for part in ("train", "val"):
        show_packed(made[part], Path(config.out) / part)


def write_in21k(config: In21kConfig) -> dict[str, Any]:
    """Pack both splits; returns how many classes were kept, and what ``about.json`` says of each split.

    Raises:
        UserError: The source has no classes, or none that is large enough, or the folder holds something else.
        RunFailure: A process died.
    """
    source = open_files(config.source, config.exclude)
    names, codes, inside = classes_of(source, config.source)
    kept, train, val = split(names, codes, source, config)
    final, temporary = partial(config.out)
    facts = facts_of(source, config)
    outcome: dict[str, Any] = {"classes": len(names), "kept": len(kept)}
    for part, order in (("train", train), ("val", val)):
        part_facts = facts | {"split": part, "classes": len(kept)}
        if final.exists():
            outcome[part] = finished(final / part, part_facts)
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
        outcome[part] = pack(packing, config.processes, part_facts)
    if not final.exists():
        put_whole(temporary, final)
    return outcome


def classes_of(source: ImageSource, spec: str) -> tuple[list[str], NDArray[np.int64], bool]:
    """Classes, the class of each image, and whether the images' names begin with it.

    Raises:
        UserError: An image has none.
    """
    of_tars = _class_tars(source)
    if of_tars is not None:
        return *of_tars, False
    firsts = [source.name(i).partition("/") for i in range(len(source))]
    if not all(slash for _, slash, _ in firsts):
        raise UserError(f"{spec} must hold class folders, or a tar file of each class")
    names = sorted({first for first, _, _ in firsts})
    place = {name: number for number, name in enumerate(names)}
    return names, np.array([place[first] for first, _, _ in firsts]), True


def _class_tars(source: ImageSource) -> tuple[list[str], NDArray[np.int64]] | None:
    """Of tar files whose images lie in no folders: the files' names as classes."""
    inner = source.source if isinstance(source, ExcludingSource) else source
    if not isinstance(inner, TarSource) or any("/" in source.name(i) for i in range(len(source))):
        return None
    codes = np.array(inner.index.records[:, SHARD])
    if isinstance(source, ExcludingSource):
        codes = codes[source.kept]
    return [shard.stem for shard in inner.shards], codes


def split(
    names: list[str], codes: NDArray[np.int64], source: ImageSource, config: In21kConfig
) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    """Classes that are large enough, and the places of their training and validation images, shuffled.

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
        # In the order of their names: it must not matter how files lie on a disk or in a tar file.
        images = sorted(by_class[end - count : end].tolist(), key=source.name)
        draw = rng.generator(config.seed, f"in21k-p {name}").permutation(int(count))
        shuffled = np.array(images)[draw]
        val.append(shuffled[: config.val_images])
        train.append(shuffled[config.val_images :])
    if not kept:
        raise UserError(
            f"none of {len(names)} classes has {config.min_images} images; the largest has {counts.max()}"
        )
    order = rng.generator(config.seed, "in21k-p order")
    return kept, order.permutation(np.concatenate(train)), order.permutation(np.concatenate(val))
