"""Models that benchmarks are put to, behind one small interface.

A model is opened without its weights: prompts, and whether choices can be compared, are known before these are
loaded, and where all answers are there already they never are.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from localign.backbones.export import CONFIG_FILE
from localign.errors import UserError
from localign.vlm.data.images import open_image
from localign.vlm.data.prompts import IGNORE_INDEX, clean, prompt_format
from localign.vlm.evaluation.generation import Query, first_token_probabilities, greedy_answers, greedy_texts
from localign.vlm.model.build import export_folder, load_vlm
from localign.vlm.model.configuration import LocalignVLMConfig
from localign.vlm.model.processing import LocalignVLMProcessor
from localign.vlm.scoring.base import Question
from localign.vlm.scoring.boxes import ORIGINAL, BoxFrame

_BLOCK = 2**24


class Promptable(Protocol):
    """What is put to a model; a :class:`Question` is."""

    @property
    def message(self) -> str:
        """Without the prompt format's words."""

    @property
    def image(self) -> Any:
        """A PIL image, a path, or None."""


class AnsweringModel(Protocol):
    """What answers questions."""

    @property
    def identity(self) -> Mapping[str, str]:
        """All that answers depend on beside the prompt and the image: the weights' hash, their precision."""

    @property
    def frame(self) -> BoxFrame | None:
        """What coordinates in its answers refer to; None where it is not known."""

    def prompt(self, message: str) -> str:
        """The message with all words of the prompt format."""

    def check_choices(self, choices: Sequence[str]) -> None:
        """Raises UserError if choices cannot be compared by their first token."""

    def answer_texts(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """Greedy answers to a batch of questions, each the same as if asked alone."""

    def choice_probabilities(self, questions: Sequence[Question]) -> list[list[float]]:
        """For each question of a batch, the probability of each choice as the answer's first token."""


class _OnDevice(ABC):
    """A model of transformers', loaded when it is first asked.

    Args:
        fingerprint: Stands for the weights, see :func:`fingerprint_of`.
        device: Where it works.
        dtype: Of the weights.
        frame: What coordinates in its answers refer to.
    """

    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self, fingerprint: str, device: torch.device, dtype: torch.dtype, frame: BoxFrame | None
    ) -> None:
        self.identity = {"weights": fingerprint, "dtype": str(dtype).removeprefix("torch.")}
        self.frame = frame
        self._device, self._dtype = device, dtype
        self._tokens: dict[str, int] = {}

    @abstractmethod
    def prompt(self, message: str) -> str:
        """The message with all words of the prompt format."""

    @abstractmethod
    def answer_texts(self, questions: Sequence[Promptable], max_new_tokens: int) -> list[str]:
        """Greedy answers to a batch; either all are on an image or none is."""

    @abstractmethod
    def _choice_tokens(self, choice: str) -> list[int]:
        """The tokens that an answer of this choice consists of, without those that end it."""

    @abstractmethod
    def _batch(self, questions: Sequence[Promptable]) -> Mapping[str, Any]:
        """What the model takes, on its device, padded on the left."""

    @cached_property
    def model(self) -> Any:
        """With its weights, in eval mode."""
        return self._load().to(device=self._device, dtype=self._dtype).eval()

    @abstractmethod
    def _load(self) -> Any:
        pass

    def check_choices(self, choices: Sequence[str]) -> None:
        """Raises UserError if a choice is not one token, or two are the same."""
        if len({self.token(choice) for choice in choices}) < len(choices):
            raise UserError(
                f"the model's tokenizer has one token for several of the choices {', '.join(choices)}"
            )

    def choice_probabilities(self, questions: Sequence[Question]) -> list[list[float]]:
        """From one forward pass; shares of the whole vocabulary, so they need not sum to 1."""
        return [
            row[[self.token(choice) for choice in question.choices]].tolist()
            for row, question in zip(self.first_token_probabilities(questions), questions, strict=True)
        ]

    def first_token_probabilities(self, questions: Sequence[Promptable]) -> Tensor:
        """How likely each token is as an answer's first, float64 ``(questions, vocabulary)``; one forward pass.

        Either all questions are on an image or none is.
        """
        return first_token_probabilities(self.model, self._batch(questions))

    def token(self, choice: str) -> int:
        """The one token of a choice, as an answer of it begins. Raises UserError if it is not one."""
        if choice not in self._tokens:
            tokens = self._choice_tokens(choice)
            if len(tokens) != 1 or str(self.tokenizer.decode(tokens)).strip() != choice:
                raise UserError(
                    f"the choice {choice!r} is {len(tokens)} tokens to the model's tokenizer, so choices cannot be "
                    "compared by the answer's first token"
                )
            self._tokens[choice] = tokens[0]
        return self._tokens[choice]


class LocalignModel(_OnDevice):
    """A :class:`~localign.vlm.model.modeling.LocalignVLM` that localign exported.

    Args:
        folder: The export.
        fingerprint: Stands for the weights.
        device: Where it works.
        dtype: Of the weights.
        frame: What coordinates in its answers refer to. By default shares of the original image where images are
            stretched to the model's size; where they are padded or cut, it depends on the conversations that the
            model learned from, and nothing is declared.

    Raises:
        UserError: The folder holds no such model.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        device: torch.device,
        dtype: torch.dtype,
        frame: BoxFrame | None = None,
    ) -> None:
        config = _loaded(str(folder), AutoConfig.from_pretrained, folder)
        declared = ORIGINAL if frame is None and config.resize == "naive" else frame
        super().__init__(fingerprint, device, dtype, declared)
        self.tokenizer = _loaded(str(folder), AutoTokenizer.from_pretrained, folder)
        self._folder = folder
        self._form = prompt_format(config.prompt_format)
        self.identity["prompt_format"] = config.prompt_format

    def prompt(self, message: str) -> str:
        return self._form.text(self.tokenizer, message)

    def answer_texts(self, questions: Sequence[Promptable], max_new_tokens: int) -> list[str]:
        asked = [Query(question.message, question.image) for question in questions]
        return list(
            greedy_answers(
                self.model,
                self._processor,
                asked,
                batch_size=len(asked),
                max_new_tokens=max_new_tokens,
            )
        )

    @cached_property
    def _processor(self) -> LocalignVLMProcessor:
        return LocalignVLMProcessor.for_model(self.model, self.tokenizer)

    def _batch(self, questions: Sequence[Promptable]) -> Mapping[str, Any]:
        images = [None if question.image is None else open_image(question.image) for question in questions]
        return self._processor(text=[q.message for q in questions], images=images).to(self._device)

    def _choice_tokens(self, choice: str) -> list[int]:
        labels = self._form.conversation(self.tokenizer, [("?", choice)]).labels
        end = self._form.end_token_id(self.tokenizer)
        return [token for token in labels if token not in (IGNORE_INDEX, end)]

    def _load(self) -> Any:
        return load_vlm(self._folder)[0]


class TransformersModel(_OnDevice):
    """Any image-text-to-text model of transformers', asked through its own chat template.

    Args:
        name: A folder, or a model of the Hub.
        fingerprint: Stands for the weights.
        device: Where it works.
        dtype: Of the weights.
        frame: What coordinates in its answers refer to; nothing is known of it by itself.
        commit: Of a model of the Hub, the version that is loaded.

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
        self._version = {} if commit is None else {"revision": commit}
        self.identity |= self._version
        self._processor = _loaded(name, AutoProcessor.from_pretrained, name, **self._version)
        if not getattr(self._processor, "chat_template", None):
            raise UserError(f"the processor of {name} has no chat template, so questions cannot be put to it")
        self.tokenizer = self._processor.tokenizer
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def prompt(self, message: str) -> str:
        return str(self._processor.apply_chat_template(_chat(message), add_generation_prompt=True))

    def answer_texts(self, questions: Sequence[Promptable], max_new_tokens: int) -> list[str]:
        return greedy_texts(self.model, self.tokenizer, self._batch(questions), max_new_tokens)

    def _batch(self, questions: Sequence[Promptable]) -> Mapping[str, Any]:
        batch = self._processor.apply_chat_template(
            [_asked(question) for question in questions],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        return batch.to(self._device, dtype=self._dtype)

    def _choice_tokens(self, choice: str) -> list[int]:
        """Of the choice as the template writes it after the prompt; of the choice alone where it writes otherwise."""
        asked = self.prompt("?")
        answer = {"role": "assistant", "content": [{"type": "text", "text": choice}]}
        written = str(self._processor.apply_chat_template([*_chat("?"), answer]))
        begin = self._ids(asked)
        if written.startswith(asked) and choice in (after := written[len(asked) :]):
            whole = asked + after[: after.index(choice) + len(choice)]
            ids = self._ids(whole)
            if ids[: len(begin)] == begin:
                return ids[len(begin) :]
        ids = self._ids(asked + choice)
        return ids[len(begin) :] if ids[: len(begin)] == begin else self._ids(choice)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _load(self) -> Any:
        load = AutoModelForImageTextToText.from_pretrained
        return _loaded(self._name, load, self._name, dtype=self._dtype, **self._version)


def open_model(
    name: str,
    fingerprint: str,
    device: torch.device,
    dtype: torch.dtype,
    frame: BoxFrame | None = None,
    commit: str | None = None,
) -> LocalignModel | TransformersModel:
    """The model of a name, its weights not yet loaded.

    Args:
        name: A run folder of ``localign vlm train``, an export, or any image-text-to-text model of transformers'.
        fingerprint: As of :func:`fingerprint_of`.
        device: Where it works.
        dtype: Of the weights.
        frame: What coordinates in its answers refer to, where it does not say so itself.
        commit: As of :func:`hub_commit`.

    Raises:
        UserError: There is no such model.
    """
    folder = export_folder(name)
    config = _config(name)
    if folder is not None and config.get("model_type") == LocalignVLMConfig.model_type:
        return LocalignModel(folder, fingerprint, device, dtype, frame)
    known = name if folder is None else str(folder)
    return TransformersModel(known, fingerprint, device, dtype, frame, commit)


def hub_commit(name: str, revision: str | None = None) -> str | None:
    """The commit that a branch, tag or commit of a model on the Hub stands for; None of a folder.

    Args:
        name: As :func:`open_model` takes it.
        revision: Default the main branch.

    Raises:
        UserError: There is no such model or revision, or a folder is asked for one.
    """
    if export_folder(name) is not None:
        if revision is not None:
            raise UserError(f"--revision is of models of the Hub; {name} is a folder")
        return None
    if Path(name).exists():
        raise UserError(f"{name} holds no model: it has no {CONFIG_FILE}")
    # A file of the cache lies below the commit that it is of.
    path = Path(_loaded(name, hf_hub_download, name, CONFIG_FILE, revision=revision))
    return path.parent.name


def fingerprint_of(name: str, commit: str | None = None) -> str:
    """What stands for a model's weights and configuration: a hash of its files, or its commit on the Hub.

    Args:
        name: As :func:`open_model` takes it.
        commit: As of :func:`hub_commit`; default that of the main branch.

    Raises:
        UserError: There is no such model.
    """
    folder = export_folder(name)
    if folder is None:
        return f"{name}@{commit or hub_commit(name)}"
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.suffix != ".md":
            total.update(path.name.encode() + b"\0" + _file_hash(path))
    return total.hexdigest()


def _file_hash(path: Path) -> bytes:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.digest()


def _config(name: str) -> dict[str, Any]:
    folder = export_folder(name)
    if folder is None:
        return {}
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG_FILE} cannot be read: {error}") from None
    return content if isinstance(content, dict) else {}


def _chat(message: str, image: Any = None) -> list[dict[str, Any]]:
    """A question in transformers' form. Marks of images in it mark nothing."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": clean(message)}]
    return [{"role": "user", "content": content}]


def _asked(question: Promptable) -> list[dict[str, Any]]:
    if question.image is not None:
        return _chat(question.message, open_image(question.image))
    return [{"role": "user", "content": [{"type": "text", "text": clean(question.message)}]}]


def _loaded(name: str, load: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return load(*arguments, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load the model {name}: {str(error).strip().splitlines()[0]}") from None
