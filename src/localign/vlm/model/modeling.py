"""The vision-language model as a transformers model: vision tower, adapter and causal language model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.generic import ModelOutput

from localign.backbones.native import NativeImages
from localign.errors import UserError
from localign.options.names import CrossEntropy
from localign.portable import VLM, VLM_CLASSES, add_code
from localign.portable.native_localign_vlm import Sizes
from localign.vlm.data.batching import RowCounts
from localign.vlm.data.vocabulary import add_special_tokens, end_tokens, resize_embeddings
from localign.vlm.model.adapters import Adapter, build_adapter
from localign.vlm.model.attention import packed_arguments, padded_turns_mask, use_packed_attention
from localign.vlm.model.configuration import LocalignVLMConfig, adapter_config, tower_configs
from localign.vlm.model.digests import check_weights, write_weights_list
from localign.vlm.model.loading import check_coverage, without_load_report
from localign.vlm.model.losses import LMHead, next_token_loss
from localign.vlm.model.vision import VisionTower
from localign.weights import check_finite

_CACHE_NAMES = ("cache", "past_key_values")
"""Names of the language model's cache argument: from transformers 5.24 on, and before."""


@dataclass
class VLMOutput(ModelOutput):
    """The output of a forward pass with labels."""

    loss: Tensor | None = None
    """float32 scalar: ``loss_sum / label_count``."""
    loss_sum: Tensor | None = None
    """float32 scalar: cross-entropy summed over the labelled tokens."""
    label_count: Tensor | None = None
    """int64 scalar: number of labelled tokens that were predicted."""
    logits: Tensor | None = None
    """Always None: the loss computes logits in chunks and keeps none."""


class LocalignVLM(PreTrainedModel, GenerationMixin):
    """A vision tower and an adapter turn images into embeddings that replace the image tokens in the text.

    The vision tower is frozen until ``vision.set_trainable(True)``. ``save_pretrained`` writes all weights, the
    tower's included, so ``from_pretrained`` needs no other source.

    Args:
        config: Describes the model; weights are random.
        parts: Vision tower, adapter and language model to use instead of building them.

    Raises:
        UserError: The config names no padding or image token, describes parts that cannot be built, or has a budget of
            patches that the tower cannot take.
    """

    config_class = LocalignVLMConfig
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: LocalignVLMConfig,
        parts: tuple[VisionTower, Adapter, PreTrainedModel] | None = None,
    ) -> None:
        super().__init__(config)
        if config.text_config.get_text_config().pad_token_id is None or config.image_token_id is None:
            raise UserError("the model's config names no padding token or no image token")
        if parts is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
            vision = VisionTower(tower_configs(config))
            adapter = build_adapter(adapter_config(config))
        else:
            vision, adapter, language_model = parts
            for part in parts:
                for module in part.modules():
                    module._is_hf_initialized = True  # type: ignore[assignment]
        # First, because transformers takes the first parameter's dtype for the model's.
        self.language_model: Any = language_model
        self.vision: VisionTower = vision
        self.adapter: Adapter = adapter
        if config.max_patches is not None:
            vision.check_native()
        use_packed_attention(self.language_model)
        cast(Any, self).post_init()  # untyped in transformers

    @classmethod
    def from_parts(
        cls,
        vision: VisionTower,
        adapter: Adapter,
        language_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_format: str = "in-out",
        resize: str = "naive",
        max_patches: int | None = None,
    ) -> LocalignVLM:
        """Assemble a model from parts, which are not copied.

        Adds an image token to the tokenizer in place, and a padding token if it has none, and grows the language
        model's embeddings to a multiple of 64 rows that covers them.

        Args:
            vision: The vision tower.
            adapter: Maps the tower's tokens to the language model's width.
            language_model: Any causal language model.
            tokenizer: The language model's tokenizer.
            prompt_format: Name of the prompt format.
            resize: How an image is brought to the tower's input size: ``naive``, ``letterbox`` or ``crop``.
            max_patches: Most patches of an image that keeps its aspect ratio; None if all images have one size.

        Raises:
            UserError: The tower takes images of one size only, the adapter does not fit the tower or the language
                model, or the tokenizer has no token that ends an answer.
        """
        adapter.config.check_fits(vision)
        embeddings: Any = language_model.get_input_embeddings()
        width = embeddings.weight.shape[1]
        if adapter.config.output_width != width:
            raise UserError(
                f"the {adapter.config.kind} adapter gives embeddings of {adapter.config.output_width} channels; "
                f"the language model ({language_model.config.model_type}) takes {width}"
            )
        ends = end_tokens(language_model, tokenizer, prompt_format)
        image_token_id = add_special_tokens(tokenizer)
        resize_embeddings(language_model, len(tokenizer))
        language_model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        config = LocalignVLMConfig(
            text_config=language_model.config,
            towers=[asdict(tower) for tower in vision.configs],
            adapter=asdict(adapter.config),
            image_token_id=image_token_id,
            prompt_format=prompt_format,
            resize=resize,
            max_patches=max_patches,
            attn_implementation=language_model.config._attn_implementation,
        )
        model = cls(config, (vision, adapter, language_model))
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=[image_token_id],
        )
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model that :meth:`save_pretrained` wrote, strictly; arguments as in transformers.

        Raises:
            UserError: Tensors are missing, unexpected or of the wrong shape (the error names them), or a weight
                file is damaged.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
        config = kwargs.get("config") or cls.config_class.from_pretrained(
            pretrained_model_name_or_path, trust_remote_code=False
        )
        kwargs["key_mapping"] = {f"^{re.escape(file)}": own for own, file in _names(config).items()}
        try:
            with without_load_report():
                loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise UserError(f"the weights in {pretrained_model_name_or_path} are damaged: {error}") from None
        model, info = loaded
        check_coverage(pretrained_model_name_or_path, len(model.state_dict()), info)
        check_weights(Path(pretrained_model_name_or_path))
        model.vision.init_non_persistent_buffers()
        model.vision.set_trainable(False)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the model as :mod:`localign.portable` reads it, with that code and the weight files' digests.

        Arguments are as in transformers.

        Raises:
            UserError: A weight is NaN or infinite. Nothing is written then.
        """
        state = kwargs.pop("state_dict", None) or self.state_dict()
        check_finite(state, "the model is not exported")
        self.config.lm_head_bias = getattr(self.get_output_embeddings(), "bias", None) is not None
        self.config.tie_word_embeddings = bool(self.config.text_config.get_text_config().tie_word_embeddings)
        super().save_pretrained(save_directory, state_dict=self._portable_state(state), **kwargs)
        if kwargs.get("is_main_process", True):
            add_code(Path(save_directory), VLM, VLM_CLASSES, "LocalignVLMForConditionalGeneration")
            write_weights_list(Path(save_directory))

    def _portable_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights under the names of the files, each tied weight once."""
        names = _names(cast(LocalignVLMConfig, self.config))
        tied: Any = self.all_tied_weights_keys
        renamed = {}
        for key, tensor in state.items():
            if key not in tied or tied[key] not in state:
                own = next(own for own in names if key.startswith(own))
                renamed[names[own] + key.removeprefix(own)] = tensor
        return renamed

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: every part has initialised itself."""

    def get_output_embeddings(self) -> nn.Module:
        """The language model's output layer."""
        layer: nn.Module = self.language_model.get_output_embeddings()
        return layer

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's output layer."""
        self.language_model.set_output_embeddings(new_embeddings)

    def set_max_patches(self, max_patches: int) -> None:
        """Take images of several sizes from now on: each keeps its aspect ratio and has at most this many patches.

        Raises:
            UserError: The tower takes images of one size only.
        """
        self.vision.check_native()
        self.config.max_patches, self.config.resize = max_patches, "naive"

    @property
    def num_image_tokens(self) -> int:
        """Tokens per image; of the largest if images have several sizes."""
        most = cast(LocalignVLMConfig, self.config).max_patches
        return self.vision.num_tokens if most is None else self.vision.num_prefix_tokens + most

    def get_image_features(
        self, pixel_values: Tensor, image_grids: Tensor | Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """Map images to embeddings of the language model.

        Args:
            pixel_values, image_grids: As for :meth:`forward`.

        Returns:
            ``(images, tokens per image, width)``; of images of several sizes the tokens of all, ``(tokens, width)``.

        Raises:
            ValueError: ``pixel_values`` do not fit the tower or ``image_grids``.
        """
        if (image_grids is None) != (self.config.max_patches is None):
            raise ValueError("image_grids go with models of native resolution, whose config has max_patches")
        if image_grids is None:
            features: Tensor = self.adapter(self.vision(pixel_values))
            return features
        images = NativeImages.of(pixel_values, image_grids)
        features = self.adapter(self.vision(images), Sizes(images, self.vision.grid))
        return features[images.valid(self.vision.num_prefix_tokens)]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        turns: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        cross_entropy: CrossEntropy = "chunked",
        counts: RowCounts | None = None,
        image_grids: Tensor | Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """The language model's output with ``logits``, or a :class:`VLMOutput` if there are labels.

        Args:
            input_ids: int64 ``(rows, tokens)``, with one image token per token of every image.
            pixel_values: uint8 ``(images, 3, height, width)``, in the order of the image tokens. In training mode
                a batch without images runs tower and adapter on a blank image, without effect on the output, so
                that all ranks of a sharded model run the same modules.
            attention_mask: ``(rows, cached tokens + tokens)``, 0 at padding.
            position_ids: int64 ``(rows, tokens)``; in a packed row they restart at 0 with every sequence.
            cu_seqlens: int32 ``(sequences + 1,)``, the sequence borders of a packed row, which must be the only row.
            turns: int64 ``(rows, tokens)`` for independent turns, see
                :func:`~localign.vlm.model.attention.turns_mask`; None for ordinary causal attention.
            labels: int64 ``(rows, tokens)``, aligned with ``input_ids``, -100 for tokens that are not learned.
            inputs_embeds: ``(rows, tokens, width)``, text and images, instead of ``input_ids``.
            logits_to_keep: Number of last positions that get logits (0: all), or their indices.
            cross_entropy: How to compute the loss, see :func:`~localign.vlm.model.losses.next_token_loss`.
            counts: Of the rows, if known. To count them the host waits for the device.
            image_grids: Rows and columns of patches of each image, int64 ``(images, 2)``, if images have several
                sizes. ``pixel_values`` are then patches, uint8 ``(images, longest, 3 * patch height * patch width)``.
            kwargs: Further arguments of the language model, such as its cache.

        Raises:
            UserError: A sequence is longer than the language model's positions, or the language model cannot
                keep packed sequences apart.
            ValueError: The numbers of images and image tokens disagree, or arguments exclude each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if input_ids is not None:
            inputs_embeds = self._embed(input_ids, pixel_values, image_grids, counts)
        elif pixel_values is not None:
            raise ValueError("inputs_embeds already contain the images; pixel_values go with input_ids")
        assert inputs_embeds is not None
        cache = next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)
        if cu_seqlens is not None:
            if cache is not None or position_ids is None or inputs_embeds.shape[0] != 1:
                raise ValueError("a packed row must be the only row, with position_ids and without cache")
            longest = int(torch.diff(cu_seqlens).max()) if counts is None else counts.longest
            self._check_length(longest)
            kwargs |= packed_arguments(
                self.language_model, inputs_embeds, position_ids, cu_seqlens, longest, turns
            )
        else:
            past = cache.get_seq_length() if cache is not None else 0
            self._check_length(int(past) + inputs_embeds.shape[1])
            if turns is not None:
                attention_mask = padded_turns_mask(
                    self.language_model, turns, attention_mask, inputs_embeds.dtype
                )
            kwargs["attention_mask"] = attention_mask
        kwargs |= {"inputs_embeds": inputs_embeds, "return_dict": True}
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        if labels is not None:
            return self._losses(labels, cu_seqlens, cross_entropy, counts and counts.predicted, kwargs)
        if cu_seqlens is not None:
            kwargs["use_cache"] = False
        outputs: ModelOutput = self.language_model(logits_to_keep=logits_to_keep, **kwargs)
        return outputs

    def _losses(
        self,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        cross_entropy: CrossEntropy,
        predicted: Tensor | None,
        arguments: dict[str, Any],
    ) -> VLMOutput:
        hidden = self.language_model.get_decoder()(**(arguments | {"use_cache": False})).last_hidden_state
        head = LMHead(self.get_output_embeddings(), self.config.text_config.get_text_config())
        loss_sum, count = next_token_loss(hidden, labels, head, cu_seqlens, cross_entropy, predicted)
        return VLMOutput(loss=loss_sum / count.clamp(min=1), loss_sum=loss_sum, label_count=count)

    def _embed(self, input_ids: Tensor, pixel_values: Tensor | None, image_grids: Any, counts: Any) -> Tensor:
        embeddings: Tensor = self.get_input_embeddings()(input_ids)
        is_image = input_ids == self.config.image_token_id
        images = 0 if pixel_values is None else len(pixel_values)
        if images == 0:
            native = self.config.max_patches is not None
            pixel_values, image_grids = self.vision.blank_image(native) if self.training else (None, None)
        features = None if pixel_values is None else self.get_image_features(pixel_values, image_grids)
        expected = features.shape[:-1].numel() if images and features is not None else 0
        actual = int(is_image.sum()) if counts is None else counts.image_tokens
        if actual != expected:
            raise ValueError(f"{images} images need {expected} image tokens, but the text has {actual}")
        if features is None:
            return embeddings
        # A blank image's features are written nowhere but stay in the graph, with a gradient of zero.
        return embeddings.masked_scatter(is_image.unsqueeze(-1), features.to(embeddings.dtype))

    def _check_length(self, length: int) -> None:
        config = self.config.text_config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise UserError(
                f"a sequence of {length:,} tokens is longer than the language model's {limit:,} positions"
            )


def _names(config: LocalignVLMConfig) -> dict[str, str]:
    """Beginnings of weights' names in :class:`LocalignVLM` -> in files.

    In files the language model is split: its output layer stands beside the base model.
    """
    with torch.device("meta"):
        llm: Any = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
    head = next(name for name, module in llm.named_modules() if module is llm.get_output_embeddings())
    return {
        f"language_model.{head}.": "lm_head.",
        f"language_model.{llm.base_model_prefix}.": "model.language_model.",
        "vision.": "model.vision.",
        "adapter.": "model.adapter.",
    }
