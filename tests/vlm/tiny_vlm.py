"""Tiny parts of a vision-language model, built in memory without downloads."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from localign.backbones import Backbone
from localign.backbones.building import build_vit

TEXT_WIDTH = 32


def tiny_tokenizer(*, bos: bool = True, pad: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with one token per byte and Llama's special tokens, ``<s>`` and ``</s>``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<unk>"] + (["<PAD>"] if pad else [])
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<PAD>" if pad else None,
    )


def tiny_llm(kind: str = "llama", *, vocab_size: int = 259, seed: int = 0, **overrides: Any) -> Any:
    """A random causal language model of two layers, ``kind`` "llama" or "qwen", float32, eval mode."""
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "initializer_range": 0.2,
        **overrides,
    }
    torch.manual_seed(seed)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    return Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()


def tiny_backbone(
    name: str = "tiny", *, prefix: bool = True, image_size: int = 16, width: int = 16
) -> Backbone:
    """A random ViT of three blocks over a 2 x 2 grid of 8-pixel patches, with a class token if ``prefix``."""
    kwargs: dict[str, Any] = {
        "img_size": image_size,
        "patch_size": 8,
        "embed_dim": width,
        "depth": 3,
        "num_heads": 2,
    }
    if not prefix:
        kwargs |= {"class_token": False, "global_pool": "avg"}
    torch.manual_seed(1)
    vit = build_vit("vit_tiny_patch16_224", kwargs, pretrained=False)
    return Backbone(vit, name=name, architecture="vit_tiny_patch16_224", model_kwargs=kwargs).eval()
