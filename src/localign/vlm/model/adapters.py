"""Adapters map the vision tower's tokens to embeddings of the language model (appendix D of the paper).

``linear``         one linear layer, initialised to zero
``mlp``            two linear layers with a GELU between them
``fused-mlp``      three linear layers, for the concatenated tokens of several backbones
``transformer``    input projection, position embedding, two blocks, norm and linear layer, all from scratch
``decoder``        the same module, initialised from an alignment's encoder head and decoder; output layer zero
``truncated``      the last two blocks and the final norm of the ViT, then a linear layer initialised to zero
``fused-decoder``  the aligned backbone's tokens go through its decoder, are concatenated with the other
                   backbones' tokens, and go through a fused MLP; the paper leaves this composition open

An adapter with a zero output layer gives image embeddings of exactly zero when training starts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localign import rng
from localign.alignment.student import Decoder, DecoderConfig
from localign.backbones import Backbone
from localign.backbones.native import run_blocks
from localign.errors import UserError, did_you_mean
from localign.options.names import AdapterName
from localign.portable.native_localign_vlm import Sizes
from localign.vlm.model.vision import TowerConfig, VisionTower

ADAPTERS: tuple[str, ...] = get_args(AdapterName)


@dataclass(frozen=True)
class AdapterConfig:
    """Everything needed to rebuild an adapter except its weights.

    ``dataclasses.asdict`` returns JSON-compatible values, from which ``AdapterConfig(**values)`` restores an
    equal config.
    """

    kind: AdapterName
    """Name of the adapter."""
    input_width: int
    """Channels of the tower's tokens."""
    output_width: int
    """Width of the language model."""
    num_tokens: int
    """Tokens per image, in and out: kept prefix tokens, then patches."""
    num_prefix_tokens: int = 0
    """Number of prefix tokens among ``num_tokens``."""
    decoder: DecoderConfig | None = None
    """Position embedding, blocks and norm (transformer, decoder, fused-decoder); ``decoder.num_tokens`` exceeds
    ``num_tokens`` if the tower drops prefix tokens."""
    decoder_channels: tuple[int, int] | None = None
    """Channels ``[start, stop)`` of the aligned backbone among the tower's (fused-decoder)."""
    blocks: TowerConfig | None = None
    """A ViT with only the adapter's blocks and final norm (truncated)."""

    def __post_init__(self) -> None:
        if self.kind not in ADAPTERS:
            raise UserError(
                f"unknown adapter {self.kind!r}; known: {', '.join(ADAPTERS)}{did_you_mean(self.kind, ADAPTERS)}"
            )
        if isinstance(self.decoder, dict):
            object.__setattr__(self, "decoder", DecoderConfig(**self.decoder))
        if isinstance(self.blocks, dict):
            object.__setattr__(self, "blocks", TowerConfig(**self.blocks))
        if self.decoder_channels is not None:
            start, stop = self.decoder_channels
            object.__setattr__(self, "decoder_channels", (start, stop))

    def check_fits(self, tower: VisionTower) -> None:
        """Raise a UserError that names both unless the adapter takes the tower's tokens."""
        expected = (self.input_width, self.num_tokens, self.num_prefix_tokens)
        actual = (tower.width, tower.num_tokens, tower.num_prefix_tokens)
        if expected != actual:
            raise UserError(
                f"the {self.kind} adapter ({describe_tokens(*expected)}) "
                f"does not fit {tower.name} ({describe_tokens(*actual)})"
            )
        if self.blocks is not None:
            self._check_blocks_fit(self.blocks, tower)

    @staticmethod
    def _check_blocks_fit(blocks: TowerConfig, tower: VisionTower) -> None:
        first = tower.configs[0]
        same = (blocks.architecture, blocks.soft_cap) == (first.architecture, first.soft_cap)
        if len(tower.configs) > 1 or not same:
            raise UserError(
                f"the truncated adapter holds the last blocks of {blocks.name}; it does not fit {tower.name}"
            )


def describe_tokens(width: int, count: int, prefix: int) -> str:
    """The shape of a token sequence in words, for errors."""
    return f"{count} tokens of {width} channels, {prefix} of them prefix tokens"


class Adapter(nn.Module):
    """Base class of all adapters; ``config`` rebuilds the module."""

    new_part: str | None = None
    """The submodule that starts from scratch, in an adapter whose other weights are pretrained; else None."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, tokens: Tensor, sizes: Sizes | None = None) -> Tensor:
        """Tokens ``(batch, num_tokens, input_width)`` to ``(batch, num_tokens, output_width)``.

        The input may have any dtype; the output has the adapter's.

        Args:
            tokens: The tower's.
            sizes: Of images of several sizes, whose tokens are ``(batch, num_prefix_tokens + longest, input_width)``.
                Behind an image's patches the output has no meaning.
        """
        return self.adapt(tokens.to(next(self.parameters()).dtype), sizes)

    def adapt(self, tokens: Tensor, sizes: Sizes | None) -> Tensor:
        """:meth:`forward` on tokens in the adapter's dtype."""
        raise NotImplementedError


class LinearAdapter(Adapter):
    """One linear layer, initialised to zero."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        self.head = _zero_linear(config.input_width, config.output_width)

    def adapt(self, tokens: Tensor, sizes: Sizes | None) -> Tensor:
        embeddings: Tensor = self.head(tokens)
        return embeddings


class MLPAdapter(Adapter):
    """Two linear layers (``mlp``), or three, of which the first widens to four times the input (``fused-mlp``)."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        make = _fused_mlp if config.kind == "fused-mlp" else _mlp
        self.mlp = make(config.input_width, config.output_width)

    def adapt(self, tokens: Tensor, sizes: Sizes | None) -> Tensor:
        embeddings: Tensor = self.mlp(tokens)
        return embeddings


class DecoderAdapter(Adapter):
    """Input projection, then an alignment's decoder with an output layer of the language model's width.

    ``transformer`` starts from scratch, with PyTorch's default output layer, and sees prefix tokens. ``decoder``
    sets prefix tokens to zero after the projection, as alignment does.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        assert config.decoder is not None
        self.in_proj = nn.Linear(config.input_width, config.decoder.width)
        self.decoder = Decoder(config.decoder)
        self.num_hidden_tokens = config.num_prefix_tokens if config.kind == "decoder" else 0
        if config.kind == "decoder":
            _zero(self.decoder.head)
            self.new_part = "decoder.head"

    def adapt(self, tokens: Tensor, sizes: Sizes | None) -> Tensor:
        projected = hide_prefix(self.in_proj(tokens), self.num_hidden_tokens)
        if sizes is not None:
            return sizes.decoded(self.decoder, projected)
        embeddings: Tensor = self.decoder(projected)
        return embeddings


class FusedDecoderAdapter(Adapter):
    """The aligned backbone's tokens go through its decoder, then all tokens go through a fused MLP.

    The decoder has no output layer here. A tower of several backbones drops prefix tokens, so the decoder gets
    zeros at their positions, as in alignment, and its outputs there are discarded.
    """

    new_part = "mlp"

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        assert config.decoder is not None
        assert config.decoder_channels is not None
        self.start, self.stop = config.decoder_channels
        aligned = self.stop - self.start
        self.num_prefix_tokens = config.decoder.num_tokens - config.num_tokens
        self.in_proj = nn.Linear(aligned, config.decoder.width)
        self.decoder = Decoder(config.decoder)
        self.decoder.head = nn.Identity()  # type: ignore[assignment]
        self.mlp = _fused_mlp(config.input_width - aligned + config.decoder.width, config.output_width)

    def adapt(self, tokens: Tensor, sizes: Sizes | None) -> Tensor:
        embeddings = self.in_proj(tokens[..., self.start : self.stop])
        embeddings = F.pad(embeddings, (0, 0, self.num_prefix_tokens, 0))
        decoded = self.decoder(embeddings) if sizes is None else sizes.decoded(self.decoder, embeddings)
        decoded = decoded[:, self.num_prefix_tokens :]
        fused = torch.cat([tokens[..., : self.start], decoded, tokens[..., self.stop :]], dim=-1)
        outputs: Tensor = self.mlp(fused)
        return outputs


class TruncatedAdapter(Adapter):
    """The last blocks and the final norm of the ViT, then a linear layer initialised to zero."""

    new_part = "head"

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        assert config.blocks is not None
        backbone = config.blocks.build()
        self.blocks = backbone.vit.blocks
        self.norm = final_norm(backbone)
        self.head = _zero_linear(config.input_width, config.output_width)

    def adapt(self, tokens: Tensor, sizes: Sizes | None) -> Tensor:
        mask = None if sizes is None else sizes.images.attention_mask(self.config.num_prefix_tokens)
        blocks = self.blocks(tokens) if mask is None else run_blocks(self.blocks, tokens, mask)
        embeddings: Tensor = self.head(self.norm(blocks))
        return embeddings


def hide_prefix(embeddings: Tensor, count: int) -> Tensor:
    """Embeddings ``(batch, tokens, width)`` with the first ``count`` tokens set to zero."""
    return F.pad(embeddings[:, count:], (0, 0, count, 0)) if count else embeddings


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _zero_linear(input_width: int, output_width: int) -> nn.Linear:
    return _zero(nn.Linear(input_width, output_width))


def _mlp(input_width: int, output_width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(input_width, output_width), nn.GELU(), nn.Linear(output_width, output_width)
    )


def _fused_mlp(input_width: int, output_width: int) -> nn.Sequential:
    widened = 4 * input_width
    return nn.Sequential(
        nn.Linear(input_width, widened),
        nn.GELU(),
        nn.Linear(widened, output_width),
        nn.GELU(),
        nn.Linear(output_width, output_width),
    )


def final_norm(backbone: Backbone) -> nn.Module:
    """The norm after the backbone's last block."""
    return nn.Identity() if backbone.final_norm == "none" else getattr(backbone.vit, backbone.final_norm)


_CLASSES: dict[str, type[Adapter]] = {
    "linear": LinearAdapter,
    "mlp": MLPAdapter,
    "fused-mlp": MLPAdapter,
    "transformer": DecoderAdapter,
    "decoder": DecoderAdapter,
    "truncated": TruncatedAdapter,
    "fused-decoder": FusedDecoderAdapter,
}


def build_adapter(config: AdapterConfig, seed: int = 0) -> Adapter:
    """An adapter with random weights that depend on ``seed`` alone, in the default dtype.

    It is built on the CPU, or on the meta device if that is the default device.
    """
    meta = torch.get_default_device().type == "meta"
    with torch.device("meta" if meta else "cpu"), rng.seeded_globals(seed, "vlm adapter"):
        return _CLASSES[config.kind](config)


def fresh_adapter(kind: AdapterName, tower: VisionTower, output_width: int, *, seed: int = 0) -> Adapter:
    """An adapter that starts from scratch.

    Args:
        kind: ``linear``, ``mlp``, ``fused-mlp`` or ``transformer``.
        tower: The tower whose tokens the adapter takes.
        output_width: Width of the language model.
        seed: Seed of the random weights.

    Raises:
        UserError: The kind needs weights of a trained model, or takes one backbone and the tower has several.
    """
    config = AdapterConfig(kind, tower.width, output_width, tower.num_tokens, tower.num_prefix_tokens)
    if kind == "transformer":
        if len(tower.configs) > 1:
            raise UserError(f"the transformer adapter takes one backbone, not {tower.name}")
        heads = tower.backbones[0].num_heads
        config = replace(config, decoder=DecoderConfig(tower.width, output_width, heads, tower.num_tokens))
    elif kind not in ("linear", "mlp", "fused-mlp"):
        raise UserError(f"the {kind} adapter does not start from scratch")
    return build_adapter(config, seed)
