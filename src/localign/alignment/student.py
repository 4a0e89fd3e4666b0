"""The student: a trainable copy of the backbone as encoder, and a shallow decoder (section 3.2 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers.mlp import GluMlp, SwiGLU
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from localign.backbones import Backbone
from localign.backbones.building import set_image_size
from localign.backbones.native import (
    NativeImages,
    grid_positions,
    native_tokens,
    run_blocks,
)
from localign.errors import UserError
from localign.options.names import AttentionBackend
from localign.portable.native_localign_vlm import resample_positions

HeadStart = Literal["zero", "identity"]
NORM_EPS = 1e-5
"""Epsilon of every LayerNorm that alignment creates."""


@dataclass(frozen=True)
class DecoderConfig:
    """Everything needed to rebuild a decoder."""

    width: int
    """Channels of the decoder's tokens."""
    output_width: int
    """Channels of the teacher's tokens."""
    num_heads: int
    """Attention heads."""
    num_tokens: int
    """Prefix tokens plus patches."""
    depth: int = 2
    """Transformer blocks."""
    qkv_bias: bool = True
    """Whether queries, keys and values have a bias."""
    layer_scale: float | None = 1e-6
    """Initial LayerScale of both residual branches; None: no LayerScale."""
    activation: str = "GELU"
    """Class name of the MLPs' activation."""
    gated_width: int | None = None
    """Hidden channels of gated MLPs (SwiGLU); None: plain MLPs, four times as wide as the decoder."""
    gated_norm: bool = False
    """Whether gated MLPs have a norm before their last layer."""


class Encoder(nn.Module):
    """A ViT applied to the whole image, followed by a linear head.

    Args:
        backbone: A copy that this module owns.
        output_width: Channels of the decoder or, without a decoder, of the target.
        head: Initial weight of the head: zero or the identity.
    """

    def __init__(self, backbone: Backbone, output_width: int, head: HeadStart = "zero") -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.width, output_width)
        (nn.init.zeros_ if head == "zero" else nn.init.eye_)(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor | NativeImages) -> Tensor:
        """Normalised images, ``(batch, 3, height, width)`` or of several sizes, to ``(batch, tokens, width)``."""
        if isinstance(images, NativeImages):
            tokens = native_tokens(self.backbone, images)
        else:
            tokens = self.backbone.tokens(images)
        output: Tensor = self.head(tokens)
        return output


def prepare_backbone(backbone: Backbone) -> Backbone:
    """Remove pooling and replace the final norm by a new LayerNorm, in place.

    The replaced norm is the norm before pooling, or the norm after pooling if the ViT has no other. The new norm
    applies to every token.
    """
    vit = backbone.vit
    backbone.final_norm = "norm" if _has_weight(vit.norm) or not _has_weight(vit.fc_norm) else "fc_norm"
    if getattr(vit, "attn_pool", None) is not None:
        backbone.model_kwargs["global_pool"] = ""  # a rebuilt ViT must not have attention pooling
    vit.reset_classifier(0, "")
    setattr(vit, backbone.final_norm, nn.LayerNorm(backbone.width, eps=NORM_EPS))
    return backbone


def _has_weight(norm: nn.Module) -> bool:
    return any(True for _ in norm.parameters())


class Decoder(nn.Module):
    """Position embedding, pre-norm transformer blocks with ordinary attention, norm, linear layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        self.pos_embed = nn.Parameter(torch.randn(1, config.num_tokens, config.width) * 0.02)
        self.blocks = nn.Sequential(
            *(
                Block(
                    dim=config.width,
                    num_heads=config.num_heads,
                    qkv_bias=config.qkv_bias,
                    init_values=config.layer_scale,
                    norm_layer=DecoderNorm,
                    act_layer=activation_class(config.activation),
                    **gated_mlp(config.width, config.gated_width, config.gated_norm),
                )
                for _ in range(config.depth)
            )
        )
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.head = nn.Linear(config.width, config.output_width)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Masked embeddings ``(views, tokens, width)`` to reconstructions ``(views, tokens, output_width)``.

        Args:
            tokens: The embeddings.
            positions: Position embeddings of each view, ``(views, tokens, width)``; default :attr:`pos_embed`.
            mask: bool ``(views, 1, 1, tokens)``, True for tokens, False for padding; None without padding.
        """
        output: Tensor = self.head(self.features(tokens, positions, mask))
        return output

    def features(self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """As :meth:`forward`, before the last linear layer: ``(views, tokens, width)``."""
        x = tokens + (self.pos_embed if positions is None else positions)
        features: Tensor = self.norm(run_blocks(self.blocks, x, mask, self.grad_checkpointing))
        return features

    def resample(self, old: tuple[int, int], new: tuple[int, int]) -> None:
        """Resample the position embedding of the patches as timm does for encoders: bicubic, antialiased.

        Args:
            old: Rows and columns of patches now. Tokens beyond these are prefix tokens, whose positions stay.
            new: Rows and columns of patches from now on.
        """
        with torch.no_grad():
            positions = resample_positions(self.pos_embed, new, old, "bicubic")
        self.pos_embed = nn.Parameter(positions, requires_grad=self.pos_embed.requires_grad)
        self.config = replace(self.config, num_tokens=positions.shape[1])


class DecoderNorm(nn.LayerNorm):
    """LayerNorm with the epsilon of alignment instead of the default of torch or timm."""

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(width, eps=NORM_EPS, **kwargs)


def gated_mlp(width: int, gated_width: int | None, norm: bool) -> dict[str, Any]:
    """Arguments of timm's block for gated MLPs of ``gated_width`` hidden channels; none for plain MLPs."""
    if gated_width is None:
        return {}
    return {"mlp_layer": SwiGLU, "mlp_ratio": gated_width / width, "scale_mlp_norm": norm}


def activation_class(name: str) -> type[nn.Module]:
    """The activation class of this name in torch or timm.

    Raises:
        UserError: Neither library has it.
    """
    import timm.layers

    found: type[nn.Module] | None = getattr(nn, name, None) or getattr(timm.layers, name, None)
    if found is None:
        raise UserError(f"unknown activation {name!r}")
    return found


class Student(nn.Module):
    """Encoder, masking of embeddings, and decoder; or the encoder alone."""

    def __init__(self, encoder: Encoder, decoder: Decoder | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    @property
    def num_prefix_tokens(self) -> int:
        return self.encoder.backbone.num_prefix_tokens

    def forward(self, images: Tensor | NativeImages, keep_mask: Tensor | None = None) -> Tensor:
        """Reconstruct the teacher's tokens of every view from masked embeddings of the whole image.

        Args:
            images: Normalised, ``(batch, 3, height, width)`` or of several sizes.
            keep_mask: bool ``(batch, masks, patches)``, True = visible; False behind the patches of images of several
                sizes. None skips the decoder.

        Returns:
            ``(batch * masks, tokens, teacher width)``; the views of one image are adjacent. Without a keep-mask: the
            embeddings, ``(batch, tokens, width)``.

        Raises:
            ValueError: A keep-mask is given, but the student has no decoder.
        """
        embeddings = self.encoder(images)
        if keep_mask is None:
            return embeddings  # type: ignore[no-any-return]
        return self.decode(embeddings, keep_mask, images if isinstance(images, NativeImages) else None)

    def decode(self, embeddings: Tensor, keep_mask: Tensor, images: NativeImages | None = None) -> Tensor:
        """Mask embeddings ``(batch, tokens, width)`` and decode each view. Prefix tokens are always hidden.

        Args:
            embeddings: Of the whole images.
            keep_mask: See :meth:`forward`.
            images: The images, if they have several sizes.

        Raises:
            ValueError: The student has no decoder.
        """
        if self.decoder is None:
            raise ValueError("this student has no decoder")
        positions, mask = None, None
        if images is not None:
            masks = keep_mask.shape[1]
            positions = grid_positions(self.decoder.pos_embed, self.encoder.backbone.grid, images)
            positions = positions.repeat_interleave(masks, dim=0)
            mask = images.attention_mask(self.num_prefix_tokens)
            mask = None if mask is None else mask.repeat_interleave(masks, dim=0)
        output: Tensor = self.decoder(self.masked(embeddings, keep_mask), positions, mask)
        return output

    def masked(self, embeddings: Tensor, keep_mask: Tensor) -> Tensor:
        """Embeddings ``(batch, tokens, width)`` under each mask, ``(batch * masks, tokens, width)``, prefix hidden."""
        keep = F.pad(keep_mask, (self.num_prefix_tokens, 0), value=False)
        return (embeddings[:, None] * keep[..., None].to(embeddings.dtype)).flatten(0, 1)

    def set_image_size(self, size: int | Sequence[int]) -> Student:
        """Change the size of the input, in place: positions of encoder and decoder are resampled.

        Raises:
            UserError: As for :func:`~localign.backbones.building.set_image_size`.
        """
        backbone = self.encoder.backbone
        before = backbone.grid
        set_image_size(backbone, size)
        if self.decoder is not None and backbone.grid != before:
            self.decoder.resample(before, backbone.grid)
        return self

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute the blocks' activations in the backward pass instead of storing them."""
        self.encoder.backbone.vit.set_grad_checkpointing(enable)
        if self.decoder is not None:
            self.decoder.grad_checkpointing = enable

    def train_last_blocks(self, count: int) -> None:
        """Freeze the encoder except its last ``count`` blocks, final norm and head.

        Raises:
            UserError: ``count`` is negative, or the backbone has fewer blocks.
        """
        backbone = self.encoder.backbone
        _check_blocks("--train-blocks", count, backbone)
        backbone.requires_grad_(False)
        for block in backbone.vit.blocks[backbone.depth - count :]:
            block.requires_grad_(True)
        getattr(backbone.vit, backbone.final_norm).requires_grad_(True)


def build_student(
    backbone: Backbone,
    *,
    soft_cap: float | None,
    attention: AttentionBackend = "auto",
    decoder: bool = True,
    decoder_depth: int = 2,
    layer_scale: float | None = 1e-6,
    head: HeadStart = "zero",
    teacher_width: int | None = None,
    decoder_width: int | None = None,
    decoder_mlp: Literal["auto", "plain", "gated"] = "auto",
    reinit_blocks: int = 0,
) -> Student:
    """Build a student from a pre-trained backbone.

    Args:
        backbone: The pre-trained model; copied, not changed.
        soft_cap: Bound of the encoder's attention logits, or None.
        attention: Implementation of soft-capped attention.
        decoder: Whether the student has a decoder. Without it, the encoder's head outputs the target's channels.
        decoder_depth: Number of transformer blocks in the decoder.
        layer_scale: Initial LayerScale of the decoder, or None.
        head: Initial weight of the encoder's linear head.
        teacher_width: Channels of the target; default the backbone's width.
        decoder_width: Channels of the decoder, a multiple of a head's channels; default the backbone's width.
        decoder_mlp: Plain MLPs in the decoder, or gated ones as in the encoder; auto: as in the encoder.
        reinit_blocks: Last blocks of the encoder that start from random weights.

    Raises:
        UserError: The backbone is soft-capped but ``soft_cap`` is None, its attention cannot be soft-capped, the
            backbone has fewer blocks, its MLPs are not gated, or its heads do not fit the decoder's width.
    """
    if soft_cap is None and backbone.soft_cap is not None:
        raise UserError(
            f"{backbone.name} has soft-capped attention ({backbone.soft_cap:g}), which --soft-cap none cannot undo"
        )
    width = decoder_width or backbone.width
    head_width = backbone.width // backbone.num_heads
    if width % head_width:
        raise UserError(
            f"--decoder-width {width} is not a multiple of {head_width}, the channels of {backbone.name}'s heads"
        )
    gated_width, gated_norm = _gated_shape(backbone, width, decoder_mlp)
    config = DecoderConfig(
        width=width,
        output_width=teacher_width or backbone.width,
        num_heads=width // head_width,
        num_tokens=backbone.num_prefix_tokens + backbone.num_patches,
        depth=decoder_depth,
        qkv_bias=backbone.qkv_bias,
        layer_scale=layer_scale,
        activation=backbone.activation.__name__,
        gated_width=gated_width,
        gated_norm=gated_norm,
    )
    copy = prepare_backbone(backbone.copy(soft_cap=soft_cap, attention=attention)).requires_grad_(True)
    _check_blocks("--reinit-blocks", reinit_blocks, copy)
    for block in copy.vit.blocks[copy.depth - reinit_blocks :]:
        reinitialise(block)
    if not decoder:
        return Student(Encoder(copy, config.output_width, head), None)
    return Student(Encoder(copy, config.width, head), Decoder(config))


def _check_blocks(option: str, count: int, backbone: Backbone) -> None:
    if not 0 <= count <= backbone.depth:
        raise UserError(f"{option} {count} does not fit: {backbone.name} has {backbone.depth} blocks")


def _gated_shape(
    backbone: Backbone, width: int, mlp: Literal["auto", "plain", "gated"]
) -> tuple[int | None, bool]:
    """Hidden channels of the decoder's gated MLPs, in proportion to the encoder's, and whether they have a norm."""
    found = backbone.vit.blocks[0].mlp
    gated = isinstance(found, SwiGLU) or (isinstance(found, GluMlp) and isinstance(found.act, nn.SiLU))
    if mlp == "plain" or (mlp == "auto" and not gated):
        return None, False
    if not gated:
        raise UserError(
            f"--decoder-mlp gated: the MLPs of {backbone.name} are not SwiGLU, so they have no shape to copy"
        )
    return found.fc2.in_features * width // backbone.width, _has_weight(found.norm)


def reinitialise(block: nn.Module) -> None:
    """Give a block new weights: matrices N(0, 0.02^2), truncated at two standard deviations, biases 0, norms 1.

    LayerScale keeps its values, which are part of the pre-trained model's scales.
    """
    for module in block.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
