"""Our benchmarks as tasks of lmms-eval: it asks and averages, and knows neither our files nor our scores."""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableTask
from PIL import Image

from localign.errors import UserError
from localign.vlm.data.images import open_image
from localign.vlm.evaluation.results import with_scoring
from localign.vlm.scoring.base import Answer, Benchmark, Question, QuestionSet, Sample
from localign.vlm.scoring.boxes import ORIGINAL, BoxFrame
from localign.vlm.scoring.metrics import percent

ROOT_VARIABLE = "LOCALIGN_DATA"
"""Of the environment: the data root, where lmms-eval's own command line runs a task."""

_SPLIT = "test"


class BenchmarkTask(ConfigurableTask):
    """The benchmark whose name a task's YAML file gives as ``task``.

    A document is a question without its truth's details: ``number`` (its place in the published order), ``id``,
    ``image`` (a path), ``message``, ``split``, ``choices`` and ``target`` (what is right, for the log). A choice is
    a "multiple_choice" of lmms-eval, whose loss is minus the logarithm of the choice's probability.

    Args:
        config: The YAML file's content. Its ``dataset_kwargs`` may hold ``root`` (the data root; default the
            environment variable ``LOCALIGN_DATA``), ``limit`` (questions of each split, at most),
            ``allow_partial``, ``scoring`` and ``boxes`` (what coordinates in answers refer to), as for
            ``localign vlm eval``.

    Raises:
        UserError: Data or options do not do.
    """

    suite: Benchmark
    data: QuestionSet

    def __init__(self, config: Mapping[str, Any]) -> None:
        given = {name: value for name, value in config.items() if name != "class"}
        documents = {
            "test_split": _SPLIT,
            "doc_to_text": "message",
            "doc_to_visual": image_of,
            "doc_to_target": "target",
            # An error bar that lmms-eval would make of this field of a sample is of its score, not of the figure.
            "score_key": "",
        }
        if given["output_type"] == "multiple_choice":
            documents["doc_to_choice"] = "choices"
        super().__init__(config={**documents, **given})

    def _prepare_metric_and_aggregation(self) -> None:
        """Nothing: the figures are known once the questions are."""
        self._metric_fn_list: dict[str, Any] = {}

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        """Read the official files; nothing is fetched."""
        options = dict(dataset_kwargs or {})
        root = options.get("root") or os.environ.get(ROOT_VARIABLE)
        if not root:
            raise UserError(f"where are the data of {self.config.task}? set {ROOT_VARIABLE} to the data root")
        self.suite = with_scoring(self.config.task, options.get("scoring", "default"))
        self._frame = None if options.get("boxes") is None else BoxFrame.parse(options["boxes"])
        self.data = self.suite.read(
            root, limit=options.get("limit"), allow_partial=options.get("allow_partial", False)
        )
        # Names of figures do not depend on answers; statistics wants one.
        first = self.data.questions[0]
        guess = Answer("", (1.0,) * len(first.choices), ORIGINAL)
        self._aggregation_list = {
            name: partial(_figure, self.suite, name)
            for name in self.suite.statistics([self.suite.score(first, guess)])
        }
        self._higher_is_better = {name: not name.startswith("invalid") for name in self._aggregation_list}
        documents = [_document(number, q) for number, q in enumerate(self.data.questions)]
        self.dataset = DatasetDict({_SPLIT: Dataset.from_list(documents)})
        self.dataset_no_image = self.dataset

    def process_results(
        self, doc: Mapping[str, Any], results: Sequence[Any], full_docs: Any = None
    ) -> dict[str, Sample]:
        """The scored answer, once for each figure: they are all made of whole samples."""
        sample = self.suite.score(self.data.questions[doc["number"]], self.answer(doc["number"], results))
        return dict.fromkeys(self._aggregation_list, sample)

    def answer(self, number: int, results: Sequence[Any]) -> Answer:
        """A model's answer from what lmms-eval keeps of it.

        Args:
            number: Of the question.
            results: One text, or for each choice its loss and whether it is what greedy decoding gives.
        """
        if self.data.questions[number].choices:
            shares = tuple(math.exp(-_loss(result)) for result in results)
            return Answer(probabilities=shares, frame=self._frame)
        return Answer(text=str(results[0]).strip(), frame=self._frame)


def image_of(document: Mapping[str, Any]) -> list[Image.Image]:
    """A document's image, RGB."""
    return [open_image(document["image"])]


def _document(number: int, question: Question) -> dict[str, Any]:
    payload = question.payload
    target = question.choices[payload["label"]] if question.choices else str(list(payload["box"]))
    return {
        "number": number,
        "id": question.id,
        "image": question.image,
        "message": question.message,
        "split": question.split,
        "choices": list(question.choices),
        "target": target,
    }


def _figure(suite: Benchmark, name: str, samples: Sequence[Sample]) -> float | None:
    return percent(suite.statistics(samples)[name].value())


def _loss(result: Any) -> float:
    """Of a pair (loss, is greedy); where another model gives it, lmms-eval 0.7.3 hands on its text."""
    pair = ast.literal_eval(result) if isinstance(result, str) else result
    return float(pair[0])
