"""Adapters that start from trained weights: an alignment's decoder, or the last blocks of the ViT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from localign.alignment.student import Decoder, DecoderConfig, Student
from localign.backbones import Backbone
from localign.errors import UserError
from localign.vlm.model.adapters import Adapter, AdapterConfig, build_adapter, describe_tokens, final_norm
from localign.vlm.model.vision import TowerConfig, VisionTower

TRUNCATED_BLOCKS = 2
"""Blocks of the ViT that a truncated adapter takes over."""


def adapter_from_student(student: Student, output_width: int, *, published_quirks: bool = False) -> Adapter:
    """The ``decoder`` adapter of an alignment; its weights are copied, its output layer is zero.

    The input projection is the encoder's linear head; position embedding, blocks and norm are the decoder's.

    Args:
        student: Encoder and decoder.
        output_width: Width of the language model.
        published_quirks: Rebuild the blocks with exact GELU, as the published code does, where alignment
            trained them with the backbone's activation (quick GELU in CLIP). Without it they keep theirs.

    Raises:
        UserError: The student has no decoder.
    """
    decoder = _decoder_config(student, output_width, published_quirks)
    config = AdapterConfig(
        kind="decoder",
        input_width=student.encoder.backbone.width,
        output_width=output_width,
        num_tokens=decoder.num_tokens,
        num_prefix_tokens=student.num_prefix_tokens,
        decoder=decoder,
    )
    return _with_decoder_weights(config, student, seed=0)


def fused_adapter_from_student(
    student: Student, tower: VisionTower, output_width: int, *, seed: int = 0, published_quirks: bool = False
) -> Adapter:
    """The ``fused-decoder`` adapter: the decoder's weights are copied, the MLP starts at random.

    Args:
        student: The alignment of the one backbone of the tower whose final norm is applied.
        tower: Several backbones.
        output_width: Width of the language model.
        seed: Key of the MLP's start.
        published_quirks: As :func:`adapter_from_student`.

    Raises:
        UserError: The tower has one backbone alone, or not exactly one aligned one, or the decoder belongs to
            another backbone.
    """
    aligned = [i for i, config in enumerate(tower.configs) if config.norm]
    if len(tower.configs) < 2 or len(aligned) != 1:
        raise UserError(
            f"the fused-decoder adapter takes one aligned backbone and at least one other, not {tower.name}"
        )
    widths = [backbone.width for backbone in tower.backbones]
    start = sum(widths[: aligned[0]])
    check_decoder_fits(student, tower.backbones[aligned[0]])
    width = _decoder_of(student).config.width
    config = AdapterConfig(
        kind="fused-decoder",
        input_width=tower.width,
        output_width=output_width,
        num_tokens=tower.num_tokens,
        decoder=_decoder_config(student, width, published_quirks),
        decoder_channels=(start, start + widths[aligned[0]]),
    )
    return _with_decoder_weights(config, student, seed)


def check_decoder_fits(student: Student, backbone: Backbone) -> None:
    """Raise a UserError, naming both, unless the student's decoder takes this backbone's tokens."""
    decoder = _decoder_of(student)
    source = student.encoder.backbone
    wanted = (student.encoder.head.in_features, decoder.config.num_tokens, source.num_prefix_tokens)
    prefix = backbone.num_prefix_tokens
    given = (backbone.width, prefix + backbone.num_patches, prefix)
    if wanted != given:
        raise UserError(
            f"the decoder trained with {source.name} ({describe_tokens(*wanted)}) "
            f"does not fit {backbone.name} ({describe_tokens(*given)})"
        )


def _decoder_of(student: Student) -> Decoder:
    if student.decoder is None:
        raise UserError(
            f"{student.encoder.backbone.name} was aligned without a decoder; there is no adapter in it"
        )
    return student.decoder


def _decoder_config(student: Student, output_width: int, published_quirks: bool) -> DecoderConfig:
    config = replace(_decoder_of(student).config, output_width=output_width)
    return replace(config, activation="GELU") if published_quirks else config


def _with_decoder_weights(config: AdapterConfig, student: Student, seed: int) -> Adapter:
    # A student on the meta device gives an adapter there.
    with torch.device(student.encoder.head.weight.device):
        adapter: Any = build_adapter(config, seed)
    adapter.in_proj.load_state_dict(student.encoder.head.state_dict())
    source, target = _decoder_of(student).state_dict(), adapter.decoder.state_dict()
    trunk = {k: v for k, v in source.items() if not k.startswith("head.")}
    head = {k: v for k, v in target.items() if k.startswith("head.")}
    adapter.decoder.load_state_dict(trunk | head)
    return adapter


def adapter_from_backbone(
    backbone: Backbone, output_width: int, *, published_quirks: bool = False
) -> Adapter:
    """The ``truncated`` adapter: a copy of the ViT's last two blocks and final norm, then a zero linear layer.

    Args:
        backbone: The whole ViT; the tower before the adapter ends where its blocks begin.
        output_width: Width of the language model.
        published_quirks: Take the two blocks before the last one and no norm, as the published code does for
            a baseline, which loses the last block and the norm.

    Raises:
        UserError: Its blocks need more than tokens (EVA and BEiT), or there are too few.
    """
    if not isinstance(backbone.vit, VisionTransformer):
        raise UserError(
            f"the truncated adapter fits VisionTransformer backbones, not {backbone.name}, "
            f"which is a {type(backbone.vit).__name__}"
        )
    end = backbone.depth - int(published_quirks)
    start = end - TRUNCATED_BLOCKS
    if start < 1:
        raise UserError(
            f"the truncated adapter leaves nothing of {backbone.name}, which has {backbone.depth} blocks"
        )
    tower = TowerConfig.of(backbone, layer=TRUNCATED_BLOCKS - 1, norm=not published_quirks, keep_prefix=True)
    tower = replace(tower, model_kwargs={**tower.model_kwargs, "depth": TRUNCATED_BLOCKS})
    config = AdapterConfig(
        kind="truncated",
        input_width=backbone.width,
        output_width=output_width,
        num_tokens=backbone.num_prefix_tokens + backbone.num_patches,
        num_prefix_tokens=backbone.num_prefix_tokens,
        blocks=tower,
    )
    with torch.device(next(backbone.parameters()).device):
        adapter: Any = build_adapter(config)
    adapter.blocks.load_state_dict(nn.Sequential(*backbone.vit.blocks[start:end]).state_dict())
    if not published_quirks:
        adapter.norm.load_state_dict(final_norm(backbone).state_dict())
    return adapter
