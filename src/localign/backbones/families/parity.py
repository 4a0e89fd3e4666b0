"""Compares a backbone with the model that transformers loads from a folder."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localign.backbones.backbone import Backbone
from localign.errors import UserError
from localign.text.printing import first_line


@torch.no_grad()
def token_difference(backbone: Backbone, folder: Path, images: Tensor) -> float:
    """The largest difference of a token channel after the last block, before the last norm.

    Args:
        backbone: The backbone, in eval mode on the CPU.
        folder: A folder in transformers' format.
        images: uint8 ``(batch, 3, height, width)`` of the backbone's size.

    Returns:
        The difference divided by the root mean square of the backbone's tokens.

    Raises:
        UserError: transformers cannot load the folder.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # localign shows its own
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model: Any = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()
    except Exception as error:  # transformers raises errors of many kinds
        raise UserError(f"transformers cannot load {folder}: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    pixels = (backbone.normalise(some) for some in images.split(8))
    return relative_difference(
        (
            backbone.tokens(some, norm=False),
            _hidden_states(model, config.model_type, some, backbone.patch_size[0])[-1],
        )
        for some in pixels
    )


def relative_difference(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest difference between two models' values, divided by the root mean square of the first model's.

    Args:
        pairs: Values of both models, of one shape.
    """
    largest, squares, count = 0.0, 0.0, 0
    for ours, theirs in pairs:
        largest = max(largest, float((ours - theirs).abs().max()))
        squares += float(ours.double().pow(2).sum())
        count += ours.numel()
    return largest / max(math.sqrt(squares / count), 1e-12)


def _hidden_states(model: Any, model_type: str, pixels: Tensor, patch: int) -> tuple[Tensor, ...]:
    if model_type != "siglip2_vision_model":
        states: tuple[Tensor, ...] = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        return states
    # SigLIP 2 takes flattened patches, and the rows and columns of each image
    batch, _, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    flat = pixels.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 4, 5, 1)
    states = model(
        pixel_values=flat.reshape(batch, rows * columns, -1),
        pixel_attention_mask=torch.ones(batch, rows * columns, dtype=torch.bool),
        spatial_shapes=torch.tensor([[rows, columns]] * batch),
        output_hidden_states=True,
    ).hidden_states
    return states
