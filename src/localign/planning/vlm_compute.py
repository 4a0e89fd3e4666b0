"""Compute of a VLM training, from the sizes of its parts."""

from __future__ import annotations

from torch import nn

from localign.options.vlm.train import VLMConfig
from localign.vlm.model.modeling import LocalignVLM

TEXT_TOKENS = 256
"""Tokens of text that a conversation is assumed to have on average, beside those of its image."""


def flops_per_conversation(config: VLMConfig, model: LocalignVLM, image_tokens: int) -> float:
    """Operations of a training step per conversation with an image; a multiply-add counts as two.

    Counted are products with weights, not attention between tokens: forward, backward where something is trained, and
    the second forward of checkpointed language models.

    Args:
        config: The options of the run.
        model: The model; parameters that are not trained need no gradient. It may be on the meta device.
        image_tokens: Tokens per image.
    """
    llm = model.language_model
    embedding = llm.get_input_embeddings()
    tied = bool(getattr(llm.config.get_text_config(), "tie_word_embeddings", False))
    looked_up = 0 if tied or not isinstance(embedding, nn.Embedding) else embedding.weight.numel()
    tokens = image_tokens + TEXT_TOKENS
    recomputed = 2 if config.grad_checkpointing else 0
    vision = _passes(model.vision, before=False) * _count(model.vision) * image_tokens
    trains_vision = _trains(model.vision)
    adapter = _passes(model.adapter, before=trains_vision) * _count(model.adapter) * image_tokens
    before = trains_vision or _trains(model.adapter)
    return vision + adapter + (_passes(llm, before) + recomputed) * (_count(llm) - looked_up) * tokens


def _passes(part: nn.Module, before: bool) -> int:
    """Operations per parameter and token: forward, and backward for gradients of inputs and, if trained, of weights.

    Args:
        part: The part of the model.
        before: Whether a part before it is trained, so that gradients pass through.
    """
    return 6 if _trains(part) else 4 if before else 2


def _trains(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def _count(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())
