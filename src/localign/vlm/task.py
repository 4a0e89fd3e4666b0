"""Training a vision-language model as a task of the training loop (section 5, appendix D)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from localign.data.loader import BadImages
from localign.engine.batch import to_device
from localign.engine.distributed import DistributedContext, choose_device
from localign.engine.schedule import computes_in_bf16
from localign.engine.task import BatchPlan, StepResult, Task
from localign.options.names import CrossEntropy
from localign.options.vlm.train import VLMConfig
from localign.vlm.data.batching import VLMBatch, longest_batch, planned_batches, record_stream
from localign.vlm.data.examples import ConversationTokenizer
from localign.vlm.data.prompts import IGNORE_INDEX, prompt_format
from localign.vlm.data.records import Conversations
from localign.vlm.frozen import hold_in_bf16, holds_bf16, restore_float32
from localign.vlm.model.attention import check_independent_turns
from localign.vlm.model.build import build_vlm, merge_lora, save_vlm
from localign.vlm.model.losses import check_liger
from localign.vlm.model.modeling import LocalignVLM, VLMOutput
from localign.vlm.model.processing import LocalignVLMProcessor

_MONITORED_IMAGES = 8
"""Images per log line whose embeddings are measured."""
_HASHED_VALUES = 64
"""Values per frozen tensor that enter the fingerprint."""


class VLMTask(Task):
    """Next-token loss on the answers in conversations about images.

    Args:
        config: Model, data and stage.
        model: Trained instead of the model that the config describes; needs ``tokenizer``.
        tokenizer: The model's tokenizer.

    Raises:
        UserError: Data, a part of the model or the device is missing, damaged or does not fit.
    """

    def __init__(
        self,
        config: VLMConfig,
        model: LocalignVLM | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.config = config
        self.seed = config.seed
        self.device = torch.device("cpu")
        # Check device, packages and data first: reading weights takes minutes.
        device = choose_device(config.device)
        if config.cross_entropy == "liger":
            check_liger(device)
        self.data = _conversations(config, config.data)
        self.val_data = _conversations(config, config.val) if config.val else None
        if model is None or tokenizer is None:
            model, tokenizer = build_vlm(config)
        self.model, self.tokenizer = model, tokenizer
        self.processor = LocalignVLMProcessor.for_model(model, tokenizer)
        self.encoder = ConversationTokenizer(
            prompt_format(model.config.prompt_format),
            tokenizer,
            model.num_image_tokens,
            config.max_length,
            text_limit=config.published_quirks,
            independent=config.turns == "independent",
        )
        if self.encoder.independent:
            check_independent_turns(model.language_model)
        self._rounded: dict[str, Tensor] = {}
        self._frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
        self._frozen_hash = _fingerprint({n: p for n, p in model.named_parameters() if n in self._frozen})

    @property
    def module(self) -> LocalignVLM:
        return self.model

    def to(self, device: torch.device) -> None:
        if holds_bf16(self.config, device.type):
            self._rounded = hold_in_bf16(self.model)
        super().to(device)

    def samples(self) -> int:
        if self.config.sampler == "shuffled":
            return len(self.data)
        batch = self.config.batch_size
        plan = BatchPlan(self.seed, batch, batch, 0, 1, 0, 0, 1, False)
        return record_stream(self.data, plan, grouped=True).samples_per_epoch

    def fingerprint(self) -> dict[str, str]:
        return {"data": self.data.fingerprint(), "frozen weights": self._frozen_hash}

    def batches(self, plan: BatchPlan) -> Iterator[VLMBatch]:
        return planned_batches(
            self.data,
            self.encoder,
            self.processor.image_transform(),
            plan,
            packed=self.config.batching == "packed",
            grouped=self.config.sampler == "grouped",
            max_bad_share=self.config.max_bad_share,
        )

    def worst_case_batch(self, samples: int) -> VLMBatch:
        packed, batch = self.config.batching == "packed", self.config.batch_size
        return longest_batch(
            self.data,
            self.encoder,
            self.processor.image_transform(),
            samples,
            packed=packed,
            plan=BatchPlan(self.seed, batch, batch, 0, 1, 0, 0, 1, False) if packed else None,
        )

    def step(self, model: nn.Module, batch: VLMBatch) -> StepResult:
        return batch_loss(model, batch, self.config.cross_entropy)

    def lr_factors(self) -> Mapping[str, float]:
        if self.config.adapter_lr is None:
            return {}
        assert self.config.lr is not None  # checked by the config
        new_part = self.model.adapter.new_part
        factors = {} if new_part is None else {f"adapter.{new_part}": 1.0}
        return {**factors, "adapter": self.config.adapter_lr / self.config.lr}

    def monitor(self, batch: VLMBatch) -> dict[str, float]:
        """``image_text_ratio``: root mean square of image embeddings over that of answer embeddings.

        Empty for batches without images and for sharded models.
        """
        if not len(batch.images) or self.config.sharding != "none":
            return {}
        in_bf16 = computes_in_bf16(self.config, self.device.type)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, in_bf16):
            images = batch.images[:_MONITORED_IMAGES].to(self.device)
            image = self.model.get_image_features(images, batch.grids[:_MONITORED_IMAGES] or None)
            ids = batch.input_ids[batch.labels != IGNORE_INDEX].to(self.device)
            text = self.model.get_input_embeddings()(ids)
        return {
            "image_text_ratio": float(
                image.float().square().mean().sqrt() / text.float().square().mean().sqrt()
            )
        }

    def throughput(self, batch: VLMBatch) -> dict[str, int]:
        assert batch.counts is not None  # by the loader
        return {"tokens": batch.counts.tokens}

    def validate(self, module: nn.Module, context: DistributedContext) -> dict[str, float]:
        """The loss per labelled token on validation conversations."""
        if self.val_data is None:
            return {}
        limit = min(self.config.val_records or len(self.val_data), len(self.val_data))
        micro = self.micro_batch or max(1, self.config.batch_size // context.size)
        steps = -(-limit // (micro * context.size))
        plan = BatchPlan(0, micro * context.size, micro, context.rank, context.size, 0, 0, steps, False)
        sums = torch.zeros(2, device=self.device)
        batches = planned_batches(
            self.val_data, self.encoder, self.processor.image_transform(), plan, shuffle=False
        )
        # Every rank runs the same number of batches; records past the limit wrap around and are not counted.
        for batch in batches:
            result = self.step(module, to_device(_unlabel_from(batch, limit), self.device))
            sums += torch.stack([result.loss_sum, result.weight.float()])
        sums = context.all_reduce(sums)
        return {"val_loss": float(sums[0] / sums[1].clamp(min=1))}

    def check_skipped(self, images: Mapping[str, str]) -> None:
        BadImages(len(self.data), self.config.max_bad_share).add(tuple(images.items()))

    def set_grad_checkpointing(self) -> None:
        llm = self.model.language_model
        # Renamed in transformers 5.2x; earlier versions have only the second name.
        enable = getattr(llm, "activation_checkpointing_enable", llm.gradient_checkpointing_enable)
        enable({"use_reentrant": False})

    def compile(self) -> None:
        for layer in _layers(self.model):
            layer.compile()

    def shard_units(self, module: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(module, LocalignVLM)
        towers = [b for t in module.vision.backbones for b in t.vit.blocks] if module.vision.trainable else []
        return [*towers, *_layers(module)]

    def unsharded(self, module: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(module, LocalignVLM)
        return () if module.vision.trainable else (module.vision,)

    def checkpointed(self, name: str) -> bool:
        return name not in self._frozen

    def summary(self) -> dict[str, Any]:
        parts = {"vision": self.model.vision, "adapter": self.model.adapter, "llm": self.model.language_model}
        return {
            "backbone": self.model.vision.name,
            "adapter": self.model.adapter.config.kind,
            "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
            "trainable_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "conversations": len(self.data),
            "left_out": {
                "records": self.data.skipped,
                "images": list(self.data.missing[:20]),
                "malformed": self.data.malformed.count,
                "malformed_records": list(self.data.malformed.first),
            },
        }

    def export(self, module: nn.Module, folder: Path, provenance: dict[str, Any]) -> None:
        assert isinstance(module, LocalignVLM)
        restore_float32(module, self._rounded)
        module = merge_lora(module)
        module.config.localign = provenance
        save_vlm(module, self.processor, folder)


def _conversations(config: VLMConfig, files: Sequence[str]) -> Conversations:
    return Conversations.open(
        files,
        config.images,
        skip_missing=config.skip_missing,
        skip_malformed=config.skip_malformed,
        allow_outside=config.allow_outside,
    )


def batch_loss(model: nn.Module, batch: VLMBatch, cross_entropy: CrossEntropy) -> StepResult:
    """The model's summed loss over a batch, and the number of labelled tokens."""
    output: VLMOutput = model(
        input_ids=batch.input_ids,
        pixel_values=batch.images if len(batch.images) else None,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        cu_seqlens=batch.cu_seqlens,
        turns=batch.turns,
        labels=batch.labels,
        cross_entropy=cross_entropy,
        counts=None if batch.counts is None else batch.counts._replace(predicted=batch.predicted),
        image_grids=batch.grids or None,
    )
    assert output.loss_sum is not None
    assert output.label_count is not None
    return StepResult(output.loss_sum, output.label_count)


def _layers(model: LocalignVLM) -> list[nn.Module]:
    """The language model's blocks."""
    return list(model.language_model.get_decoder().layers)


def _unlabel_from(batch: VLMBatch, limit: int) -> VLMBatch:
    """The batch without labels in the records at positions ``limit`` and beyond."""
    excluded = torch.nonzero(batch.positions >= limit).flatten().tolist()
    if not excluded:
        return batch
    labels = batch.labels.clone()
    for number in excluded:
        if batch.cu_seqlens is None:
            labels[number] = IGNORE_INDEX
        else:
            labels[0, int(batch.cu_seqlens[number]) : int(batch.cu_seqlens[number + 1])] = IGNORE_INDEX
    return batch._replace(labels=labels, predicted=None)


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and a sample of the values, since hashing gigabytes takes too long.

    Empty for tensors on the meta device, on ranks that receive the main rank's weights later.
    """
    from localign.backbones.export import content_hash

    if any(tensor.is_meta for tensor in tensors.values()):
        return ""
    sampled = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().reshape(-1)
        stride = max(1, flat.numel() // _HASHED_VALUES)
        sampled[f"{name}{tuple(tensor.shape)}"] = flat[::stride].cpu().contiguous()
    return content_hash(sampled)[:16]
