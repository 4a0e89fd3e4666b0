"""Labelled data sets by name or path: scenes, COCO-Stuff, ADE20k, and folders of images and label maps."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

from localign.data.cached_scenes import CachedScenes
from localign.data.sources import UnreadableImage
from localign.errors import UserError, did_you_mean
from localign.probing.classes import ade20k, class_table, coco_stuff
from localign.probing.segmentation import MAP_SUFFIX, AttributeLabels, FolderSegmentation, LabelledSource

Split = Literal["train", "val", "test"]

COCO_PARTS = {"train": "train2017", "val": "val2017", "test": "val2017"}
ADE20K_PARTS = {"train": "training", "val": "validation", "test": "validation"}

COCO_IMAGES = ("images/{part}", "{part}")
"""Folders that may hold COCO's photographs."""

COCO_MAPS = ("stuffthingmaps/{part}", "stuffthingmaps_trainval2017/{part}", "annotations/{part}", "{part}")
"""Folders that may hold the pixel maps of ``stuffthingmaps_trainval2017.zip``. The archive has one folder per part."""


def open_labelled(
    data: str | os.PathLike[str], split: Split, *, scenes: int = 4000, things_only: bool = False
) -> LabelledSource:
    """One split of a labelled data set.

    ``data`` is ``scenes`` or a folder. The layout of a folder is recognised, or named before the path as in
    ``coco:PATH``:

    - ``folder``: images in ``images/<split>*``, label maps of class ids in the folder of the same name in ``masks``,
      and ``classes.json``, see :func:`localign.probing.classes.class_table`.
    - ``coco``, COCO-Stuff: images in ``images/{train,val}2017`` or ``{train,val}2017``, and pixel maps in
      ``stuffthingmaps/{train,val}2017``, ``annotations/{train,val}2017`` or ``{train,val}2017``.
    - ``ade20k``: ``images/{training,validation}`` and ``annotations/{training,validation}``, as in
      ``ADEChallengeData2016``; class names from ``objectInfo150.txt`` if the file exists.

    Scenes have three splits. Folders have no test labels, so their ``test`` is the same as their ``val``. Commands
    train on ``train`` and report on ``test``; choices on ``val`` are independent of ``test`` for scenes only.

    The first image and label map are read, so that a wrong layout shows at once.

    Args:
        data: ``scenes``, a path, or a layout and a path.
        split: ``train``, ``val`` or ``test``.
        scenes: Number of scenes.
        things_only: Treat stuff as unlabeled, which leaves 92 classes; for COCO-Stuff only.

    Raises:
        UserError: There is no such data set, a folder is missing or empty, an image has no label map, the first image
            or label map is bad, or ``things_only`` does not apply.
    """
    if split not in get_args(Split):
        raise UserError(f"unknown split {split!r}; known: {', '.join(get_args(Split))}")
    layout, root = _layout_and_root(os.fspath(data))
    if things_only and layout != "coco":
        raise UserError(f"--things-only applies to COCO-Stuff only, not to {data}")
    if layout == "scenes":
        return labelled_scenes(split, scenes)
    return _first_pair_checked(LAYOUTS[layout](root, split, things_only))


def labelled_scenes(split: Split, length: int) -> AttributeLabels:
    """Scenes whose classes are the ground, the shapes and the colours."""
    scenes = CachedScenes(split=split, length=length)
    return AttributeLabels(scenes, scenes.config.attributes, scenes.config.attribute_table())


def _layout_and_root(data: str) -> tuple[str, Path]:
    if data == "scenes":
        return data, Path()
    layout, _, path = data.partition(":")
    named = bool(path) and layout in LAYOUTS
    root = Path(path if named else data).expanduser()
    if not root.is_dir():
        problem = f"{root} is a file" if root.exists() else f"there is no folder {root}"
        raise UserError(f"{problem}; --data takes scenes or a folder{did_you_mean(data, ['scenes'])}")
    return (layout if named else _recognised(root)), root


def _recognised(root: Path) -> str:
    """The layout of a folder.

    Raises:
        UserError: The layout is not known.
    """
    layout = _layout(root)
    if layout:
        return layout
    inside = [p.name for p in sorted(root.iterdir()) if p.is_dir() and _layout(p)]
    raise UserError(
        f"{root} has no known layout of labelled data; it needs images/, masks/ and classes.json, or COCO-Stuff's "
        "images/train2017 or images/val2017, or ADE20k's images/training or "
        f"images/validation{f'; did you mean {root / inside[0]}?' if inside else ''}"
    )


def _layout(root: Path) -> str | None:
    def any_of(*names: str) -> bool:
        return any((root / name).exists() for name in names)

    if any_of("classes.json", "masks"):
        return "folder"
    if any_of("images/training", "images/validation"):
        return "ade20k"
    parts = ("train2017", "val2017")
    if any_of("stuffthingmaps", *(place.format(part=part) for part in parts for place in COCO_IMAGES)):
        return "coco"
    return None


def _folder(root: Path, split: str, things_only: bool) -> FolderSegmentation:
    part = "val" if split == "test" else split
    found = sorted(path for path in root.glob(f"images/{part}*") if path.is_dir())
    if not found:
        raise UserError(f"{root} has no images/{part}*; it needs images/, masks/ and classes.json")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{root / 'images'} has several folders for {part}: {names}; keep one")
    masks = _existing(root, (f"masks/{found[0].name}",), "label maps")
    return FolderSegmentation(found[0], masks, class_table(root / "classes.json"))


def _coco(root: Path, split: str, things_only: bool) -> FolderSegmentation:
    part = COCO_PARTS[split]
    images = _existing(root, [place.format(part=part) for place in COCO_IMAGES], "COCO images")
    places = [place.format(part=part) for place in COCO_MAPS]
    if images == root / part and not any(name.lower().endswith(MAP_SUFFIX) for name in os.listdir(images)):
        places.remove(part)  # the folder holds photographs only
    maps = _existing(root, places, "COCO-Stuff pixel maps")
    return FolderSegmentation(images, maps, coco_stuff(things_only=things_only), kind="coco-stuff")


def _ade20k(root: Path, split: str, things_only: bool) -> FolderSegmentation:
    part = ADE20K_PARTS[split]
    images = _existing(root, (f"images/{part}",), "ADE20k images")
    maps = _existing(root, (f"annotations/{part}",), "ADE20k label maps")
    info = root / "objectInfo150.txt"
    return FolderSegmentation(images, maps, ade20k(info if info.exists() else None), kind="ade20k")


LAYOUTS: dict[str, Callable[[Path, str, bool], FolderSegmentation]] = {
    "folder": _folder,
    "coco": _coco,
    "ade20k": _ade20k,
}
"""Layout name -> function that opens a split of a folder."""


def _existing(root: Path, places: Sequence[str], content: str) -> Path:
    """The first of the places in ``root`` that is a folder."""
    for place in places:
        if (root / place).is_dir():
            return root / place
    raise UserError(f"no {content} in {root}: there is no folder {' or '.join(places)}")


def _first_pair_checked(source: FolderSegmentation) -> FolderSegmentation:
    try:
        source.load_labelled(0)
    except UnreadableImage as error:
        raise UserError(f"cannot read the image {source.images_dir / error.name}: {error.reason}") from None
    return source
