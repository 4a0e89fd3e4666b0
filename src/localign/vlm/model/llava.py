"""LLaVA models of transformers: their parts for ours, and ours as theirs where both compute the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from localign import rng
from localign.backbones import Backbone
from localign.backbones.families.parity import relative_difference
from localign.backbones.families.writing import save_transformers
from localign.errors import UserError
from localign.files import refilling_folder
from localign.portable.processing_localign_vlm import prompt_template
from localign.text.printing import printable
from localign.vlm.data.dialects import IMAGE_MARK
from localign.vlm.model.adapters import Adapter, AdapterConfig, MLPAdapter, build_adapter
from localign.vlm.model.loading import load_pretrained
from localign.vlm.model.modeling import LocalignVLM
from localign.vlm.model.processing import LocalignVLMProcessor
from localign.vlm.model.vision import TowerConfig, VisionTower

MODEL_TYPES = ("llava", "llava_next")
TOWERS = ("clip", "siglip", "dinov2", "vit")
"""Families whose towers transformers' LLaVA class runs."""
TOLERANCE = 1e-4
"""Largest difference of a logit, divided by the logits' root mean square."""


@dataclass(frozen=True)
class LlavaParts:
    """The parts of a LLaVA model that a swap can keep."""

    language_model: PreTrainedModel
    """The causal language model, float32."""
    tokenizer: PreTrainedTokenizerBase
    config: Any
    """transformers' config of the whole model."""
    projector: Any
    """Two linear layers, ``linear_1`` and ``linear_2``."""
    resize: str
    """How its image processor makes an image square: ``naive``, ``letterbox`` or ``crop``."""

    def kept_projector(self, backbone: Backbone) -> tuple[VisionTower, Adapter]:
        """The backbone, read where the LLaVA model reads its own, and the LLaVA model's projector.

        Raises:
            UserError: The projector takes tokens of another width or of several blocks, or has another activation.
        """
        layer, first = self.config.vision_feature_layer, self.projector.linear_1
        if not isinstance(layer, int):
            raise UserError(f"--adapter keep: the projector takes the tokens of several blocks, {layer}")
        if self.config.projector_hidden_act != "gelu" or first.bias is None:
            raise UserError(
                "--adapter keep: the projector is not two linear layers with biases and an exact GELU"
            )
        if first.in_features != backbone.width:
            raise UserError(
                f"--adapter keep: the projector takes tokens of {first.in_features} channels, "
                f"but {backbone.name} gives {backbone.width}; give --adapter mlp or decoder"
            )
        keep_prefix = self.config.vision_feature_select_strategy == "full"
        # transformers counts the embeddings before the first block as layer 0.
        config = TowerConfig.of(backbone, layer=layer - (layer > 0), norm=False, keep_prefix=keep_prefix)
        tower = VisionTower([config], [backbone])
        adapter = build_adapter(
            AdapterConfig("mlp", tower.width, first.out_features, tower.num_tokens, tower.num_prefix_tokens)
        )
        assert isinstance(adapter, MLPAdapter)
        adapter.mlp[0].load_state_dict(first.state_dict())
        adapter.mlp[2].load_state_dict(self.projector.linear_2.state_dict())
        return tower, adapter


def read_llava(source: str) -> LlavaParts:
    """Read a LLaVA model in transformers' format in float32, on the CPU.

    Args:
        source: A folder, or a name on the Hub.

    Raises:
        UserError: It cannot be loaded, or is of another kind.
    """
    config: Any = load_pretrained(AutoConfig.from_pretrained, source, failure="cannot load the LLaVA model")
    if config.model_type not in MODEL_TYPES:
        raise UserError(
            f"{printable(source)} is a {printable(config.model_type)}, not a LLaVA model; "
            f"models that can be read: {', '.join(MODEL_TYPES)}"
        )
    whole: Any = load_pretrained(AutoModelForImageTextToText.from_pretrained, source, dtype=torch.float32)
    with torch.device("meta"):
        llm: Any = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
    setattr(llm, llm.base_model_prefix, whole.model.language_model)
    llm.set_output_embeddings(whole.lm_head)
    llm.generation_config = whole.generation_config
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, source, failure="cannot load the tokenizer of")
    images: Any = load_pretrained(
        AutoImageProcessor.from_pretrained, source, failure="cannot load the image processor of"
    )
    padded, cropped = getattr(images, "do_pad", False), getattr(images, "do_center_crop", False)
    resize = "letterbox" if padded else "crop" if cropped else "naive"
    return LlavaParts(llm.eval(), tokenizer, config, whole.model.multi_modal_projector, resize)


def save_llava(model: LocalignVLM, processor: LocalignVLMProcessor, folder: Path) -> float:
    """Write a model as a folder that transformers' ``LlavaForConditionalGeneration`` loads, and compare both.

    Args:
        model: In eval mode. Its weights are written in its dtype.
        processor: The model's processor.
        folder: Created if it does not exist.

    Returns:
        The largest difference of a logit on random pixels, divided by the logits' root mean square.

    Raises:
        UserError: LLaVA cannot compute what the model computes. Nothing is written then.
    """
    _check_structure(model)
    tower = _tower(model)
    twin: Any = LlavaForConditionalGeneration(_llava_config(model, tower.config)).eval()
    twin.model.vision_tower = tower
    twin.model.language_model.load_state_dict(model.language_model.base_model.state_dict())
    twin.lm_head.load_state_dict(model.get_output_embeddings().state_dict())
    projector, mlp = twin.model.multi_modal_projector, cast(Any, model.adapter).mlp
    projector.linear_1.load_state_dict(mlp[0].state_dict())
    projector.linear_2.load_state_dict(mlp[2].state_dict())
    twin.to(model.dtype)
    difference = _difference(model, twin)
    if not difference <= TOLERANCE:
        raise UserError(f"the LLaVA model's logits differ by {difference:.2g} of their root mean square")
    twin.generation_config = GenerationConfig(**model.generation_config.to_dict())
    with refilling_folder(
        folder, ("model*.safetensors", "model*.safetensors.index.json"), "config.json"
    ) as new:
        twin.save_pretrained(new)
        _llava_processor(model, processor).save_pretrained(new)
    return difference


def _check_structure(model: LocalignVLM) -> None:
    if model.config.max_patches is not None:
        raise UserError(
            "the format llava takes images of one size, but the model was trained with --max-patches "
            f"{model.config.max_patches}; --format localign keeps them"
        )
    tower = model.vision.configs[0]
    if len(model.vision.configs) > 1 or model.adapter.config.kind != "mlp":
        raise UserError(
            f"the format llava takes one tower and an mlp adapter, not {model.vision.name} and "
            f"{model.adapter.config.kind}; --format localign keeps them"
        )
    if tower.norm or tower.soft_cap is not None:
        reason = "applies its final norm to the tokens" if tower.norm else "has soft-capped attention"
        raise UserError(f"the tower {tower.name} {reason}, which LLaVA does not; --format localign keeps it")
    prefix = model.vision.backbones[0].num_prefix_tokens
    if prefix > 1 and not tower.keep_prefix:
        raise UserError(f"the tower {tower.name} drops {prefix} prefix tokens, but LLaVA drops one")


def _strategy(model: LocalignVLM) -> Literal["default", "full"]:
    drops = model.vision.backbones[0].num_prefix_tokens and not model.vision.configs[0].keep_prefix
    return "default" if drops else "full"


def _llava_config(model: LocalignVLM, vision: PretrainedConfig) -> LlavaConfig:
    return LlavaConfig(
        vision_config=vision,
        text_config=model.config.text_config,
        image_token_index=model.config.image_token_id,
        image_seq_length=model.vision.num_tokens,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,  # the tower has no later blocks
        vision_feature_select_strategy=_strategy(model),
        tie_word_embeddings=bool(model.config.text_config.get_text_config().tie_word_embeddings),
    )


def _tower(model: LocalignVLM) -> PreTrainedModel:
    """The tower as a model of its transformers family. A final norm that is not used gets unit weights."""
    backbone = model.vision.backbones[0].copy().float()
    backbone.vit.norm = nn.LayerNorm(backbone.width)
    backbone.final_norm = "norm"
    reasons = []
    for family in TOWERS:
        with TemporaryDirectory() as folder:
            try:
                save_transformers(backbone, Path(folder), family)
            except UserError as error:
                reasons.append(str(error))
                continue
            tower: PreTrainedModel = load_pretrained(AutoModel.from_pretrained, folder, dtype=torch.float32)
            return tower
    raise UserError("; ".join(reasons))


@torch.no_grad()
def _difference(model: LocalignVLM, twin: Any) -> float:
    pixels = torch.from_numpy(
        rng.generator(0, "llava comparison").integers(0, 256, (1, 3, *model.vision.image_size), dtype="uint8")
    )
    text = torch.arange(3, 19)[None]
    ids = torch.cat([torch.full((1, model.vision.num_tokens), model.config.image_token_id), text], dim=1)
    images = model.vision.backbones[0].normalise(pixels).to(twin.dtype)
    ours = model(input_ids=ids, pixel_values=pixels).logits.float()
    theirs = twin(input_ids=ids, pixel_values=images).logits.float()
    return relative_difference([(ours, theirs)])


def _llava_processor(model: LocalignVLM, processor: LocalignVLMProcessor) -> LlavaProcessor:
    rows, columns = model.vision.image_size
    backbone = model.vision.backbones[0]
    statistics: dict[str, Any] = {"image_mean": list(backbone.mean), "image_std": list(backbone.std)}
    statistics["resample"] = Image.Resampling[processor.interpolation.upper()]
    size = {"height": rows, "width": columns}
    if processor.resize == "letterbox":
        images: Any = LlavaImageProcessor(do_pad=True, size=size, do_center_crop=False, **statistics)
    elif processor.resize == "crop":
        images = CLIPImageProcessor(size={"shortest_edge": min(rows, columns)}, crop_size=size, **statistics)
    else:
        images = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False, **statistics)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=processor.tokenizer,
        patch_size=backbone.patch_size[0],
        vision_feature_select_strategy=_strategy(model),
        chat_template=prompt_template(processor.prompt_format, processor.tokenizer),
        image_token=IMAGE_MARK,
        num_additional_image_tokens=backbone.num_prefix_tokens,
    )
