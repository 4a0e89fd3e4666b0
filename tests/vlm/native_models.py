"""Vision-language models of native resolution, and images of several aspect ratios, shared by several test files."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from tiny_vlm import TEXT_WIDTH, tiny_llm, tiny_tokenizer
from torch import nn
from transformers import PreTrainedTokenizerBase
from vlm_models import picture, sides

from localign.backbones import Backbone, create_backbone
from localign.vlm import LocalignVLM
from localign.vlm.model.presets import VisionSource, build_vision

MOST = 6
"""Budget of patches; the tiny towers' own grid has 2 x 2."""
SHAPES = ((24, 24), (60, 20), (10, 40), (31, 29), (90, 6), (40, 30))
"""Widths and heights."""


def native_vlm(
    kind: Any = "mlp",
    sources: list[VisionSource] | None = None,
    max_patches: int | None = MOST,
    llm: str = "llama",
    **options: Any,
) -> tuple[LocalignVLM, PreTrainedTokenizerBase]:
    """A random model in eval mode whose adapter is far from zero, and its tokenizer."""
    tower, adapter = build_vision(kind, sources or sides(kind), TEXT_WIDTH, seed=4)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))
    tokenizer = tiny_tokenizer(pad=True, bos=llm == "llama")
    model = LocalignVLM.from_parts(
        tower, adapter, tiny_llm(llm), tokenizer, max_patches=max_patches, **options
    )
    return model.eval(), tokenizer  # type: ignore[no-untyped-call]


def naflex_backbone() -> Backbone:
    """A NaFlexVit with random weights on a 2 x 2 grid of 8-pixel patches."""
    arguments = {
        "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "pos_embed_grid_size": (2, 2)
    }  # fmt: skip
    backbone = create_backbone("naflexvit_base_patch16_siglip", weights="none", model_kwargs=arguments)
    torch.manual_seed(6)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    return backbone.eval()


def pictures(shapes: tuple[tuple[int, int], ...] = SHAPES) -> list[Image.Image]:
    return [picture(number, shape) for number, shape in enumerate(shapes)]
