"""DINOv2, with and without registers (Dinov2Model, Dinov2WithRegistersModel).

Class token, then registers, then patches; a layer scale in every block; the last norm applies to every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from localign.backbones.families.base import (
    Config,
    TransformersFamily,
    activation_name,
    common_arguments,
    common_config,
    number,
)
from localign.backbones.families.names import NameMap, joined_linear, linear
from localign.backbones.weights import StateDict
from localign.errors import UserError
from localign.portable.native_localign_vlm import PositionInterpolation


class DINOv2(TransformersFamily):
    """DINOv2."""

    square = True
    model_types = ("dinov2", "dinov2_with_registers")
    anchor = "embeddings.cls_token"
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    ignored = ("embeddings.mask_token", "classifier.")

    def architecture(self, config: Config) -> tuple[str, dict[str, Any]]:
        config = {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "patch_size": 14,
            **config,
        }
        arguments = common_arguments(config, act="gelu", eps=1e-6)
        registers = self._registers(config)
        if config.get("use_swiglu_ffn", False):
            # transformers rounds 2/3 of the hidden width up to a multiple of 8; timm holds both halves in one layer.
            width = arguments["embed_dim"]
            hidden = (int(int(width * config.get("mlp_ratio", 4)) * 2 / 3) + 7) // 8 * 8
            arguments["mlp_ratio"] = (2 * hidden + 0.5) / width
            del arguments["act_layer"]
            name = "vit_giant_patch14_dinov2"
        else:
            name = "vit_base_patch14_dinov2"
        if registers:
            arguments["reg_tokens"] = registers
            name = name.replace("patch14", "patch14_reg4")
        return name, {**arguments, "qkv_bias": bool(config.get("qkv_bias", True))}

    def _registers(self, config: Config) -> int:
        return number(config, "num_register_tokens", 4) if config["model_type"].endswith("registers") else 0

    def interpolation(self, config: Config) -> PositionInterpolation:
        return "bicubic" if self._registers(config) else "bicubic-aliased"

    def names(self, config: Config) -> NameMap:
        block = "encoder.layer.{}"
        first, second = ("weights_in", "weights_out") if config.get("use_swiglu_ffn") else ("fc1", "fc2")
        plain = {
            "cls_token": self.anchor,
            "reg_token": "embeddings.register_tokens",
            "pos_embed": "embeddings.position_embeddings",
            **linear("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            **linear("norm", "layernorm"),
            **linear("blocks.{}.norm1", f"{block}.norm1"),
            **linear("blocks.{}.norm2", f"{block}.norm2"),
            **linear("blocks.{}.attn.proj", f"{block}.attention.output.dense"),
            **linear("blocks.{}.mlp.fc1", f"{block}.mlp.{first}"),
            **linear("blocks.{}.mlp.fc2", f"{block}.mlp.{second}"),
            "blocks.{}.ls1.gamma": f"{block}.layer_scale1.lambda1",
            "blocks.{}.ls2.gamma": f"{block}.layer_scale2.lambda1",
        }
        parts = [f"{block}.attention.attention.{part}" for part in ("query", "key", "value")]
        return NameMap(plain, joined_linear("blocks.{}.attn.qkv", parts))

    def to_timm(self, state: StateDict, config: Config, shapes: Mapping[str, torch.Size]) -> StateDict:
        positions = state.get("embeddings.position_embeddings")
        if positions is not None and self._registers(config):
            # With registers, timm adds the class token's position to the class token itself.
            state = {
                **state,
                self.anchor: state[self.anchor] + positions[:, :1],
                "embeddings.position_embeddings": positions[:, 1:],
            }
        return super().to_timm(state, config, shapes)

    def to_transformers(self, state: StateDict, config: Config) -> StateDict:
        named = super().to_transformers(state, config)
        if self._registers(config):
            positions = named["embeddings.position_embeddings"]
            named["embeddings.position_embeddings"] = torch.cat(
                [torch.zeros_like(positions[:, :1]), positions], 1
            )
        # The mask token serves training only, but transformers always stores it.
        return {**named, "embeddings.mask_token": torch.zeros(1, config["hidden_size"])}

    def config_of(self, vit: Any) -> dict[str, Any]:
        registers = int(vit.num_reg_tokens)
        kind = "Dinov2WithRegisters" if registers else "Dinov2"
        config = common_config(vit, "dinov2_with_registers" if registers else "dinov2", f"{kind}Model")
        mlp = vit.blocks[0].mlp
        gated = mlp.fc1.out_features != mlp.fc2.in_features
        return {
            **config,
            **({"num_register_tokens": registers} if registers else {}),
            "mlp_ratio": 4 if gated else _whole_ratio(mlp.fc1.out_features, config["hidden_size"]),
            "hidden_act": "gelu" if gated else activation_name(mlp.act),
            "qkv_bias": vit.blocks[0].attn.qkv.bias is not None,
            "use_swiglu_ffn": gated,
        }


def _whole_ratio(hidden: int, width: int) -> int:
    if hidden % width:
        raise UserError(f"its MLP is {hidden} wide, not a multiple of {width}")
    return hidden // width
