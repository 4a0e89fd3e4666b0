"""Adapters: from the vision tower's tokens to embeddings of the language model (appendix D of the paper).

``linear``         one linear layer, zero at the start
``mlp``            two linear layers with a GELU between
``fused-mlp``      three linear layers, for tokens of several backbones
``transformer``    input projection, position embedding, two blocks, norm, linear: all from scratch
``decoder``        the same module, from an alignment's encoder head and decoder; output layer zero
``truncated``      the last two blocks and the final norm of the ViT, then a linear layer, zero at the start
``fused-decoder``  the aligned backbone's tokens through its decoder, concatenated with the other backbones'
                   tokens, then a fused MLP; the paper leaves this composition open

Where the output layer is zero, all image embeddings are exactly zero at the start of training.
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
from localign.errors import UserError, did_you_mean
from localign.options.names import AdapterName
from localign.vlm.model.vision import TowerConfig, VisionTower

ADAPTERS: tuple[str, ...] = get_args(AdapterName)


@dataclass(frozen=True)
class AdapterConfig:
    """What it takes to build an adapter again, without its weights.

    ``dataclasses.asdict`` gives what JSON can hold, and ``AdapterConfig(**that)`` gives an equal config.
    """

    kind: AdapterName
    """Which adapter."""
    input_width: int
    """Channels of the tower's tokens."""
    output_width: int
    """Width of the language model."""
    num_tokens: int
    """Tokens per image, in and out: kept prefix tokens, then patches."""
    num_prefix_tokens: int = 0
    """How many of them are prefix tokens."""
    decoder: DecoderConfig | None = None
    """Position embedding, blocks and norm of the kinds that have them; its ``num_tokens`` may exceed the
    adapter's by prefix tokens that the tower drops."""
    decoder_channels: tuple[int, int] | None = None
    """First and end channel, among the tower's, of the aligned backbone (fused-decoder)."""
    blocks: TowerConfig | None = None
    """A ViT of as many blocks as the truncated adapter has, from which it takes blocks and norm."""

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
        """Raise a UserError, naming both, unless the adapter takes what the tower gives."""
        wanted = (self.input_width, self.num_tokens, self.num_prefix_tokens)
        given = (tower.width, tower.num_tokens, tower.num_prefix_tokens)
        if wanted != given:
            raise UserError(
                f"the {self.kind} adapter ({describe_tokens(*wanted)}) "
                f"does not fit {tower.name} ({describe_tokens(*given)})"
            )
        if self.blocks is not None:
            self._check_continues(self.blocks, tower)

    @staticmethod
    def _check_continues(blocks: TowerConfig, tower: VisionTower) -> None:
        first = tower.configs[0]
        same = (blocks.architecture, blocks.soft_cap) == (first.architecture, first.soft_cap)
        if len(tower.configs) > 1 or not same:
            raise UserError(
                f"the truncated adapter holds the end of {blocks.name}; it does not fit {tower.name}"
            )


def describe_tokens(width: int, count: int, prefix: int) -> str:
    """A sequence in words, for errors."""
    return f"{count} tokens of {width} channels, {prefix} of them prefix tokens"


class Adapter(nn.Module):
    """Base of all adapters; ``config`` is enough to build it again."""

    new_part: str | None = None
    """Of an adapter that starts from trained weights: the submodule towards the language model, which does not."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``(batch, num_tokens, input_width)`` to ``(batch, num_tokens, output_width)``.

        They are cast to the adapter's own dtype, which the result has too.
        """
        return self.adapt(tokens.to(next(self.parameters()).dtype))

    def adapt(self, tokens: Tensor) -> Tensor:
        """:meth:`forward` after the cast."""
        raise NotImplementedError

    def reset_parameters(self, seed: int = 0) -> None:
        """Give every parameter its start again, as :func:`build_adapter` draws it from ``seed``.

        For an adapter built on the meta device and then given memory with ``to_empty``. What a decoder or
        truncated adapter takes from a trained model is drawn at random here.
        """
        with torch.device("cpu"):
            fresh = build_adapter(self.config, seed)
        self.load_state_dict(fresh.state_dict())


class LinearAdapter(Adapter):
    """One linear layer, zero at the start."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        self.head = _zero_linear(config.input_width, config.output_width)

    def adapt(self, tokens: Tensor) -> Tensor:
        return self.head(tokens)


class MLPAdapter(Adapter):
    """Two linear layers, or three after a widening to four times the input (``fused-mlp``)."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        make = _fused_mlp if config.kind == "fused-mlp" else _mlp
        self.mlp = make(config.input_width, config.output_width)

    def adapt(self, tokens: Tensor) -> Tensor:
        return self.mlp(tokens)


class DecoderAdapter(Adapter):
    """Input projection, then an alignment's decoder whose output layer leads to the language model.

    As ``transformer`` it starts from scratch, with an output layer at PyTorch's default and prefix tokens
    visible. As ``decoder`` prefix tokens are set to zero after the projection, as they were in alignment.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        assert config.decoder is not None
        self.in_proj = nn.Linear(config.input_width, config.decoder.width)
        self.decoder = Decoder(config.decoder)
        self.hidden = config.num_prefix_tokens if config.kind == "decoder" else 0
        if config.kind == "decoder":
            _zero(self.decoder.head)
            self.new_part = "decoder.head"

    def adapt(self, tokens: Tensor) -> Tensor:
        return self.decoder(hide_prefix(self.in_proj(tokens), self.hidden))


class FusedDecoderAdapter(Adapter):
    """One backbone's tokens through its decoder without output layer, then a fused MLP with the others'.

    The prefix positions, hidden in alignment and dropped by a tower of several backbones, enter the decoder
    as zeros and leave the sequence after it.
    """

    new_part = "mlp"

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        assert config.decoder is not None
        assert config.decoder_channels is not None
        self.start, self.stop = config.decoder_channels
        aligned = self.stop - self.start
        self.prefix = config.decoder.num_tokens - config.num_tokens
        self.in_proj = nn.Linear(aligned, config.decoder.width)
        self.decoder = Decoder(config.decoder)
        self.decoder.head = nn.Identity()  # type: ignore[assignment]
        self.mlp = _fused_mlp(config.input_width - aligned + config.decoder.width, config.output_width)

    def adapt(self, tokens: Tensor) -> Tensor:
        embeddings = self.in_proj(tokens[..., self.start : self.stop])
        decoded = self.decoder(F.pad(embeddings, (0, 0, self.prefix, 0)))[:, self.prefix :]
        return self.mlp(torch.cat([tokens[..., : self.start], decoded, tokens[..., self.stop :]], dim=-1))


class TruncatedAdapter(Adapter):
    """The last blocks and the final norm of the ViT, then a linear layer, zero at the start."""

    new_part = "head"

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        assert config.blocks is not None
        backbone = config.blocks.build()
        self.blocks = backbone.vit.blocks
        self.norm = final_norm(backbone)
        self.head = _zero_linear(config.input_width, config.output_width)

    def adapt(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(tokens)))


def hide_prefix(embeddings: Tensor, count: int) -> Tensor:
    """``(batch, tokens, width)`` with the first ``count`` tokens set to zero."""
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
    """An adapter whose random start is keyed by ``seed``, in the default dtype.

    It is built on the CPU, whatever the default device, or on the meta device where that is the default.
    """
    meta = torch.get_default_device().type == "meta"
    with torch.device("meta" if meta else "cpu"), rng.seeded_globals(seed, "vlm adapter"):
        return _CLASSES[config.kind](config)


def fresh_adapter(kind: AdapterName, tower: VisionTower, output_width: int, *, seed: int = 0) -> Adapter:
    """An adapter that starts from scratch: ``linear``, ``mlp``, ``fused-mlp`` or ``transformer``.

    Args:
        kind: Which.
        tower: Gives its input.
        output_width: Width of the language model.
        seed: Key of the random start.

    Raises:
        UserError: This kind takes weights of a trained model, or the tower has several backbones and it one.
    """
    config = AdapterConfig(kind, tower.width, output_width, tower.num_tokens, tower.num_prefix_tokens)
    if kind == "transformer":
        if len(tower.configs) > 1:
            raise UserError(f"the transformer adapter takes one backbone; {tower.name} are several")
        heads = tower.backbones[0].num_heads
        config = replace(config, decoder=DecoderConfig(tower.width, output_width, heads, tower.num_tokens))
    elif kind not in ("linear", "mlp", "fused-mlp"):
        raise UserError(f"the {kind} adapter does not start from scratch")
    return build_adapter(config, seed)
