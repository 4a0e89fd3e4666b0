"""Shapes of language models, for plans that download nothing."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from localign.vlm.model.loading import load_pretrained

KNOWN: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
"""Arguments of LlamaConfig by the model's name on the Hugging Face Hub."""


def text_config(name: str) -> PretrainedConfig:
    """The config of a causal language model from :data:`KNOWN`, a folder, the Hub's cache, or the Hub.

    Raises:
        UserError: The config cannot be read.
    """
    if name in KNOWN:
        return LlamaConfig(**KNOWN[name])
    config: PretrainedConfig = load_pretrained(
        AutoConfig.from_pretrained, name, failure="cannot read the language model's config,"
    )
    return config
