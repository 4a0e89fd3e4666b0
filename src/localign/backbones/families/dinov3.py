"""DINOv3's vision transformers (DINOv3ViTModel).

Class token, then registers, then patches; rotary position embeddings, so any size of image is possible.
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
    decimal,
    number,
)
from localign.backbones.families.names import NameMap, linear
from localign.backbones.weights import StateDict
from localign.errors import UserError


class DINOv3(TransformersFamily):
    """DINOv3."""

    model_types = ("dinov3_vit",)
    anchor = "embeddings.cls_token"
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    ignored = ("embeddings.mask_token", "rope_embeddings.")

    def architecture(self, config: Config) -> tuple[str, dict[str, Any]]:
        config = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536,
                  **config}  # fmt: skip
        if (
            config.get("key_bias", False)
            or not config.get("mlp_bias", True)
            or not config.get("proj_bias", True)
        ):
            raise UserError("a DINOv3 with key_bias, or without mlp_bias or proj_bias, cannot be read")
        arguments = common_arguments(config, act="gelu", eps=1e-5)
        gated, bias = bool(config.get("use_gated_mlp", False)), bool(config.get("query_bias", True))
        if (act := arguments.pop("act_layer")) != ("silu" if gated else "gelu"):
            raise UserError(f"timm's DINOv3 has no activation {act}{' in a gated MLP' if gated else ''}")
        if gated:
            arguments |= {"swiglu_mlp": True, "swiglu_align_to": 1}
        arguments |= {
            "num_reg_tokens": number(config, "num_register_tokens", 4)
            if config.get("num_register_tokens", 0)
            else 0,
            "rope_temperature": decimal(config, "rope_theta", 100.0),
            "global_pool": "token",
        }
        return f"vit_small_patch16_dinov3{'_qkvb' if bias else ''}", arguments

    def names(self, config: Config) -> NameMap:
        block = "layer.{}"
        plain = {
            "cls_token": self.anchor,
            "reg_token": "embeddings.register_tokens",
            **linear("patch_embed.proj", "embeddings.patch_embeddings"),
            **linear("norm", "norm"),
            **linear("blocks.{}.norm1", f"{block}.norm1"),
            **linear("blocks.{}.norm2", f"{block}.norm2"),
            **linear("blocks.{}.attn.proj", f"{block}.attention.o_proj"),
            "blocks.{}.attn.q_bias": f"{block}.attention.q_proj.bias",
            "blocks.{}.attn.v_bias": f"{block}.attention.v_proj.bias",
            "blocks.{}.gamma_1": f"{block}.layer_scale1.lambda1",
            "blocks.{}.gamma_2": f"{block}.layer_scale2.lambda1",
        }
        if config.get("use_gated_mlp", False):
            pairs = {"fc1_g": "gate_proj", "fc1_x": "up_proj", "fc2": "down_proj"}
        else:
            pairs = {"fc1": "up_proj", "fc2": "down_proj"}
        for timm_name, name in pairs.items():
            plain |= linear(f"blocks.{{}}.mlp.{timm_name}", f"{block}.mlp.{name}")
        parts = tuple(f"{block}.attention.{part}_proj.weight" for part in "qkv")
        return NameMap(plain, {"blocks.{}.attn.qkv.weight": parts})

    def to_timm(self, state: StateDict, config: Config, shapes: Mapping[str, torch.Size]) -> StateDict:
        # Transformers has written block names with and without "model.".
        state = {k.removeprefix("model."): v for k, v in state.items()}
        return super().to_timm(state, config, shapes)

    def to_transformers(self, state: StateDict, config: Config) -> StateDict:
        constant = ("k_bias", "rope.periods")  # timm's zero bias of keys, and fixed frequencies
        named = super().to_transformers({k: v for k, v in state.items() if not k.endswith(constant)}, config)
        return {**named, "embeddings.mask_token": torch.zeros(1, 1, config["hidden_size"])}

    def config_of(self, vit: Any) -> dict[str, Any]:
        block = vit.blocks[0]
        gated, bias = hasattr(block.mlp, "fc1_g"), block.attn.q_bias is not None
        return {
            **common_config(vit, "dinov3_vit", "DINOv3ViTModel"),
            "intermediate_size": block.mlp.fc2.in_features,
            "hidden_act": "silu" if gated else activation_name(block.mlp.act),
            "use_gated_mlp": gated,
            "num_register_tokens": int(vit.num_prefix_tokens) - 1,
            "rope_theta": float(vit.rope.temperature),
            "query_bias": bias,
            "key_bias": False,
            "value_bias": bias,
        }
