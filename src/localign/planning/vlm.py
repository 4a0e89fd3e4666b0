"""The plan of a VLM training, made without weights: `localign plan` and `localign vlm train --dry-run`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from localign.alignment import AlignConfig
from localign.alignment.setup import fresh_student, starting_backbone
from localign.backbones import create_backbone, find_export
from localign.engine.schedule import total_steps, with_warmup_steps
from localign.errors import UserError
from localign.options.names import EMBEDDED, AdapterName
from localign.options.vlm.train import VLMConfig
from localign.planning.llms import text_config
from localign.planning.plan import GIB
from localign.recipes import read_recipe, recipe_names
from localign.vlm.data.mixtures import PUBLISHED_RECORDS
from localign.vlm.data.records import Conversations
from localign.vlm.data.vocabulary import ROWS_MULTIPLE
from localign.vlm.frozen import holds_bf16, roundable
from localign.vlm.model.adapters import Adapter
from localign.vlm.model.build import set_stage, vision_sources
from localign.vlm.model.configuration import LocalignVLMConfig
from localign.vlm.model.modeling import LocalignVLM
from localign.vlm.model.presets import VisionSource, build_vision
from localign.vlm.model.vision import VisionTower

_MASTER, _GRADIENT, _MOMENTS, _ROUNDED = 4, 4, 8, 2
"""Bytes per parameter. Trained: fp32 weights, fp32 gradients, AdamW's two moments. Frozen: fp32 weights, and bf16
weights of linear layers in unsharded runs."""

_RANKS_PER_NODE = 8
"""GPUs per node assumed for hybrid sharding."""


@dataclass(frozen=True)
class VLMPlan:
    """Size of a VLM training."""

    parameters: dict[str, int]
    """Number of parameters of vision, adapter and language model."""
    trainable: int
    """Number of parameters that the stage trains."""
    image_tokens: int
    """Tokens per image in the language model's sequence; of the largest if images have several sizes."""
    bytes_per_rank: int
    """Weights, gradients and optimizer state on one rank, without activations."""
    records: int | None
    """Conversations per epoch; None if the data is missing."""
    steps: int | None
    """Optimizer steps; None if the data is missing."""
    warmup_steps: int | None
    """Warm-up steps among them; None if the data is missing."""


def plan_vlm(config: VLMConfig) -> tuple[LocalignVLM, VLMPlan]:
    """Build the model of a run on the meta device, and its plan.

    Args:
        config: A backbone may be the folder of an alignment that has not run yet, such as ``runs/align/clip-vit-b``.
            It is planned as the recipe of the same name, ``align/clip-vit-b``.

    Raises:
        UserError: A part does not exist, or does not fit another part.
    """
    if config.init is not None:
        raise UserError("plans need --backbone, --adapter and --llm; leave --init out")
    with torch.device("meta"):
        llm = text_config(config.llm)
        tower, adapter = build_vision(
            config.adapter,
            [_planned(name, config) for name in config.backbone],
            llm.get_text_config().hidden_size,
            published_quirks=config.published_quirks,
        )
        model = set_stage(LocalignVLM(_model_config(llm, tower, adapter, config.max_patches)), config)
    parts: dict[str, nn.Module] = {
        "vision": model.vision,
        "adapter": model.adapter,
        "language model": model.language_model,
    }
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = {"none": 1, "full": config.plan_ranks, "hybrid": min(config.plan_ranks, _RANKS_PER_NODE)}[
        config.sharding
    ]
    taken = trainable * (_MASTER + _GRADIENT + _MOMENTS) // share + _frozen_bytes(model, config, share)
    records = _records(config)
    steps = warmup = None
    if records is not None:
        counted = with_warmup_steps(config, records)
        steps, warmup = total_steps(counted, records), counted.warmup_steps
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return model, VLMPlan(counts, trainable, model.num_image_tokens, taken, records, steps, warmup)


def _frozen_bytes(model: LocalignVLM, config: VLMConfig, share: int) -> int:
    """Bytes of frozen weights on a rank, as training on CUDA holds them; a frozen tower is not sharded."""
    frozen = {n: p.numel() for n, p in model.named_parameters() if not p.requires_grad}
    tower = sum(count for name, count in frozen.items() if name.startswith("vision."))
    rounded = sum(p.numel() for p in roundable(model).values()) if holds_bf16(config, "cuda") else 0
    full = tower + (sum(frozen.values()) - tower) // share - rounded
    return _MASTER * full + _ROUNDED * rounded


def _model_config(
    llm: PretrainedConfig, tower: VisionTower, adapter: Adapter, max_patches: int | None
) -> LocalignVLMConfig:
    """The config after padding and image tokens were added to the tokenizer."""
    text = llm.get_text_config()
    pad, image = text.vocab_size, text.vocab_size + 1
    text.pad_token_id, text.vocab_size = pad, -(-(image + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    return LocalignVLMConfig(
        llm,
        [asdict(c) for c in tower.configs],
        asdict(adapter.config),
        image_token_id=image,
        max_patches=max_patches,
    )


def _planned(name: str, config: VLMConfig) -> VisionSource:
    if name == EMBEDDED or find_export(name) is not None:
        with torch.device("cpu"):  # weights are loaded for their shapes, then moved to the meta device
            (source,) = vision_sources(_with_backbone(config, name))
        return VisionSource(
            source.backbone.to("meta"), source.aligned, source.student.to("meta") if source.student else None
        )
    recipe = f"align/{Path(name).name}"
    if Path(name).parent.name and recipe in recipe_names():
        values = read_recipe(recipe, "align").values
        aligned = AlignConfig(**{**values, "weights": "none", "image_size": config.image_size})
        student = fresh_student(aligned, starting_backbone(aligned))
        return VisionSource(student.encoder.backbone, True, student)
    backbone = create_backbone(
        name, weights="none", image_size=config.image_size, model_kwargs=config.model_kwargs
    )
    return VisionSource(backbone)


def _with_backbone(config: VLMConfig, name: str) -> VLMConfig:
    single: dict[AdapterName, AdapterName] = {"fused-decoder": "decoder", "fused-mlp": "mlp"}
    return replace(config, backbone=(name,), adapter=single.get(config.adapter, config.adapter))


def _records(config: VLMConfig) -> int | None:
    if all(Path(file).is_file() for file in config.data):
        return len(
            Conversations.open(
                config.data,
                config.images,
                skip_missing=config.skip_missing,
                skip_malformed=config.skip_malformed,
                allow_outside=config.allow_outside,
            )
        )
    known = [PUBLISHED_RECORDS.get(Path(file).name) for file in config.data]
    return sum(k for k in known if k is not None) if None not in known else None


def print_vlm_plan(plan: VLMPlan, ranks: int) -> None:
    """Print a plan: parameters, tokens per image, memory per rank, steps."""
    total = sum(plan.parameters.values())
    for name, count in plan.parameters.items():
        print(f"{name:<16} {count:>14,} parameters")
    print(f"{'total':<16} {total:>14,} parameters, {plan.trainable:,} of them trained")
    print(f"{'image':<16} {plan.image_tokens:>14,} tokens")
    print(
        f"{'memory':<16} {plan.bytes_per_rank / GIB:>10.1f} GiB on each of {ranks} ranks, before activations"
    )
    if plan.records is None or plan.steps is None:
        print("steps            unknown: the data is missing")
    else:
        warmup = f"{plan.warmup_steps:,} of them warm-up ({plan.records:,} conversations)"
        print(f"{'steps':<16} {plan.steps:>14,}, {warmup}")
