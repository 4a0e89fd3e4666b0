"""The network: vision tower, adapter, language model, and the processor in front of them."""
