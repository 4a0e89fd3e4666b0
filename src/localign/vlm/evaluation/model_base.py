"""The interface of models that answer benchmark questions.

A model is opened without its weights. Prompts, and whether its tokenizer can compare choices, are known before the
weights are loaded; if all answers are cached, they are never loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from localign.errors import UserError
from localign.vlm.evaluation.generation import first_token_probabilities
from localign.vlm.scoring.boxes import BoxFrame
from localign.vlm.scoring.questions import Question


class Promptable(Protocol):
    """A message on an image, such as a :class:`Question` or a :class:`~localign.vlm.evaluation.generation.Query`."""

    @property
    def message(self) -> str:
        """The message, without the prompt format's words."""

    @property
    def image(self) -> Any:
        """A PIL image, a path, or None."""


class AnsweringModel(Protocol):
    """A model that answers benchmark questions."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Everything that answers depend on besides prompt and image, such as the weights' hash and their dtype."""

    @property
    def frame(self) -> BoxFrame | None:
        """The frame of coordinates in the answers; None where it is not known."""

    def prompt(self, message: str) -> str:
        """The message in the model's prompt format."""

    def check_choices(self, choices: Sequence[str]) -> None:
        """Check that choices can be compared by their first token.

        Raises:
            UserError: They cannot.
        """

    def answer_texts(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """Greedy answers to a batch of questions. An answer does not depend on the rest of the batch."""

    def choice_probabilities(self, questions: Sequence[Question]) -> list[list[float]]:
        """For each question of a batch, the probability of each choice as the answer's first token."""


class LazyModel(ABC):
    """A model of transformers whose weights are loaded at their first use.

    Args:
        fingerprint: Identifies the weights, see :func:`~localign.vlm.evaluation.models.fingerprint_of`.
        device: Device of the weights.
        dtype: Type of the weights.
        frame: The frame of coordinates in the answers; None where it is not known.
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
        """The message in the model's prompt format."""

    @abstractmethod
    def answer_texts(self, questions: Sequence[Promptable], max_new_tokens: int) -> list[str]:
        """Greedy answers to a batch of questions. Either all questions have an image or none has."""

    @abstractmethod
    def _choice_tokens(self, choice: str) -> list[int]:
        """The tokens of an answer that is this choice, without the tokens that end an answer."""

    @abstractmethod
    def _batch(self, questions: Sequence[Promptable]) -> Mapping[str, Any]:
        """The model's input, left-padded, on its device."""

    @abstractmethod
    def _load(self) -> Any:
        """The model with its weights, on any device."""

    @cached_property
    def model(self) -> Any:
        """The model with its weights, in eval mode on its device."""
        return self._load().to(device=self._device, dtype=self._dtype).eval()

    def check_choices(self, choices: Sequence[str]) -> None:
        """Check that choices can be compared by their first token.

        Raises:
            UserError: A choice is not a single token, or two choices have the same token.
        """
        if len({self.token(choice) for choice in choices}) < len(choices):
            raise UserError(
                f"the model's tokenizer has one token for several of the choices {', '.join(choices)}"
            )

    def choice_probabilities(self, questions: Sequence[Question]) -> list[list[float]]:
        """For each question of a batch, the probability of each choice as the answer's first token.

        The probabilities are shares of the whole vocabulary, so they need not sum to 1.
        """
        return [
            row[[self.token(choice) for choice in question.choices]].tolist()
            for row, question in zip(self.first_token_probabilities(questions), questions, strict=True)
        ]

    def first_token_probabilities(self, questions: Sequence[Promptable]) -> Tensor:
        """The probability of every token as the answer's first, from one forward pass.

        Args:
            questions: Either all have an image or none has.

        Returns:
            float64 ``(questions, vocabulary)``.
        """
        return first_token_probabilities(self.model, self._batch(questions))

    def token(self, choice: str) -> int:
        """The token of a choice.

        Raises:
            UserError: The choice is not a single token.
        """
        if choice not in self._tokens:
            tokens = self._choice_tokens(choice)
            if len(tokens) != 1 or str(self.tokenizer.decode(tokens)).strip() != choice:
                raise UserError(
                    f"the choice {choice!r} is {len(tokens)} tokens to the model's tokenizer, so choices cannot be "
                    "compared by the answer's first token"
                )
            self._tokens[choice] = tokens[0]
        return self._tokens[choice]
