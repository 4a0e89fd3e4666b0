"""Vision-language models: a ViT, an adapter, a causal language model.

Importing this package registers the model with transformers' ``AutoConfig``, ``AutoModelForImageTextToText``
and ``AutoProcessor``.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from localign.vlm.model.configuration import LocalignVLMConfig
from localign.vlm.model.modeling import LocalignVLM, VLMOutput
from localign.vlm.model.processing import LocalignVLMProcessor

AutoConfig.register(LocalignVLMConfig.model_type, LocalignVLMConfig, exist_ok=True)
AutoModelForImageTextToText.register(LocalignVLMConfig, LocalignVLM, exist_ok=True)
AutoProcessor.register(LocalignVLMConfig, LocalignVLMProcessor, exist_ok=True)

__all__ = ["LocalignVLM", "LocalignVLMConfig", "LocalignVLMProcessor", "VLMOutput"]
