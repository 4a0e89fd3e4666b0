"""Our models behind lmms-eval's interface: greedy answers, and losses of single-token choices."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from torch import Tensor

from localign.engine.distributed import choose_device
from localign.engine.progress import Bar
from localign.errors import UserError
from localign.vlm.evaluation.generation import Query
from localign.vlm.evaluation.model_base import Promptable
from localign.vlm.evaluation.models import fingerprint_of, open_model
from localign.vlm.scoring.questions import MAX_NEW_TOKENS


class BridgedModel(Protocol):
    """The interface that the bridge needs from a model, see :class:`~localign.vlm.evaluation.model_base.LazyModel`."""

    def answer_texts(self, questions: Sequence[Promptable], max_new_tokens: int) -> list[str]:
        """Greedy answers to a batch of questions. Either all questions have an image or none has."""

    def first_token_probabilities(self, questions: Sequence[Promptable]) -> Tensor:
        """The probability of every token as the answer's first, float64 ``(questions, vocabulary)``."""

    def token(self, choice: str) -> int:
        """The token of a choice. Raises UserError if the choice is not a single token."""


class _Document(NamedTuple):
    """A question of lmms-eval: its text, and how to get its image."""

    text: str
    visual: Any
    number: int
    task: str
    split: str


class _Settings(NamedTuple):
    """A task's settings of greedy decoding."""

    max_new_tokens: int
    until: tuple[str, ...]
    """The answer ends before the first of these strings."""


class LocalignLMM(lmms):
    """A localign model for lmms-eval.

    Args:
        model: The model to ask.
        batch_size: Questions per batch; answers do not depend on it.
    """

    is_simple = True

    def __init__(self, model: BridgedModel, batch_size: int = 16) -> None:
        super().__init__()
        self.wrapped_model = model
        self.batch_size = batch_size

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> LocalignLMM:
        """Create the model for lmms-eval's own command line.

        Args:
            arg_string: ``pretrained=NAME`` and optionally ``dtype=float32`` or ``dtype=bfloat16``.
            additional_config: ``batch_size`` and ``device``.

        Raises:
            UserError: There is no such model, or there are other arguments.
        """
        given = simple_parse_args_string(arg_string)
        name, dtype = given.pop("pretrained", None), given.pop("dtype", "float32")
        if not name or given or dtype not in ("float32", "bfloat16"):
            raise UserError(
                "--model_args of a localign model are pretrained=NAME and dtype=float32 or bfloat16"
            )
        extra = additional_config or {}
        device = choose_device(extra.get("device") or "auto")
        model = open_model(str(name), fingerprint_of(str(name)), device, getattr(torch, dtype))
        return cls(model, int(extra.get("batch_size") or 1))

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """For every request, the pair of a choice's loss and whether greedy decoding gives the choice.

        Despite the interface's name, lmms-eval takes the smallest value as the most likely one. The values are
        therefore losses: minus the log probability of the choice's token as the answer's first token. All choices of
        a question take one forward pass.

        Raises:
            UserError: A choice is not a single token, or an image cannot be read.
        """
        found: list[GenerationResult] = [None] * len(requests)
        of_question: dict[_Document, list[int]] = {}
        for number, request in enumerate(requests):
            context, _, visual, document, task, split = request.args
            question = _Document(context, visual, document, task, split)
            of_question.setdefault(question, []).append(number)
        for batch, queries in self._batches(list(of_question)):
            rows = self.wrapped_model.first_token_probabilities(queries)
            for question, row in zip(batch, rows, strict=True):
                for number in of_question[question]:
                    share = float(row[self.wrapped_model.token(self._choice(requests[number]))])
                    pair = -math.log(max(share, sys.float_info.min)), share >= float(row.max())
                    # lmms-eval 0.7.3 turns every other type of answer into text, also a pair.
                    found[number] = GenerationResult(text=pair)
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy answers, each cut before the first of its task's end strings.

        Raises:
            UserError: A task asks for sampling or beams or has several images per question, or an image cannot be
                read.
        """
        found = [""] * len(requests)
        groups: dict[_Settings, dict[_Document, list[int]]] = {}
        for number, request in enumerate(requests):
            context, settings, visual, document, task, split = request.args
            question = _Document(context, visual, document, task, split)
            groups.setdefault(_settings(settings, task), {}).setdefault(question, []).append(number)
        for settings, of_question in groups.items():
            for batch, queries in self._batches(list(of_question)):
                texts = self.wrapped_model.answer_texts(queries, settings.max_new_tokens)
                for question, text in zip(batch, texts, strict=True):
                    for number in of_question[question]:
                        found[number] = _cut(text, settings.until)
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported.

        Raises:
            UserError: Always.
        """
        raise UserError(f"{requests[0].task_name} has several rounds, but localign models answer once")

    def _batches(self, questions: list[_Document]) -> Iterator[tuple[list[_Document], list[Query]]]:
        """Batches with and without images, longest questions first, so that a lack of memory shows at once."""
        questions = sorted(questions, key=lambda question: -len(question.text))
        bar = Bar("questions", len(questions))
        try:
            for begin in range(0, len(questions), self.batch_size):
                chunk = questions[begin : begin + self.batch_size]
                pairs = [(question, self._query(question)) for question in chunk]
                for has_image in (True, False):
                    chosen = [pair for pair in pairs if (pair[1].image is not None) == has_image]
                    if chosen:
                        yield [question for question, _ in chosen], [query for _, query in chosen]
                bar.update(begin + len(chunk), len(questions))
        finally:
            bar.close()

    def _query(self, question: _Document) -> Query:
        visual = question.visual
        images = (
            [] if visual is None else visual(self.task_dict[question.task][question.split][question.number])
        )
        if images and len(images) > 1:
            raise UserError(
                f"{question.task} asks about {len(images)} images at once, but localign models take one"
            )
        return Query(question.text, images[0] if images else None)

    def _choice(self, request: Instance) -> str:
        """The choice without white space; the model's prompt format adds what belongs before an answer."""
        _, choice, _, document, task, split = request.args
        text = choice(self.task_dict[task][split][document]) if callable(choice) else choice
        return str(text).strip()


def _settings(given: dict[str, Any], task: str) -> _Settings:
    temperature = given.get("temperature")
    sampled = given.get("do_sample") and (temperature is None or float(temperature) > 0)
    if sampled or (given.get("num_beams") or 1) > 1:
        raise UserError(f"{task} asks for sampling or beams, but localign models answer greedily")
    until = given.get("until") or []
    listed = [until] if isinstance(until, str) else until
    return _Settings(int(given.get("max_new_tokens") or MAX_NEW_TOKENS), tuple(filter(None, listed)))


def _cut(text: str, until: Sequence[str]) -> str:
    for end in until:
        text = text.split(end, 1)[0]
    return text.strip()
