"""Floating-point operations of a training step of a vision-language model, and a GPU's peak rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from localign.gpus import gpu_of_device

if TYPE_CHECKING:
    from localign.vlm.model.modeling import LocalignVLM


def peak_flops(device: torch.device) -> float | None:
    """Peak rate of dense bfloat16 operations of a CUDA device, per second; None if the device is unknown."""
    card = gpu_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if card is None else 1e12 * card.bf16


def useful_flops(model: LocalignVLM, lengths: Sequence[int], labelled: int, images: int) -> float:
    """Floating-point operations of one forward and backward pass that no implementation can avoid.

    Counts two operations per matrix weight and token, and two more for each gradient: of the input, and of the weight
    if it is trained. Causal attention counts half. Padding, logits of tokens without a label and recomputation are
    not counted.

    Args:
        model: The model, with ``requires_grad`` set for the training stage.
        lengths: Tokens of each sequence, including image tokens.
        labelled: Number of tokens with a label.
        images: Number of images.
    """
    llm: Any = model.language_model
    config = model.config.text_config.get_text_config()
    embedding, head = llm.get_input_embeddings().weight, llm.get_output_embeddings().weight
    layers = [p for p in llm.parameters() if p.ndim == 2 and p is not embedding and p is not head]
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_width
    flops: float = _weights(layers) * sum(lengths) + _weights([head]) * labelled
    flops += 6 * config.num_hidden_layers * width * sum(length**2 for length in lengths)
    return flops + images * _image_flops(model)


def _weights(parameters: Sequence[torch.nn.Parameter]) -> float:
    """Operations per token on matrices through which gradients flow."""
    return sum((6 if p.requires_grad else 4) * p.numel() for p in parameters)


def _image_flops(model: LocalignVLM) -> float:
    """Operations per image: the forward pass of the frozen tower, and the forward and backward pass of the adapter."""
    adapter = _weights([p for p in model.adapter.parameters() if p.ndim == 2])
    flops = adapter * model.adapter.config.num_tokens
    for backbone in model.vision.backbones:
        tokens = backbone.num_prefix_tokens + backbone.num_patches
        matrices = sum(p.numel() for p in backbone.vit.parameters() if p.ndim in (2, 4))
        flops += 2 * matrices * tokens + 4 * len(backbone.vit.blocks) * backbone.width * tokens**2
    return flops
