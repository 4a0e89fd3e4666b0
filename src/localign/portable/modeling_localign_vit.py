"""A vision transformer that localign aligned, for transformers with ``trust_remote_code=True``.

It is a timm model, perhaps with soft-capped attention, which no class of transformers has. timm must be installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class LocalignViTConfig(PretrainedConfig):
    """The configuration of :class:`LocalignViT`: timm's own keys, and what timm has no key for.

    Args:
        architecture: timm's name of the model.
        model_args: Arguments of timm's constructor.
        pretrained_cfg: timm's facts about the input, among them ``mean`` and ``std``.
        localign: Soft-cap, final norm, layer.
        num_features: Channels of a token; also :attr:`hidden_size`.
    """

    model_type = "localign_vit"

    def __init__(
        self,
        architecture: str = "vit_base_patch16_224",
        model_args: dict[str, Any] | None = None,
        pretrained_cfg: dict[str, Any] | None = None,
        localign: dict[str, Any] | None = None,
        num_features: int = 768,
        **kwargs: Any,
    ) -> None:
        self.architecture = architecture
        self.model_args = model_args or {}
        self.pretrained_cfg = pretrained_cfg or {}
        self.localign = localign or {}
        self.num_features = num_features
        super().__init__(**(kwargs | {"hidden_size": num_features}))

    def tower(self) -> dict[str, Any]:
        """The description of the tower."""
        own = self.localign
        eps = {"norm_eps": own["block_norm_eps"]} if own.get("block_norm_eps") is not None else {}
        return {
            "architecture": self.architecture,
            "model_kwargs": {**self.model_args, **eps},
            "mean": self.pretrained_cfg["mean"],
            "std": self.pretrained_cfg["std"],
            "layer": own["feature_layer"],
            "norm": True,
            "keep_prefix": True,
            "soft_cap": own["soft_cap"],
            "final_norm": own["final_norm"],
            "norm_class": own["norm"],
            "norm_eps": own["norm_eps"],
        }


class SoftCappedAttention(nn.Module):
    """timm's attention with logits ``cap * tanh(logits / cap)``; names of weights as in timm."""

    def __init__(self, attention: Any, cap: float) -> None:
        super().__init__()
        self.cap = cap
        self.num_heads: int = attention.num_heads
        self.head_dim: int = attention.head_dim
        self.qkv, self.q_norm, self.k_norm = attention.qkv, attention.q_norm, attention.k_norm
        self.norm, self.proj = attention.norm, attention.proj
        self.gate = getattr(attention, "gate", None)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        """Attention over tokens ``(batch, tokens, width)``.

        ``attn_mask`` is bool ``(batch, 1, 1, tokens)``, True for keys that may be attended to.
        """
        batch, tokens, _width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        logits = (query * (self.head_dim**-0.5 / self.cap)) @ key.transpose(-2, -1)
        logits = self.cap * torch.tanh(logits)
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        weights = logits.softmax(dim=-1).to(value.dtype)
        out = (weights @ value).transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim)
        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        projected: Tensor = self.proj(out)
        return projected


def build_vit(tower: Mapping[str, Any]) -> Any:
    """The timm model of a tower with random weights, cut to the blocks and norms in use."""
    arguments: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in tower["model_kwargs"].items()
    }
    norm_eps = arguments.pop("norm_eps", None)
    if not timm.is_model(tower["architecture"]):  # timm would follow other names to the Hub
        raise ValueError(f"timm has no model {tower['architecture']!r:.80}")
    vit: Any = timm.create_model(tower["architecture"], pretrained=False, num_classes=0, **arguments)
    if norm_eps is not None:
        for module in vit.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = float(norm_eps)
    final = tower["final_norm"]
    if tower["norm_class"] is not None and final != "none":
        if tower["norm_class"] == "LayerNorm" and not isinstance(getattr(vit, final), nn.LayerNorm):
            setattr(vit, final, nn.LayerNorm(vit.embed_dim))
        if tower["norm_eps"] is not None:
            getattr(vit, final).eps = tower["norm_eps"]
    if tower["soft_cap"] is not None:
        for block in vit.blocks:
            block.attn = SoftCappedAttention(block.attn, tower["soft_cap"])
    vit.blocks = vit.blocks[: tower["layer"] + 1]
    vit.reset_classifier(0, "")
    for name in ("norm", "fc_norm"):
        if hasattr(vit, name) and not (tower["norm"] and name == final):
            setattr(vit, name, nn.Identity())
    return vit


def vit_tokens(vit: Any, tower: Mapping[str, Any], images: Tensor) -> Tensor:
    """Normalised images ``(batch, 3, height, width)`` to tokens ``(batch, tokens, width)``."""
    prefix = int(vit.num_prefix_tokens)
    features = vit.forward_intermediates(
        images,
        indices=[tower["layer"]],
        return_prefix_tokens=prefix > 0,
        norm=False,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
    )[0]
    tokens: Tensor = features[0] if prefix else features
    if prefix and tower["keep_prefix"]:
        tokens = torch.cat([features[1], tokens], dim=1)
    if tower["norm"] and tower["final_norm"] != "none":
        tokens = getattr(vit, tower["final_norm"])(tokens)
    return tokens


class ViTTower(nn.Module):
    """One backbone of a vision-language model.

    Args:
        tower: Its description in the model's configuration.
    """

    def __init__(self, tower: Mapping[str, Any]) -> None:
        super().__init__()
        self.description = tower
        self.vit = build_vit(tower)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 ``(batch, 3, height, width)``, not normalised, to tokens ``(batch, tokens, width)``."""
        mean, std = (
            torch.tensor(self.description[name], device=pixels.device).view(1, -1, 1, 1)
            for name in ("mean", "std")
        )
        images = ((pixels.float() / 255 - mean) / std).to(next(self.parameters()).dtype)
        return vit_tokens(self.vit, self.description, images)


def init_buffers(module: nn.Module) -> None:
    """Compute a timm layer's buffers that weight files do not hold (rotary and relative positions)."""
    init = getattr(module, "init_non_persistent_buffers", None)
    if init is not None:
        init()


class LocalignViT(PreTrainedModel):
    """The aligned vision transformer.

    Args:
        config: Describes the model; weights are random until they are loaded.
    """

    config_class = LocalignViTConfig
    config: LocalignViTConfig
    main_input_name = "pixel_values"
    base_model_prefix = "vit"  # weights have timm's names

    def __init__(self, config: LocalignViTConfig) -> None:
        super().__init__(config)
        self.vit = build_vit(config.tower())
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise nothing but buffers: timm has initialised the weights."""
        init_buffers(module)

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """Images to tokens.

        Args:
            pixel_values: ``(batch, 3, height, width)``, normalised as ``preprocessor_config.json`` says.

        Returns:
            ``last_hidden_state``, ``(batch, prefix tokens + patches, width)``, after the final norm.
        """
        return BaseModelOutput(last_hidden_state=vit_tokens(self.vit, self.config.tower(), pixel_values))
