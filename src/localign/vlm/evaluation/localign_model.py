"""Vision-language models that localign exported, as models that answer benchmark questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from localign.vlm.data.images import open_image
from localign.vlm.data.prompts import IGNORE_INDEX, prompt_format
from localign.vlm.evaluation.generation import Query, greedy_answers
from localign.vlm.evaluation.model_base import LazyModel, Promptable
from localign.vlm.model.build import load_vlm
from localign.vlm.model.loading import load_pretrained
from localign.vlm.model.processing import LocalignVLMProcessor
from localign.vlm.scoring.boxes import ORIGINAL, BoxFrame


class LocalignModel(LazyModel):
    """A :class:`~localign.vlm.model.modeling.LocalignVLM` that localign exported.

    Args:
        folder: The export.
        fingerprint: Identifies the weights.
        device: Device of the weights.
        dtype: Type of the weights.
        frame: The frame of coordinates in the answers. The default for a model that stretches images is the original
            image. A model that pads or crops images has no default: its frame depends on its training conversations.

    Raises:
        UserError: The folder does not hold such a model.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        device: torch.device,
        dtype: torch.dtype,
        frame: BoxFrame | None = None,
    ) -> None:
        config = load_pretrained(AutoConfig.from_pretrained, folder)
        declared = ORIGINAL if frame is None and config.resize == "naive" else frame
        super().__init__(fingerprint, device, dtype, declared)
        self.tokenizer = load_pretrained(AutoTokenizer.from_pretrained, folder)
        self._folder = folder
        self._format = prompt_format(config.prompt_format)
        self.identity["prompt_format"] = config.prompt_format

    def prompt(self, message: str) -> str:
        return self._format.text(self.tokenizer, message)

    def answer_texts(self, questions: Sequence[Promptable], max_new_tokens: int) -> list[str]:
        queries = [Query(question.message, question.image) for question in questions]
        answers = greedy_answers(
            self.model,
            self._processor,
            queries,
            batch_size=len(queries),
            max_new_tokens=max_new_tokens,
        )
        return list(answers)

    @cached_property
    def _processor(self) -> LocalignVLMProcessor:
        return LocalignVLMProcessor.for_model(self.model, self.tokenizer)

    def _batch(self, questions: Sequence[Promptable]) -> Mapping[str, Any]:
        images = [None if question.image is None else open_image(question.image) for question in questions]
        return self._processor(text=[q.message for q in questions], images=images).to(self._device)

    def _choice_tokens(self, choice: str) -> list[int]:
        labels = self._format.conversation(self.tokenizer, [("?", choice)]).labels
        end = self._format.end_token_id(self.tokenizer)
        return [token for token in labels if token not in (IGNORE_INDEX, end)]

    def _load(self) -> Any:
        return load_vlm(self._folder)[0]
