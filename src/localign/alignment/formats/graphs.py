"""Exports as computation graphs: ONNX, and torch.export. They run without localign, timm and transformers."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localign.alignment.formats.transformers import EXACT, check_difference, comparison_images
from localign.backbones import Backbone
from localign.backbones.attention import fuse_attention
from localign.backbones.export import CONFIG_FILE, OTHER_FILES, PREPROCESSOR_FILE, WEIGHTS_FILE
from localign.backbones.families.parity import relative_difference
from localign.errors import UserError
from localign.files import refilling_folder
from localign.files.output import PROVENANCE_KEY
from localign.options.export import ExportConfig
from localign.text.printing import first_line

INPUT, OUTPUT = "pixel_values", "last_hidden_state"
FILES = {"onnx": "model.onnx", "torch-export": "model.pt2"}
"""Format -> file."""
_STALE = (*OTHER_FILES, WEIGHTS_FILE, PREPROCESSOR_FILE)
_INLINE_BYTES = 1.5 * 2**30
"""Weights above this go to a file of their own: an ONNX file holds at most 2 GiB."""

Run = Callable[[Tensor], Tensor]


def export_graph(backbone: Backbone, config: ExportConfig, provenance: dict[str, Any]) -> float:
    """Write a graph from normalised images to tokens, read it again, and measure how far its tokens are.

    The graph takes any number of images of the backbone's size. ``config.json`` says how to prepare them.

    Args:
        backbone: In eval mode on the CPU.
        config: Options of the export.
        provenance: Stored in ``config.json``.

    Returns:
        The largest difference, divided by the root mean square of the tokens.

    Raises:
        UserError: A package is missing, or the difference is above the tolerance; then nothing is written.
    """
    backbone = backbone.copy(attention="eager")  # FlexAttention is no operation of a graph
    fuse_attention(backbone, torch.device("cpu"))  # the converter to ONNX does not take the fused one
    tolerance = EXACT if config.tolerance is None else config.tolerance
    write, read = (_write_onnx, _read_onnx) if config.format == "onnx" else (_write_torch, _read_torch)
    with refilling_folder(config.out, _STALE, CONFIG_FILE) as folder:
        file = folder / FILES[config.format]
        with _quiet():
            try:
                write(backbone, file)
            except UserError:
                raise
            except Exception as error:  # the exporters raise errors of many kinds, with pages of text
                reason = first_line(error)
                raise UserError(f"{backbone.name} cannot be exported as {config.format}: {reason}") from error
            difference = _difference(backbone, read(file), comparison_images(config, backbone))
        check_difference(difference, tolerance, backbone, config)
        facts = {
            "format": config.format,
            "file": file.name,
            **_description(backbone),
            PROVENANCE_KEY: provenance,
        }
        (folder / CONFIG_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return difference


def _description(backbone: Backbone) -> dict[str, Any]:
    height, width = backbone.image_size
    tokens = backbone.num_prefix_tokens + backbone.num_patches
    return {
        "input": {
            "name": INPUT,
            "shape": ["batch", 3, height, width],
            "mean": list(backbone.mean),
            "std": list(backbone.std),
        },
        "output": {"name": OUTPUT, "shape": ["batch", tokens, backbone.width]},
        "num_prefix_tokens": backbone.num_prefix_tokens,
        "grid": list(backbone.grid),
    }


def _example(backbone: Backbone) -> tuple[Tensor, Any]:
    """Images, and which of their dimensions are open. With one image, torch would take the number for a constant."""
    return torch.zeros(2, 3, *backbone.image_size), ({0: torch.export.Dim("batch")},)


def _write_torch(backbone: Backbone, file: Path) -> None:
    images, dynamic = _example(backbone)
    torch.export.save(torch.export.export(backbone, (images,), dynamic_shapes=dynamic), file)


def _read_torch(file: Path) -> Run:
    module: Any = torch.export.load(file).module()
    return lambda images: module(images)


def _write_onnx(backbone: Backbone, file: Path) -> None:
    _require_onnx()
    images, dynamic = _example(backbone)
    program: Any = torch.onnx.export(
        backbone,
        (images,),
        dynamo=True,
        dynamic_shapes=dynamic,
        input_names=[INPUT],
        output_names=[OUTPUT],
        verbose=False,
    )
    size = sum(parameter.nbytes for parameter in backbone.parameters())
    program.save(file, external_data=size > _INLINE_BYTES)


def _read_onnx(file: Path) -> Run:
    onnxruntime: Any = import_module("onnxruntime")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _require_onnx() -> None:
    try:
        for package in ("onnxscript", "onnxruntime"):
            import_module(package)
    except ImportError:
        raise UserError(
            "--format onnx needs the packages onnxscript and onnxruntime: pip install 'localign[onnx]'"
        ) from None


@torch.no_grad()
def _difference(backbone: Backbone, run: Run, images: Tensor) -> float:
    """Compare batches of eight images and, for the open batch size, of one."""
    pixels = (backbone.normalise(some) for some in (*images.split(8), images[:1]))
    return relative_difference((backbone.tokens(some), run(some)) for some in pixels)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' own lines; what is wrong is an exception."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
