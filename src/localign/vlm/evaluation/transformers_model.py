"""Any image-text-to-text model of transformers, as a model that answers benchmark questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from localign.errors import UserError
from localign.vlm.data.images import open_image
from localign.vlm.data.prompts import clean
from localign.vlm.evaluation.generation import greedy_texts
from localign.vlm.evaluation.model_base import LazyModel, Promptable
from localign.vlm.model.loading import load_pretrained
from localign.vlm.scoring.boxes import BoxFrame


class TransformersModel(LazyModel):
    """Any image-text-to-text model of transformers, prompted through its own chat template.

    Args:
        name: A folder, or a model on the Hub.
        fingerprint: Identifies the weights.
        device: Device of the weights.
        dtype: Type of the weights.
        frame: The frame of coordinates in the answers; the model itself does not declare one.
        commit: For a model on the Hub, the commit to load.

    Raises:
        UserError: There is no such model, or it has no chat template.
    """

    def __init__(
        self,
        name: str,
        fingerprint: str,
        device: torch.device,
        dtype: torch.dtype,
        frame: BoxFrame | None = None,
        commit: str | None = None,
    ) -> None:
        super().__init__(fingerprint, device, dtype, frame)
        self._name = name
        self._revision = {} if commit is None else {"revision": commit}
        self.identity |= self._revision
        self._processor = load_pretrained(AutoProcessor.from_pretrained, name, **self._revision)
        if not getattr(self._processor, "chat_template", None):
            raise UserError(f"the processor of {name} has no chat template, which questions need")
        self.tokenizer = self._processor.tokenizer
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def prompt(self, message: str) -> str:
        return str(self._processor.apply_chat_template(_chat(message), add_generation_prompt=True))

    def answer_texts(self, questions: Sequence[Promptable], max_new_tokens: int) -> list[str]:
        return greedy_texts(self.model, self.tokenizer, self._batch(questions), max_new_tokens)

    def _batch(self, questions: Sequence[Promptable]) -> Mapping[str, Any]:
        batch = self._processor.apply_chat_template(
            [_chat_of(question) for question in questions],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        inputs: Mapping[str, Any] = batch.to(self._device, dtype=self._dtype)
        return inputs

    def _choice_tokens(self, choice: str) -> list[int]:
        """The tokens of the choice where the template writes it after the prompt.

        If the template rewrites the prompt or the choice, the tokens of the choice alone.
        """
        prompt = self.prompt("?")
        answer = {"role": "assistant", "content": [{"type": "text", "text": choice}]}
        conversation = str(self._processor.apply_chat_template([*_chat("?"), answer]))
        prompt_ids = self._ids(prompt)
        if conversation.startswith(prompt) and choice in (after := conversation[len(prompt) :]):
            ids = self._ids(prompt + after[: after.index(choice) + len(choice)])
            if ids[: len(prompt_ids)] == prompt_ids:
                return ids[len(prompt_ids) :]
        ids = self._ids(prompt + choice)
        return ids[len(prompt_ids) :] if ids[: len(prompt_ids)] == prompt_ids else self._ids(choice)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _load(self) -> Any:
        load = AutoModelForImageTextToText.from_pretrained
        return load_pretrained(load, self._name, dtype=self._dtype, **self._revision)


def _chat(message: str, image: Any = None) -> list[dict[str, Any]]:
    """A question with an image, in transformers' format. Image marks in the message are deleted."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": clean(message)}]
    return [{"role": "user", "content": content}]


def _chat_of(question: Promptable) -> list[dict[str, Any]]:
    if question.image is not None:
        return _chat(question.message, open_image(question.image))
    return [{"role": "user", "content": [{"type": "text", "text": clean(question.message)}]}]
