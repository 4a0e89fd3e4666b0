"""Vision-language models: a frozen ViT, an adapter, a causal language model."""
