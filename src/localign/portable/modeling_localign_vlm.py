"""A vision-language model that localign trained, for transformers with ``trust_remote_code=True``.

The base model and its output layer are separate modules, as servers such as vLLM need them. timm must be installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, cast

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers.mlp import SwiGLU
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from .configuration_localign_vlm import LocalignVLMConfig
from .modeling_localign_vit import ViTTower, build_vit, init_buffers
from .native_localign_vlm import Grid, NativeImages, Sizes, run_blocks, vit_tokens_of

NORM_EPS = 1e-5
CACHE_NAMES = ("cache", "past_key_values")
"""Names of the language model's cache: from transformers 5.24 on, and before."""


class LocalignVisionTower(nn.Module):
    """Backbones side by side, whose tokens are concatenated on channels."""

    def __init__(self, towers: list[dict[str, Any]]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(ViTTower(tower) for tower in towers)

    @property
    def grid(self) -> Grid:
        """Rows and columns of the position embedding."""
        vit: Any = self.towers[0].vit
        rows, columns = vit.patch_embed.grid_size
        return int(rows), int(columns)

    def forward(self, pixel_values: Tensor | NativeImages) -> Tensor:
        """uint8 ``(batch, 3, height, width)``, or images of several sizes, to tokens ``(batch, tokens, width)``."""
        native = isinstance(pixel_values, NativeImages)
        return torch.cat(
            [_native_tokens(t, pixel_values) if native else t(pixel_values) for t in self.towers], -1
        )


def _native_tokens(tower: Any, images: Any) -> Tensor:
    description, vit = tower.description, tower.vit
    mean, std = description["mean"], description["std"]
    images = images.normalised(mean, std, next(tower.parameters()).dtype)
    tokens = vit_tokens_of(vit, images, len(vit.blocks), description["position_interpolation"])
    if description["norm"] and description["final_norm"] != "none":
        tokens = getattr(vit, description["final_norm"])(tokens)
    return tokens if description["keep_prefix"] else tokens[:, int(vit.num_prefix_tokens) :]


class LocalignDecoderNorm(nn.LayerNorm):
    """LayerNorm with the decoder's epsilon."""

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(width, eps=NORM_EPS, **kwargs)


class PatchDecoder(nn.Module):
    """Position embedding, pre-norm transformer blocks, norm, linear layer."""

    def __init__(self, decoder: Mapping[str, Any], *, head: bool = True) -> None:
        super().__init__()
        width = decoder["width"]
        activation = getattr(nn, decoder["activation"], None) or getattr(timm.layers, decoder["activation"])
        gated: dict[str, Any] = {}
        if decoder.get("gated_width"):
            ratio, norm = decoder["gated_width"] / width, decoder["gated_norm"]
            gated = {"mlp_layer": SwiGLU, "mlp_ratio": ratio, "scale_mlp_norm": norm}
        self.pos_embed = nn.Parameter(torch.zeros(1, decoder["num_tokens"], width))
        self.blocks = nn.Sequential(
            *(
                Block(
                    dim=width,
                    num_heads=decoder["num_heads"],
                    qkv_bias=decoder["qkv_bias"],
                    init_values=decoder["layer_scale"],
                    norm_layer=LocalignDecoderNorm,
                    act_layer=activation,
                    **gated,
                )
                for _ in range(decoder["depth"])
            )
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, decoder["output_width"]) if head else nn.Identity()

    def forward(self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = run_blocks(self.blocks, tokens + (self.pos_embed if positions is None else positions), mask)
        output: Tensor = self.head(self.norm(x))
        return output


class LocalignLinearAdapter(nn.Module):
    def __init__(self, adapter: Mapping[str, Any]) -> None:
        super().__init__()
        self.head = nn.Linear(adapter["input_width"], adapter["output_width"])

    def forward(self, tokens: Tensor, sizes: Sizes | None = None) -> Tensor:
        embeddings: Tensor = self.head(tokens)
        return embeddings


class LocalignMLPAdapter(nn.Module):
    """``mlp``: two linear layers; ``fused-mlp``: three, of which the first widens."""

    def __init__(self, adapter: Mapping[str, Any]) -> None:
        super().__init__()
        width, output = adapter["input_width"], adapter["output_width"]
        widened = (4 * width,) if adapter["kind"] == "fused-mlp" else ()
        self.mlp = _mlp(width, *widened, output, output)

    def forward(self, tokens: Tensor, sizes: Sizes | None = None) -> Tensor:
        embeddings: Tensor = self.mlp(tokens)
        return embeddings


class LocalignDecoderAdapter(nn.Module):
    """Input projection, then a decoder; ``decoder`` hides prefix tokens from it, as alignment does."""

    def __init__(self, adapter: Mapping[str, Any]) -> None:
        super().__init__()
        self.in_proj = nn.Linear(adapter["input_width"], adapter["decoder"]["width"])
        self.decoder = PatchDecoder(adapter["decoder"])
        self.num_hidden = adapter["num_prefix_tokens"] if adapter["kind"] == "decoder" else 0

    def forward(self, tokens: Tensor, sizes: Sizes | None = None) -> Tensor:
        embeddings = self.in_proj(tokens)
        embeddings = F.pad(embeddings[:, self.num_hidden :], (0, 0, self.num_hidden, 0))
        output: Tensor = (
            self.decoder(embeddings) if sizes is None else sizes.decoded(self.decoder, embeddings)
        )
        return output


class LocalignFusedDecoderAdapter(nn.Module):
    """One backbone's tokens go through a decoder, then all tokens through an MLP."""

    def __init__(self, adapter: Mapping[str, Any]) -> None:
        super().__init__()
        decoder = adapter["decoder"]
        self.start, self.stop = adapter["decoder_channels"]
        aligned = self.stop - self.start
        self.num_prefix = decoder["num_tokens"] - adapter["num_tokens"]
        self.in_proj = nn.Linear(aligned, decoder["width"])
        self.decoder = PatchDecoder(decoder, head=False)
        width, output = adapter["input_width"] - aligned + decoder["width"], adapter["output_width"]
        self.mlp = _mlp(width, 4 * width, output, output)

    def forward(self, tokens: Tensor, sizes: Sizes | None = None) -> Tensor:
        embeddings = F.pad(self.in_proj(tokens[..., self.start : self.stop]), (0, 0, self.num_prefix, 0))
        decoded = self.decoder(embeddings) if sizes is None else sizes.decoded(self.decoder, embeddings)
        decoded = decoded[:, self.num_prefix :]
        fused = torch.cat([tokens[..., : self.start], decoded, tokens[..., self.stop :]], dim=-1)
        output: Tensor = self.mlp(fused)
        return output


class LocalignTruncatedAdapter(nn.Module):
    """The last blocks and the final norm of a ViT, then a linear layer."""

    def __init__(self, adapter: Mapping[str, Any]) -> None:
        super().__init__()
        blocks = adapter["blocks"]
        vit = build_vit(blocks)
        self.blocks = vit.blocks
        normed = blocks["norm"] and blocks["final_norm"] != "none"
        self.norm = getattr(vit, blocks["final_norm"]) if normed else nn.Identity()
        self.head = nn.Linear(adapter["input_width"], adapter["output_width"])
        self.num_prefix = adapter["num_prefix_tokens"]

    def forward(self, tokens: Tensor, sizes: Sizes | None = None) -> Tensor:
        mask = None if sizes is None else sizes.images.attention_mask(self.num_prefix)
        embeddings: Tensor = self.head(self.norm(run_blocks(self.blocks, tokens, mask)))
        return embeddings


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), nn.GELU()]
    return nn.Sequential(*layers[:-1])


ADAPTERS: dict[str, type[nn.Module]] = {
    "linear": LocalignLinearAdapter,
    "mlp": LocalignMLPAdapter,
    "fused-mlp": LocalignMLPAdapter,
    "transformer": LocalignDecoderAdapter,
    "decoder": LocalignDecoderAdapter,
    "truncated": LocalignTruncatedAdapter,
    "fused-decoder": LocalignFusedDecoderAdapter,
}


class _LocalignVLMBase(PreTrainedModel):
    config_class = LocalignVLMConfig
    config: LocalignVLMConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise nothing but buffers: every part has initialised its weights."""
        init_buffers(module)


class LocalignVLMModel(_LocalignVLMBase):
    """Vision tower, adapter and language model without output layer."""

    def __init__(self, config: LocalignVLMConfig) -> None:
        super().__init__(config)
        assert config.adapter is not None
        self.language_model = AutoModel.from_config(config.text_config)
        self.vision = LocalignVisionTower(config.towers)
        self.adapter = ADAPTERS[config.adapter["kind"]](config.adapter)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(
        self, pixel_values: Tensor, image_grids: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """Map images to embeddings of the language model.

        Args:
            pixel_values, image_grids: As for :meth:`forward`.

        Returns:
            ``last_hidden_state``, the tower's tokens, and ``pooler_output``, ``(images, tokens per image, width)``; of
            images of several sizes the tokens of each, a tuple of ``(tokens, width)``.
        """
        if (image_grids is None) != (self.config.max_patches is None):
            raise ValueError("image_grids go with models of native resolution, whose config has max_patches")
        sizes = None
        if image_grids is not None:
            longest = int(image_grids.prod(dim=1).max())  # servers pad all images alike
            sizes = Sizes(NativeImages.of(pixel_values[:, :longest], image_grids), self.vision.grid)
        tokens = self.vision(pixel_values if sizes is None else sizes.images)
        features: Any = self.adapter(tokens.to(next(self.adapter.parameters()).dtype), sizes)
        if sizes is not None:
            prefix = features.shape[1] - sizes.images.patches.shape[1]
            features = tuple(f[v] for f, v in zip(features, sizes.images.valid(prefix), strict=True))
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=features)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        image_grids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The language model's output, with images in the place of the image tokens.

        Args:
            input_ids: int64 ``(rows, tokens)``, with one image token per token of every image.
            pixel_values: uint8 ``(images, 3, height, width)``, in the order of the image tokens, not normalised. With
                ``image_grids``: patches, uint8 ``(images, longest, 3 * patch height * patch width)``.
            image_grids: Rows and columns of patches of each image, int64 ``(images, 2)``, if images have several
                sizes.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values go with input_ids; inputs_embeds contain the images")
            pooled: Any = self.get_image_features(pixel_values, image_grids).pooler_output
            features = torch.cat(tuple(pooled))  # the tokens of all images
            places = input_ids.eq(cast(int, self.config.image_token_id))
            if int(places.sum()) != len(features):
                raise ValueError(
                    f"{len(pixel_values)} images need {len(features)} image tokens, "
                    f"but the text has {int(places.sum())}"
                )
            inputs_embeds = inputs_embeds.masked_scatter(places[..., None], features.to(inputs_embeds.dtype))
        return self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)


class LocalignVLMForConditionalGeneration(_LocalignVLMBase, GenerationMixin):
    """The model with its output layer."""

    accepts_loss_kwargs = False

    def __init__(self, config: LocalignVLMConfig) -> None:
        super().__init__(config)
        self.model = LocalignVLMModel(config)
        embeddings: Any = self.model.get_input_embeddings()
        rows, width = embeddings.weight.shape
        self.lm_head = nn.Linear(width, rows, bias=bool(getattr(config, "lm_head_bias", False)))
        if getattr(config, "tie_word_embeddings", False):
            tied = next(n for n, p in self.model.named_parameters() if p is embeddings.weight)
            self._tied_weights_keys = {"lm_head.weight": f"model.{tied}"}
        self.post_init()  # type: ignore[no-untyped-call]

    def get_output_embeddings(self) -> nn.Module:
        layer: nn.Module = self.lm_head
        return layer

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As :meth:`LocalignVLMModel.get_image_features`."""
        features: BaseModelOutputWithPooling = self.model.get_image_features(pixel_values, **kwargs)
        return features

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        image_grids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the mean cross-entropy if there are labels.

        Args:
            input_ids, pixel_values, image_grids: As for :meth:`LocalignVLMModel.forward`.
            attention_mask: ``(rows, cached tokens + tokens)``, 0 at padding.
            labels: int64 ``(rows, tokens)``, not shifted, -100 for tokens that do not count.
            logits_to_keep: Number of last positions that get logits (0: all), or their indices.
        """
        outputs = self.model(input_ids, pixel_values, attention_mask, image_grids=image_grids, **kwargs)
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = scaled_logits(self.lm_head(hidden[:, kept]), self.config.text_config.get_text_config())
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        cache = next(({name: outputs[name]} for name in CACHE_NAMES if name in outputs.keys()), {})  # noqa: SIM118
        return CausalLMOutputWithPast(loss=loss, logits=logits, **cache)


def scaled_logits(logits: Tensor, config: Any) -> Tensor:
    """Scale and bound logits as the language model's own class does; configs have four names for it."""
    scale = 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    if scale != 1.0:
        logits = logits * scale
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)
