"""Build, load and save vision-language models."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers.activations import QuickGELU
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from localign import rng
from localign.alignment import load_student
from localign.backbones import create_backbone, find_export
from localign.backbones.export import CONFIG_FILE, read_config
from localign.backbones.publishing.cards import Card, write_card
from localign.engine.distributed import is_main_process
from localign.errors import UserError
from localign.files import refilling_folder
from localign.options.vlm.tools import SwapConfig
from localign.options.vlm.train import VLMConfig
from localign.text.printing import first_line, printable
from localign.vlm.model.configuration import LocalignVLMConfig
from localign.vlm.model.llava import read_llava
from localign.vlm.model.loading import load_pretrained
from localign.vlm.model.modeling import LocalignVLM
from localign.vlm.model.presets import VisionSource, build_vision
from localign.vlm.model.processing import LocalignVLMProcessor

transformers_logging.disable_progress_bar()  # localign shows its own


def build_vlm(config: VLMConfig) -> tuple[LocalignVLM, PreTrainedTokenizerBase]:
    """The model that a run starts from and its tokenizer.

    The model is float32 on the CPU. Parts that the stage does not train are frozen.

    In sharded runs only the first rank reads the weights of the language model or of ``init``. Other ranks build
    them on the meta device and receive their shards when the model is sharded, so that a node does not hold the
    weights once per GPU.

    Raises:
        UserError: A part is missing or damaged, or does not fit another part.
    """
    empty = config.sharding != "none" and not is_main_process()
    if config.init is not None:
        model, tokenizer = (_empty_vlm if empty else load_vlm)(config.init)
        if config.max_patches is not None:
            model.set_max_patches(config.max_patches)
    else:
        llm, tokenizer = load_language_model(config, empty=empty)
        tower, adapter = build_vision(
            config.adapter,
            vision_sources(config),
            llm.config.get_text_config().hidden_size,
            seed=config.seed,
            published_quirks=config.published_quirks,
        )
        model = LocalignVLM.from_parts(
            tower,
            adapter,
            llm,
            tokenizer,
            prompt_format=config.prompt,
            resize=config.resize,
            max_patches=config.max_patches,
        )
    return set_stage(model, config), tokenizer


def swap(config: SwapConfig) -> tuple[LocalignVLM, PreTrainedTokenizerBase]:
    """A LLaVA model with another tower and adapter, and its tokenizer. The model is float32 on the CPU.

    Raises:
        UserError: A part is missing or damaged, or does not fit another part.
    """
    parts = read_llava(config.llava)
    sources = vision_sources(config)
    if config.adapter == "keep":
        tower, adapter = parts.kept_projector(sources[0].backbone)
    else:
        width = parts.language_model.config.get_text_config().hidden_size
        quirks = config.published_quirks
        tower, adapter = build_vision(
            config.adapter, sources, width, seed=config.seed, published_quirks=quirks
        )
    resize = parts.resize if config.resize == "auto" else config.resize
    model = LocalignVLM.from_parts(
        tower, adapter, parts.language_model, parts.tokenizer, prompt_format=config.prompt, resize=resize
    )
    return model.eval(), parts.tokenizer  # type: ignore[no-untyped-call]


def load_vlm(folder: str | Path) -> tuple[LocalignVLM, PreTrainedTokenizerBase]:
    """Load a model in float32, with its tokenizer, from an export folder or a run folder.

    Raises:
        UserError: The folder holds no model, or the model is damaged.
    """
    folder = _model_folder(folder)
    model = load_pretrained(LocalignVLM.from_pretrained, folder, dtype=torch.float32)
    return model, load_pretrained(
        AutoTokenizer.from_pretrained, folder, failure="cannot load the tokenizer of"
    )


def _empty_vlm(folder: str | Path) -> tuple[LocalignVLM, PreTrainedTokenizerBase]:
    """Like :func:`load_vlm`, with the model on the meta device."""
    folder = _model_folder(folder)
    config: Any = load_pretrained(LocalignVLMConfig.from_pretrained, folder)
    with torch.device("meta"):
        model = LocalignVLM(config)
    return model, load_pretrained(
        AutoTokenizer.from_pretrained, folder, failure="cannot load the tokenizer of"
    )


def _model_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if (folder / "export").is_dir():
        folder = folder / "export"
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder} holds no model: it has no {CONFIG_FILE}")
    return folder


def save_vlm(model: LocalignVLM, processor: LocalignVLMProcessor, folder: Path) -> Path:
    """Write model and processor to a transformers folder; returns the folder. Files of others in it stay."""
    with refilling_folder(
        folder, ("model*.safetensors", "model*.safetensors.index.json"), CONFIG_FILE
    ) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
    write_card(folder, vlm_card(model, folder))
    return folder


def vlm_card(
    model: LocalignVLM, folder: Path, format: str = "localign", repository: str | None = None
) -> Card:
    """The model card of an exported vision-language model; see :class:`~localign.backbones.publishing.cards.Card`."""
    llm = type(model.language_model).__name__
    most = "" if model.config.max_patches is None else "at most "
    return Card(
        title=folder.absolute().name,
        what=f"A vision-language model: the vision tower {printable(model.vision.name)}, an adapter of kind "
        f"{model.adapter.config.kind}, and a language model of class {llm}; "
        f"{most}{model.num_image_tokens} tokens per image.",
        format=format,
        provenance=getattr(model.config, "localign", None) or {},
        repository=repository,
    )


def vision_sources(config: VLMConfig | SwapConfig) -> list[VisionSource]:
    """The backbones of a run or swap. A backbone whose decoder becomes the adapter comes with its student.

    Raises:
        UserError: A backbone cannot be created, or ``--features aligned`` names one that was not aligned.
    """
    return [_source(name, config) for name in config.backbone]


def _source(name: str, config: VLMConfig | SwapConfig) -> VisionSource:
    folder = find_export(name)
    if folder is None:
        if config.features == "aligned" and len(config.backbone) == 1:
            raise UserError(f"--features aligned needs an export folder of `localign align`; {name} is none")
        create = partial(
            create_backbone,
            name,
            weights=config.weights,
            image_size=config.image_size,
            attention=config.attention,
            seed=config.seed,
        )
        backbone = create(model_kwargs=config.model_kwargs)
        # The published code runs a fused CLIP tower, trained with quick GELU, with exact GELU.
        fused = len(config.backbone) > 1
        if config.published_quirks and fused and backbone.activation is QuickGELU:
            backbone = create(model_kwargs={**config.model_kwargs, "act_layer": "gelu"})
        return VisionSource(backbone)
    section = read_config(folder)["localign"]
    aligned = (
        section["provenance"].get("command") == "align"
        if config.features == "auto"
        else config.features == "aligned"
    )
    if aligned and config.adapter in ("decoder", "fused-decoder"):
        student = load_student(folder, image_size=config.image_size, attention=config.attention)
        return VisionSource(student.encoder.backbone, True, student)
    backbone = create_backbone(str(folder), image_size=config.image_size, attention=config.attention)
    return VisionSource(backbone, aligned)


def export_folder(name: str) -> Path | None:
    """The folder that a vision-language model's name points to, directly or as a run; None for other names."""
    for folder in (Path(name) / "export", Path(name)):
        if (folder / CONFIG_FILE).is_file():
            return folder
    return None


def load_language_model(
    config: VLMConfig, *, empty: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the causal language model in float32, and its tokenizer, from the Hub, its cache or a folder.

    Args:
        config: Names the language model.
        empty: Build the model on the meta device, without weights.

    Raises:
        UserError: The model cannot be loaded, or is no causal language model.
    """
    tokenizer = load_tokenizer(config.llm)
    failure, attention = "cannot load the language model", config.llm_attention
    if not empty and config.llm_weights != "none":
        load = AutoModelForCausalLM.from_pretrained
        options = {"dtype": torch.float32, "attn_implementation": attention}
        return load_pretrained(load, config.llm, failure=failure, **options), tokenizer
    described = load_pretrained(AutoConfig.from_pretrained, config.llm, failure=failure)
    device = torch.device("meta" if empty else "cpu")
    try:
        with device, rng.seeded_globals(config.seed, "language model"):
            llm = AutoModelForCausalLM.from_config(
                described, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
            )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{failure} {printable(config.llm)}: {first_line(error)}") from None
    return llm, tokenizer


def load_tokenizer(llm: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model. Raises UserError if it cannot be loaded."""
    tokenizer: PreTrainedTokenizerBase = load_pretrained(
        AutoTokenizer.from_pretrained, llm, failure="cannot load the language model"
    )
    return tokenizer


def set_stage(model: LocalignVLM, config: VLMConfig) -> LocalignVLM:
    """Freeze the parts that the stage does not train, in place; stage ``lora`` adds the low-rank updates."""
    model.requires_grad_(True)
    model.vision.set_trainable(config.stage == "full-finetune")
    if config.stage == "align":
        model.language_model.requires_grad_(False)
    if config.stage == "lora":
        model.language_model = _with_lora(model.language_model, config)
    return model


def _with_lora(llm: nn.Module, config: VLMConfig) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("--stage lora needs the package peft: pip install 'localign[lora]'") from None
    lora = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with rng.seeded_globals(config.seed, "lora"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(llm, lora)


def merge_lora(model: LocalignVLM) -> LocalignVLM:
    """Merge low-rank updates, if there are any, into the language model's weights, in place."""
    llm: Any = model.language_model
    if hasattr(llm, "merge_and_unload"):
        model.language_model = llm.merge_and_unload()
    return model
