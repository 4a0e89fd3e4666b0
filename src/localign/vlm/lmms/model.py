"""Our models as lmms-eval asks them: greedy answers, and losses of choices that are one token each."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string

from localign.engine.distributed import choose_device
from localign.engine.log import Bar
from localign.errors import UserError
from localign.vlm.evaluation.generation import Query
from localign.vlm.evaluation.models import LocalignModel, TransformersModel, fingerprint_of, open_model
from localign.vlm.scoring.base import MAX_NEW_TOKENS


class _Document(NamedTuple):
    """A question of lmms-eval's: its text, and where its image comes from."""

    text: str
    visual: Any
    number: int
    task: str
    split: str


class _Settings(NamedTuple):
    """What a task asks for of greedy decoding."""

    max_new_tokens: int
    until: tuple[str, ...]


class LocalignLMM(lmms):
    """A model of ours for lmms-eval.

    Args:
        model: What is asked, as for ``localign vlm eval``.
        batch_size: Questions asked together; it changes no answer.
    """

    is_simple = True

    def __init__(self, model: LocalignModel | TransformersModel, batch_size: int = 16) -> None:
        super().__init__()
        self.asked_model = model
        self.batch_size = batch_size

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> LocalignLMM:
        """For lmms-eval's own command line.

        Args:
            arg_string: ``pretrained=NAME`` and, if wanted, ``dtype=float32`` or ``bfloat16``.
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
        """For every request the pair of a choice's loss and whether greedy decoding gives it.

        lmms-eval takes the smallest value as the likeliest: these are losses, minus the logarithm of the
        probability of the choice's one token as the answer's first, whatever the interface's name says. All choices
        of a question cost one forward pass.

        Raises:
            UserError: A choice is not one token, or an image cannot be read.
        """
        found: list[GenerationResult] = [None] * len(requests)
        of_question: dict[_Document, list[int]] = {}
        for number, request in enumerate(requests):
            context, _, visual, document, task, split = request.args
            question = _Document(context, visual, document, task, split)
            of_question.setdefault(question, []).append(number)
        for batch, asked in self._batches(list(of_question)):
            rows = self.asked_model.first_token_probabilities(asked)
            for question, row in zip(batch, rows, strict=True):
                for number in of_question[question]:
                    share = float(row[self.asked_model.token(self._choice(requests[number]))])
                    pair = -math.log(max(share, sys.float_info.min)), share >= float(row.max())
                    # lmms-eval 0.7.3 makes text of any answer but this, of a pair too.
                    found[number] = GenerationResult(text=pair)
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy answers, each cut before the first of the strings at which its task wants it to end.

        Raises:
            UserError: A task asks for sampling or beams, puts a question on several images, or an image cannot be
                read.
        """
        found = [""] * len(requests)
        groups: dict[_Settings, dict[_Document, list[int]]] = {}
        for number, request in enumerate(requests):
            context, settings, visual, document, task, split = request.args
            question = _Document(context, visual, document, task, split)
            groups.setdefault(_settings(settings, task), {}).setdefault(question, []).append(number)
        for settings, of_question in groups.items():
            for batch, asked in self._batches(list(of_question)):
                texts = self.asked_model.answer_texts(asked, settings.max_new_tokens)
                for question, text in zip(batch, texts, strict=True):
                    for number in of_question[question]:
                        found[number] = _cut(text, settings.until)
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raises UserError: not possible."""
        raise UserError(f"{requests[0].task_name} is a task of several rounds; localign models answer once")

    def _batches(self, questions: list[_Document]) -> Iterator[tuple[list[_Document], list[Query]]]:
        """The longest first: what does not fit, fails at once. All of a batch are on an image or none is."""
        questions = sorted(questions, key=lambda question: -len(question.text))
        bar = Bar("questions", len(questions))
        try:
            for begin in range(0, len(questions), self.batch_size):
                together = questions[begin : begin + self.batch_size]
                pairs = [(question, self._asked(question)) for question in together]
                for on_image in (True, False):
                    chosen = [pair for pair in pairs if (pair[1].image is not None) == on_image]
                    if chosen:
                        yield [question for question, _ in chosen], [asked for _, asked in chosen]
                bar.at(begin + len(together), len(questions))
        finally:
            bar.close()

    def _asked(self, question: _Document) -> Query:
        visual = question.visual
        images = (
            [] if visual is None else visual(self.task_dict[question.task][question.split][question.number])
        )
        if images and len(images) > 1:
            raise UserError(
                f"{question.task} asks about {len(images)} images at once; localign models see one"
            )
        return Query(question.text, images[0] if images else None)

    def _choice(self, request: Instance) -> str:
        """Without the white space before it: the model's prompt format knows what comes before an answer."""
        _, choice, _, document, task, split = request.args
        text = choice(self.task_dict[task][split][document]) if callable(choice) else choice
        return str(text).strip()


def _settings(given: dict[str, Any], task: str) -> _Settings:
    temperature = given.get("temperature")
    sampled = given.get("do_sample") and (temperature is None or float(temperature) > 0)
    if sampled or (given.get("num_beams") or 1) > 1:
        raise UserError(f"{task} asks for sampling or beams; answers of localign models are greedy")
    until = given.get("until") or []
    listed = [until] if isinstance(until, str) else until
    return _Settings(int(given.get("max_new_tokens") or MAX_NEW_TOKENS), tuple(filter(None, listed)))


def _cut(text: str, until: Sequence[str]) -> str:
    for end in until:
        text = text.split(end, 1)[0]
    return text.strip()
