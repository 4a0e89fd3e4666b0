"""Tiny models of the families' true architectures, as transformers and timm write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from timm.models import save_for_hf
from torch import nn

SIZE, PATCH, WIDTH, DEPTH = 32, 8, 32, 2
_COMMON: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
_COMMON |= {"patch_size": PATCH}
VISION: dict[str, Any] = {**_COMMON, "image_size": SIZE, "intermediate_size": 72}
_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_TEXT |= {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_PATCHES: dict[str, Any] = {k: v for k, v in VISION.items() if k != "image_size"} | {"num_patches": 16}
_DINO: dict[str, Any] = {**_COMMON, "image_size": SIZE}
_T = transformers


def _llava(vision: dict[str, Any]) -> nn.Module:
    text = {**_TEXT, "model_type": "llama", "num_key_value_heads": 2}
    config = _T.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    return _T.LlavaForConditionalGeneration(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "clip": lambda: _T.CLIPVisionModel(_T.CLIPVisionConfig(**VISION)),
    "clip-gelu": lambda: _T.CLIPVisionModel(_T.CLIPVisionConfig(**VISION, hidden_act="gelu")),
    "clip-projection": lambda: _T.CLIPVisionModelWithProjection(_T.CLIPVisionConfig(**VISION)),
    "clip-with-text": lambda: _T.CLIPModel(_T.CLIPConfig(vision_config=VISION, text_config=_TEXT)),
    "siglip": lambda: _T.SiglipVisionModel(_T.SiglipVisionConfig(**VISION)),
    "siglip-headless": lambda: _T.SiglipVisionModel(_T.SiglipVisionConfig(**VISION, vision_use_head=False)),
    "siglip-with-text": lambda: _T.SiglipModel(_T.SiglipConfig(vision_config=VISION, text_config=_TEXT)),
    "siglip2": lambda: _T.Siglip2VisionModel(_T.Siglip2VisionConfig(**_PATCHES)),
    "dinov2": lambda: _T.Dinov2Model(_T.Dinov2Config(**_DINO)),
    "dinov2-swiglu": lambda: _T.Dinov2Model(_T.Dinov2Config(**_DINO, use_swiglu_ffn=True)),
    "dinov2-registers": lambda: _T.Dinov2WithRegistersModel(_T.Dinov2WithRegistersConfig(**_DINO)),
    "dinov3": lambda: _T.DINOv3ViTModel(_T.DINOv3ViTConfig(**VISION, num_register_tokens=4)),
    "dinov3-gated": lambda: _T.DINOv3ViTModel(
        _T.DINOv3ViTConfig(**VISION, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu")
    ),
    "dinov3-unbiased": lambda: _T.DINOv3ViTModel(
        _T.DINOv3ViTConfig(**VISION, num_register_tokens=4, query_bias=False, value_bias=False)
    ),
    "vit": lambda: _T.ViTModel(_T.ViTConfig(**VISION)),
    "vit-classifier": lambda: _T.ViTForImageClassification(_T.ViTConfig(**VISION)),
    "llava-clip": lambda: _llava({**VISION, "model_type": "clip_vision_model"}),
    "llava-siglip": lambda: _llava({**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}),
}
FORMATS = {
    "clip": "clip",
    "siglip": "siglip",
    "siglip-headless": "siglip",
    "siglip2": "siglip2",
    "dinov2": "dinov2",
    "dinov2-swiglu": "dinov2",
    "dinov2-registers": "dinov2",
    "dinov3": "dinov3",
    "dinov3-gated": "dinov3",
    "dinov3-unbiased": "dinov3",
    "vit": "vit",
}
"""Models that can be written again -> their format."""


def model_of(name: str, seed: int = 0) -> Any:
    """A model with random weights that matter: no zeros, no ones."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def folder_of(name: str, folder: Path) -> tuple[Any, Path]:
    """A model and the folder that transformers writes of it."""
    model = model_of(name)
    model.save_pretrained(folder)
    return model, folder


def vision_model(model: Any) -> Any:
    """The vision model inside a model."""
    inner = getattr(model, "model", model)
    for name in ("vision_tower", "vision_model", "vit"):
        model = getattr(inner, name, model)
    return model


@torch.no_grad()
def hidden_states(model: Any, pixels: torch.Tensor) -> Any:
    """transformers' own output, with the hidden states of every block."""
    vision = vision_model(model)
    if vision.config.model_type != "siglip2_vision_model":
        return vision(pixel_values=pixels, output_hidden_states=True)
    side = pixels.shape[-1] // PATCH
    flat = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 4, 5, 1)
    return vision(
        pixel_values=flat.reshape(len(pixels), side * side, -1),
        pixel_attention_mask=torch.ones(len(pixels), side * side, dtype=torch.bool),
        spatial_shapes=torch.tensor([[side, side]] * len(pixels)),
        output_hidden_states=True,
    )


def timm_folder(path: Path, **arguments: Any) -> Path:
    """A folder as timm's own ``save_for_hf`` writes it."""
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, **arguments}
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    saved = {**arguments, "in_chans": 3, "global_pool": arguments.get("global_pool", "token")}
    save_for_hf(model, str(path), model_args=saved, safe_serialization=True)
    return path


NAFLEX_ARGUMENTS: dict[str, Any] = {
    "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": 4, "mlp_ratio": 2.25,
    "pos_embed_grid_size": (4, 4),
}  # fmt: skip
NAFLEX: dict[str, tuple[str, dict[str, Any]]] = {
    "siglip": ("naflexvit_base_patch16_siglip", {}),
    "registers": ("naflexvit_base_patch16_gap", {}),
    "map": ("naflexvit_base_patch16_map", {"qkv_bias": False, "qk_norm": True}),
    "class token": ("naflexvit_base_patch16_map", {"class_token": True, "reg_tokens": 0, "pre_norm": True}),
    "channels first": ("naflexvit_base_patch16_siglip", {"patchify_channels_last": False}),
    "convolution": ("naflexvit_base_patch16_siglip", {"embed_proj_type": "conv"}),
}


def naflex_folder(kind: str, folder: Path) -> tuple[Any, Path]:
    """A model with random weights that matter, and the folder that timm writes of it."""
    name, more = NAFLEX[kind]
    arguments = {**NAFLEX_ARGUMENTS, **more}
    torch.manual_seed(3)
    model: Any = timm.create_model(name, num_classes=0, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    save_for_hf(model, str(folder), model_args={"num_classes": 0, **arguments}, safe_serialization=True)
    return model.eval(), folder
