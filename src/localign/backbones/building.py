"""Build timm models from names and arguments that may come from somebody else's file."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_model_config_from_hf
from timm.models.naflexvit import NaFlexVitCfg
from torch import nn

from localign.backbones.backbone import FAMILIES, Backbone, check_divisible
from localign.backbones.quiet import quiet_hub
from localign.errors import UserError
from localign.portable.native_localign_vlm import resample_positions
from localign.text.printing import first_line, printable
from localign.text.reading import read_json_object

LOCAL = "local-dir:"
REMOTE = ("hf-hub:", "hf_hub:", LOCAL)
"""Beginnings of names that timm resolves itself; only the user may give them, never a file."""
_SOURCES = ("state_dict", "custom_load", "checkpoint_path", "pretrained_cfg_overlay")
"""Keys of timm's configs that name other weights than the folder's; timm overrides addresses itself."""
_PLACED = {"self", "num_classes", "device", "dtype"}
NORM_EPS_ARGUMENT = "norm_eps"
"""An argument beside timm's own: the epsilon of every LayerNorm. timm has no argument for it that JSON can hold."""
ARGUMENTS = frozenset(
    name for family in FAMILIES for name in inspect.signature(family.__init__).parameters
) - _PLACED | {NORM_EPS_ARGUMENT}  # fmt: skip
"""Arguments of the constructors. timm's factory has more, such as paths of pickles and addresses of weights."""
NAFLEX_NAME = "naflexvit"
_NAFLEX = {field.name for field in fields(NaFlexVitCfg)}
MAX_NUMBER = 2**16
"""The largest side, width or count that an argument may have; a ViT of 22 billion parameters has 2**12 and 2**14."""
MAX_DEPTH = 1024


def check_arguments(arguments: Mapping[str, Any], where: object, architecture: str = "") -> None:
    """Check the names and sizes of a timm constructor's arguments.

    Args:
        arguments: Name -> value.
        where: Named in errors.
        architecture: timm's name; NaFlex models take arguments of their own.

    Raises:
        UserError: An argument is not one of :data:`ARGUMENTS`, or a number is absurd.
    """
    known = ARGUMENTS | _NAFLEX if architecture.startswith(NAFLEX_NAME) else ARGUMENTS
    for name in arguments:
        if name not in known:
            raise UserError(
                f"{printable(where)}: the argument {printable(name)!r} is not one of a ViT's: "
                f"{', '.join(sorted(known))}"
            )
    check_numbers(arguments, where)


def check_numbers(arguments: Mapping[str, Any], where: object) -> None:
    """Check the sizes of a network that a file describes.

    Raises:
        UserError: A number is absurd.
    """
    for name, value in arguments.items():
        most = MAX_DEPTH if name == "depth" else MAX_NUMBER
        for number in _numbers(value):
            if not abs(number) <= most:  # not finite, too
                raise UserError(f"{printable(where)}: {name} is {number:g}; at most {most:,} is possible")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float):
        yield min(max(value, -(2**63)), 2**63)  # a larger integer cannot be formatted as a float
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)


def build_vit(architecture: str, arguments: Mapping[str, Any], *, pretrained: bool) -> Any:
    """Build a timm model without a classifier.

    Args:
        architecture: timm's name of a model.
        arguments: Further arguments of timm's constructor, and ``norm_eps``.
        pretrained: Load timm's weights.

    Raises:
        UserError: timm does not accept an argument, the weights need more memory than there is, or cannot be
            downloaded.
    """
    check_arguments(arguments, architecture, architecture)
    arguments = dict(arguments)
    norm_eps = arguments.pop(NORM_EPS_ARGUMENT, None)
    if architecture.startswith(LOCAL):
        _check_local_folder(Path(architecture.removeprefix(LOCAL)))
    try:
        if arguments and not architecture.startswith(REMOTE):
            _check_memory(architecture, arguments)
        with quiet_hub():
            vit = timm.create_model(architecture, pretrained=pretrained, num_classes=0, **arguments)
    except UserError:
        raise
    except TypeError as error:
        raise UserError(f"{architecture}: {error}") from error
    except AssertionError as error:
        raise UserError(f"{architecture} with {dict(arguments)}: {error}") from error
    except Exception as error:
        reason = first_line(error)
        if architecture.startswith(REMOTE):
            raise UserError(f"{architecture} cannot be downloaded or built: {reason}") from error
        if not pretrained and arguments:
            raise UserError(f"{architecture} with {dict(arguments)} cannot be built: {reason}") from error
        if not pretrained:
            raise
        raise UserError(
            f"the weights of {architecture} cannot be downloaded ({reason}); "
            "give a file with --weights FILE, or --weights none for random weights"
        ) from error
    if norm_eps is not None:
        for module in vit.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = float(norm_eps)
    return vit


def image_sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, pixels, of a size that may be the side of a square.

    Raises:
        UserError: The size is not one or two positive numbers, or absurd.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(0 < side <= MAX_NUMBER for side in sides):
        raise UserError(
            f"--image-size takes a side or HEIGHTxWIDTH, 1..{MAX_NUMBER:,} pixels, not {size!s:.60}"
        )
    return sides[0], sides[1]


def set_image_size(backbone: Backbone, size: int | Sequence[int]) -> Backbone:
    """Change the size of a backbone's input, in place.

    Position embeddings are resampled as the library of the weights does it, see
    :data:`~localign.portable.native_localign_vlm.PositionInterpolation`; those of prefix tokens stay. Rotary and
    relative positions follow the new grid. The backbone's own size changes nothing.

    Args:
        backbone: Changed.
        size: Side, or height and width, pixels.

    Raises:
        UserError: The size is not a multiple of the patch size, or more positions than fit in memory.
    """
    sides = image_sides(size)
    if sides == backbone.image_size:
        return backbone
    check_divisible(sides, backbone.patch_size, backbone.name)
    rows, columns = (pixels // patch for pixels, patch in zip(sides, backbone.patch_size, strict=True))
    if 4 * rows * columns * backbone.width > machine_memory():
        raise UserError(f"{rows} x {columns} patches of {backbone.name} do not fit in this machine's memory")
    try:
        with torch.no_grad():
            _set_input_size(backbone, sides)
    except RuntimeError as error:
        raise UserError(
            f"{backbone.name} cannot take images of {sides[0]} x {sides[1]} pixels: {first_line(error)}"
        ) from None
    backbone.model_kwargs["img_size"] = sides[0] if sides[0] == sides[1] else sides
    return backbone


def _set_input_size(backbone: Backbone, sides: tuple[int, int]) -> None:
    vit, grid, before = backbone.vit, backbone.grid, getattr(backbone.vit, "pos_embed", None)
    vit.set_input_size(img_size=sides)
    if (
        backbone.position_interpolation != "bicubic" and before is not None
    ):  # timm's method knows bicubic only
        positions = resample_positions(before, backbone.grid, grid, backbone.position_interpolation)
        vit.pos_embed = nn.Parameter(positions, requires_grad=before.requires_grad)


def build_described_vit(architecture: Any, arguments: Any, where: object) -> Any:
    """Build a timm model that a file describes, with random weights. Nothing is downloaded and no other file is read.

    Args:
        architecture: As in the file.
        arguments: As in the file.
        where: The file, named in errors.

    Raises:
        UserError: The architecture is not one of timm's own names, or as for :func:`build_vit`.
    """
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise UserError(
            f"{printable(where)} describes a model that cannot be built: timm has no {printable(architecture)!r:.80}"
        )
    if not isinstance(arguments, Mapping):
        raise UserError(f"{printable(where)}: the model's arguments are no object")
    check_arguments(arguments, where)
    lists = {name: tuple(v) if isinstance(v, list) else v for name, v in arguments.items()}
    return build_vit(architecture, lists, pretrained=False)


def remote_config(architecture: str) -> Mapping[str, Any]:
    """What a folder or repository in timm's format states about its input, without timm's defaults.

    Args:
        architecture: A name that timm has just resolved, so that its config lies on this machine.
    """
    kind, _, place = architecture.partition(":")
    if f"{kind}:" == LOCAL:
        config = read_json_object(Path(place) / "config.json")
        details = config.get("pretrained_cfg", config)
        return details if isinstance(details, dict) else {}
    with quiet_hub():
        return dict(load_model_config_from_hf(place)[0])


def _check_local_folder(folder: Path) -> None:
    """Check what a folder in timm's format says before timm reads it.

    Raises:
        UserError: The config cannot be read, or names a model or arguments that no ViT of timm's has.
    """
    path = folder / "config.json"
    if not path.is_file():
        return  # timm says so
    config = read_json_object(path)
    details = config.get("pretrained_cfg", config)
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise UserError(f"{printable(path)}: timm has no model {printable(architecture)!r:.80}")
    for part, name in ((config.get("model_args") or {}, "model_args"), (details, "pretrained_cfg")):
        if not isinstance(part, dict):
            raise UserError(f"{printable(path)}: {name} is no object")
    arguments = {name: v for name, v in (config.get("model_args") or {}).items() if name != "num_classes"}
    check_arguments(arguments, path, architecture)
    if named := [name for name in _SOURCES if details.get(name)]:
        raise UserError(f"{printable(path)}: weights from elsewhere ({', '.join(named)}) are not followed")


def _check_memory(architecture: str, arguments: Mapping[str, Any]) -> None:
    with torch.device("meta"):
        vit = timm.create_model(architecture, num_classes=0, **arguments)
    needed = sum(tensor.nbytes for tensor in (*vit.parameters(), *vit.buffers()))
    if needed > (memory := machine_memory()):
        raise UserError(
            f"{architecture} with {dict(arguments)} needs {needed / 2**30:,.1f} GiB for its weights; "
            f"this machine has {memory / 2**30:,.1f} GiB"
        )


def machine_memory() -> float:
    """Bytes of this machine's memory; infinite where the operating system does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf
