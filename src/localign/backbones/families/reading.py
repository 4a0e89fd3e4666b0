"""Reads a vision transformer from a folder or hub repository in transformers' format.

The folder may hold the vision model alone, a model of images and text, or a vision-language model such as LLaVA whose
``vision_config`` describes one of the families.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from localign.backbones.backbone import Backbone
from localign.backbones.building import build_vit
from localign.backbones.families import TRANSFORMERS_FAMILIES, TransformersFamily
from localign.backbones.formats import check_format
from localign.backbones.preprocessing import Preprocessing
from localign.backbones.weights import StateDict, read_file
from localign.errors import UserError
from localign.options.names import AttentionBackend
from localign.text.printing import printable
from localign.text.reading import read_json_object
from localign.weights import check_finite, load_strict, pixel_statistics

CONFIG_FILE, PREPROCESSOR_FILE = "config.json", "preprocessor_config.json"
_WEIGHTS, _TORCH_WEIGHTS = "model.safetensors", "pytorch_model.bin"
_INDEX = ".index.json"


@dataclass(frozen=True)
class VisionFolder:
    """A folder whose vision model one of the families describes."""

    folder: Path
    family: TransformersFamily
    config: Mapping[str, Any]
    """The vision model's own part of ``config.json``."""


def is_of_transformers(content: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` has a ``model_type``, and is not one of localign's or timm's."""
    return "model_type" in content and not {"localign", "architecture"} & content.keys()


def describe(folder: Path, content: Mapping[str, Any]) -> VisionFolder:
    """Find the family of a folder.

    Args:
        folder: Named in errors.
        content: The folder's ``config.json``.

    Raises:
        UserError: The folder holds another architecture; the line names it, and the families that can be read.
    """
    inner = content.get("vision_config")
    for config in (content, inner if isinstance(inner, dict) else {}):
        for family in TRANSFORMERS_FAMILIES.values():
            if config.get("model_type") in family.model_types:
                return VisionFolder(folder, family, config)
    for family in TRANSFORMERS_FAMILIES.values():
        if content.get("model_type") in family.wrappers and isinstance(inner, dict):
            return VisionFolder(folder, family, {"model_type": family.model_types[0], **inner})
    kind = content.get("model_type")
    within = f", its vision model a {inner.get('model_type')!r:.40}" if isinstance(inner, dict) else ""
    named = content.get("mm_vision_tower")
    hint = f"; its vision model is {printable(named)}: give that" if isinstance(named, str) else ""
    known = ", ".join(kind for family in TRANSFORMERS_FAMILIES.values() for kind in family.model_types)
    raise UserError(
        f"{printable(folder)} holds a {kind!r:.40}{within}{hint}; vision models that can be read: {known}"
    )


def load_transformers_backbone(
    folder: Path,
    content: Mapping[str, Any],
    *,
    name: str,
    model_kwargs: Mapping[str, Any] | None = None,
    attention: AttentionBackend = "auto",
    weights: bool = True,
) -> Backbone:
    """Read the vision model of a folder as a backbone.

    Args:
        folder: The folder.
        content: Its ``config.json``.
        name: The name in reports.
        model_kwargs: Further arguments of timm's constructor.
        attention: Back-end of soft-capped attention, if the backbone gets it.
        weights: False leaves the weights random.

    Returns:
        The backbone in eval mode, float32. Its hidden states are transformers' own.

    Raises:
        UserError: The folder holds another architecture, is incomplete, or its tensors do not fit or are not finite.
    """
    found = describe(folder, content)
    try:
        architecture, kwargs = found.family.architecture(found.config)
    except UserError as error:
        raise UserError(f"{printable(folder)}: {error}") from None
    kwargs |= dict(model_kwargs or {})
    vit = build_vit(architecture, kwargs, pretrained=False)
    if weights:
        shapes = {k: v.shape for k, v in vit.state_dict().items()}
        state = found.family.to_timm(read_tensors(folder, found.family.anchor), found.config, shapes)
        for key, value in vit.state_dict().items():
            if key.endswith(".k_bias"):  # a constant of timm's
                state.setdefault(key, value)
        load_strict(vit, state, folder)
        check_finite(vit.state_dict(), folder)
    mean, std, preprocessing = _preprocessing(folder, found.family)
    return Backbone(
        vit,
        name=name,
        architecture=architecture,
        model_kwargs=kwargs,
        mean=mean,
        std=std,
        attention=attention,
        preprocessing=preprocessing,
        position_interpolation=found.family.interpolation(found.config),
    ).eval()


def stated_size(folder: Path) -> tuple[int, int] | None:
    """Height and width, pixels, of the images that the folder's image processor gives; None where it does not say.

    They may differ from the size of the position embedding: DINOv2's has 518 pixels, its processor gives 224.
    """
    content = _image_processor(folder)
    size = content.get("crop_size" if content.get("do_center_crop") else "size")
    sides = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
    height, width = (s if isinstance(s, int) and not isinstance(s, bool) and s > 0 else None for s in sides)
    return None if height is None or width is None else (height, width)


def _preprocessing(
    folder: Path, family: TransformersFamily
) -> tuple[tuple[float, ...], tuple[float, ...], Preprocessing]:
    """Mean and standard deviation per channel from ``preprocessor_config.json``, else the family's, and resizing."""
    path, content = folder / PREPROCESSOR_FILE, _image_processor(folder)
    mean, std = content.get("image_mean", family.mean), content.get("image_std", family.std)
    where = f"image_mean and image_std in {path}"
    preprocessing = Preprocessing.of_transformers(content, path)
    return pixel_statistics(mean, "mean", where), pixel_statistics(std, "std", where), preprocessing


def _image_processor(folder: Path) -> Mapping[str, Any]:
    """The content of ``preprocessor_config.json``; {} where there is none."""
    path = folder / PREPROCESSOR_FILE
    content = read_json_object(path) if path.is_file() else {}
    inner = content.get("image_processor", content)
    if not isinstance(inner, dict):
        raise UserError(f"{printable(path)}: image_processor is no object")
    return inner


def read_tensors(folder: Path, anchor: str) -> StateDict:
    """The tensors of the vision model, without the prefix that they have in a larger model.

    Args:
        folder: Holds ``model.safetensors``, its sharded form with an index, or ``pytorch_model.bin``.
        anchor: A name that exactly one tensor ends with; the text before it is the prefix.

    Raises:
        UserError: There is no weight file, a shard is missing or damaged, or no tensor has the anchor.
    """
    files = _weight_files(folder)
    names: dict[str, Path] = {}
    tensors: StateDict = {}
    for file in files:
        if file.suffix == ".safetensors":
            with _opened(file) as content:
                names.update(dict.fromkeys(content.keys(), file))
        else:
            tensors.update(read_file(file))
            names.update(dict.fromkeys(tensors, file))
    prefixes = {name.removesuffix(anchor) for name in names if name.endswith(anchor)}
    prefixes = {p for p in prefixes if not p or p.endswith(".")}
    if len(prefixes) != 1:
        problem = "several vision models" if prefixes else f"no tensor {anchor}"
        raise UserError(
            f"{printable(folder)} has {problem}; its weights are not of the model that config.json describes"
        )
    prefix = prefixes.pop()
    wanted = {name: file for name, file in names.items() if name.startswith(prefix)}
    for file in {f for f in wanted.values() if f.suffix == ".safetensors"}:
        with _opened(file) as content:
            tensors.update({n: content.get_tensor(n) for n, place in wanted.items() if place == file})
    return {name.removeprefix(prefix): tensors[name] for name in wanted}


def _weight_files(folder: Path) -> list[Path]:
    for name in (_WEIGHTS, _TORCH_WEIGHTS):
        if (index := folder / f"{name}{_INDEX}").is_file():
            shards = read_json_object(index).get("weight_map")
            if not isinstance(shards, dict) or not all(
                isinstance(s, str) and Path(s).name == s for s in shards.values()
            ):
                raise UserError(f"{printable(index)} has no weight_map of file names in the same folder")
            files = [folder / str(shard) for shard in sorted(set(shards.values()))]
            if missing := [file.name for file in files if not file.is_file()]:
                raise UserError(
                    f"{printable(folder)} lacks {len(missing)} weight files, such as {printable(missing[0])}"
                )
            return files
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(f"{printable(folder)} has no {_WEIGHTS} or {_TORCH_WEIGHTS}")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file whose tensors are read one by one. Raises UserError."""
    check_format(file)
    try:
        with safe_open(file, "pt") as content:
            yield content
    except (SafetensorError, OSError) as error:
        raise UserError(f"{printable(file)} is not a readable safetensors file: {printable(error)}") from None
