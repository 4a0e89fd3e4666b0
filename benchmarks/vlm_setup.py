"""The model and data of the VLM benchmark: a language model, a ViT, and synthetic conversations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PretrainedConfig

from benchmarks.config import VLMBenchConfig
from benchmarks.conversations import (
    IMAGE_TOKENS,
    MAX_LENGTH,
    drawn_conversations,
    drawn_tokenizer,
    write_conversations,
)
from localign.options.vlm.train import VLMConfig
from localign.planning.llms import text_config

BATCH, STEPS = 16, 16
"""16 conversations are one rank's share of the published batch of 128 on 8 ranks."""
SMALL_WIDTH, FEW_IMAGE_TOKENS = 1024, 64
"""Language models narrower than ``SMALL_WIDTH`` get a small ViT with ``FEW_IMAGE_TOKENS`` tokens by default, other
language models get CLIP's ViT-L/14."""
LLAMAS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    "1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
}
"""Arguments of ``LlamaConfig``; 1b has the shapes of Llama 3.2."""
LLAMA_7B = "meta-llama/Llama-2-7b-hf"


def training_options(config: VLMBenchConfig, folder: Path) -> VLMConfig:
    """Write conversations and a language model's config to the folder, and return the training options for them."""
    llm_config = _llm_config(config.llm or "tiny")
    width = llm_config.get_text_config().hidden_size
    image_tokens = config.image_tokens or (FEW_IMAGE_TOKENS if width < SMALL_WIDTH else IMAGE_TOKENS)
    side, scale = math.isqrt(image_tokens), image_tokens / IMAGE_TOKENS
    tokenizer = drawn_tokenizer()
    text = llm_config.get_text_config()
    text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    text.pad_token_id = tokenizer.pad_token_id
    for part in (llm_config, tokenizer):
        part.save_pretrained(folder / "llm")
    batch, steps = config.batch_size or BATCH, config.steps or STEPS
    text_only = batch * (steps // STEPS)
    drawn = drawn_conversations(batch * steps - text_only, text_only, scale, config.seed)
    size = round(640 * math.sqrt(scale)), round(480 * math.sqrt(scale))  # keeps the ratio to the ViT's input
    vit: dict[str, Any] = {"backbone": ("clip-vit-l",), "image_size": 14 * side}
    if width < SMALL_WIDTH:
        sizes = {"patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}
        vit = {"backbone": ("vit_tiny_patch16_224",), "image_size": 8 * side, "model_kwargs": sizes}
    return VLMConfig(
        data=(str(write_conversations(drawn, folder, size, config.seed)),),
        llm=str(folder / "llm"),
        llm_weights="none",
        weights="none",
        stage=config.stage or "finetune",
        max_length=round(MAX_LENGTH * scale),
        batch_size=batch,
        micro_batch=config.micro_batch,
        grad_checkpointing=config.grad_checkpointing,
        seed=config.seed,
        **vit,
    )


def _llm_config(name: str) -> PretrainedConfig:
    if name in LLAMAS:
        return LlamaConfig(**LLAMAS[name], max_position_embeddings=4096)
    return text_config(LLAMA_7B if name == "7b" else name)
