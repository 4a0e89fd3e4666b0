"""Adapters initialised from trained weights: an alignment's decoder, or the last blocks of the ViT."""

from __future__ import annotations

from dataclasses import replace

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from localign.alignment.student import Decoder, DecoderConfig, Student
from localign.backbones import Backbone
from localign.errors import UserError
from localign.vlm.model.adapters import (
    Adapter,
    AdapterConfig,
    DecoderAdapter,
    FusedDecoderAdapter,
    TruncatedAdapter,
    build_adapter,
    describe_tokens,
    final_norm,
)
from localign.vlm.model.vision import TowerConfig, VisionTower

TRUNCATED_BLOCKS = 2
"""ViT blocks in a truncated adapter."""


def adapter_from_student(student: Student, output_width: int, *, published_quirks: bool = False) -> Adapter:
    """The ``decoder`` adapter of an alignment, with copied weights and a zero output layer.

    The input projection is the encoder's linear head; position embedding, blocks and norm are the decoder's.

    Args:
        student: The alignment's encoder and decoder.
        output_width: Width of the language model.
        published_quirks: Give the blocks exact GELU, as the published code does, instead of the activation that
            alignment trained them with (the backbone's; quick GELU in CLIP).

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
    """The ``fused-decoder`` adapter: the decoder's weights are copied, the MLP starts from scratch.

    Args:
        student: The alignment's student, for the tower's one backbone whose final norm is applied.
        tower: A tower of several backbones.
        output_width: Width of the language model.
        seed: Seed of the MLP's random weights.
        published_quirks: As in :func:`adapter_from_student`.

    Raises:
        UserError: The tower has fewer than two backbones or not exactly one aligned backbone, or the decoder
            belongs to another backbone.
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
    """Raise a UserError that names both unless the student's decoder takes this backbone's tokens."""
    decoder = _decoder_of(student)
    source = student.encoder.backbone
    expected = (student.encoder.head.in_features, decoder.config.num_tokens, source.num_prefix_tokens)
    prefix = backbone.num_prefix_tokens
    actual = (backbone.width, prefix + backbone.num_patches, prefix)
    if expected != actual:
        raise UserError(
            f"the decoder trained with {source.name} ({describe_tokens(*expected)}) "
            f"does not fit {backbone.name} ({describe_tokens(*actual)})"
        )


def _decoder_of(student: Student) -> Decoder:
    if student.decoder is None:
        raise UserError(
            f"{student.encoder.backbone.name} was aligned without a decoder, so there is none for the adapter"
        )
    return student.decoder


def _decoder_config(student: Student, output_width: int, published_quirks: bool) -> DecoderConfig:
    config = replace(_decoder_of(student).config, output_width=output_width)
    return replace(config, activation="GELU") if published_quirks else config


def _with_decoder_weights(config: AdapterConfig, student: Student, seed: int) -> Adapter:
    with torch.device(student.encoder.head.weight.device):  # perhaps the meta device
        adapter = build_adapter(config, seed)
    assert isinstance(adapter, DecoderAdapter | FusedDecoderAdapter)
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
        backbone: The complete ViT; the tower in front of the adapter ends before the copied blocks.
        output_width: Width of the language model.
        published_quirks: Leave out the last block and the norm, and copy the two blocks before, as the published
            code does for a baseline.

    Raises:
        UserError: The ViT's blocks take more than tokens (EVA and BEiT), or it has too few blocks.
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
            f"the truncated adapter leaves no block for the tower: {backbone.name} has {backbone.depth} blocks"
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
        adapter = build_adapter(config)
    assert isinstance(adapter, TruncatedAdapter)
    adapter.blocks.load_state_dict(nn.Sequential(*backbone.vit.blocks[start:end]).state_dict())
    if not published_quirks:
        adapter.norm.load_state_dict(final_norm(backbone).state_dict())
    return adapter
