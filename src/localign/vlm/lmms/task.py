"""Our benchmarks as tasks of lmms-eval. lmms-eval asks and averages; reading and scoring stay ours."""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableTask
from PIL import Image

from localign.errors import UserError
from localign.vlm.data.images import open_image
from localign.vlm.evaluation.results import with_scoring
from localign.vlm.scoring.base import Benchmark, QuestionSet
from localign.vlm.scoring.boxes import ORIGINAL, BoxFrame
from localign.vlm.scoring.metrics import percent
from localign.vlm.scoring.questions import Answer, Question, Sample

ROOT_VARIABLE = "LOCALIGN_DATA"
"""Environment variable with the data root, for tasks that lmms-eval's own command line runs."""

_SPLIT = "test"


class BenchmarkTask(ConfigurableTask):
    """The benchmark that the key ``task`` of a task's YAML file names.

    A document is a question, see :class:`_Document`. Multiple choice is lmms-eval's "multiple_choice", where the loss
    of a choice is minus its log probability.

    Args:
        config: The content of the YAML file. Its ``dataset_kwargs`` may hold ``root`` (the data root; default the
            environment variable ``LOCALIGN_DATA``), ``limit`` (maximum number of questions per split),
            ``allow_partial``, ``allow_outside``, ``scoring`` and ``boxes`` (the frame of coordinates in answers), as
            for ``localign vlm eval``.

    Raises:
        UserError: Data or options are wrong.
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
            # lmms-eval would compute an error bar from this field: one of the score, not of the metric.
            "score_key": "",
        }
        if given["output_type"] == "multiple_choice":
            documents["doc_to_choice"] = "choices"
        super().__init__(config={**documents, **given})

    def _prepare_metric_and_aggregation(self) -> None:
        """Do nothing: :meth:`download` sets the metrics, which depend on the questions."""
        self._metric_fn_list: dict[str, Any] = {}

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        """Read the official files. Nothing is downloaded."""
        options = dict(dataset_kwargs or {})
        root = options.get("root") or os.environ.get(ROOT_VARIABLE)
        if not root:
            raise UserError(
                f"the data of {self.config.task} are not given; set {ROOT_VARIABLE} to the data root"
            )
        self.suite = with_scoring(self.config.task, options.get("scoring", "default"))
        self._frame = None if options.get("boxes") is None else BoxFrame.parse(options["boxes"])
        self.data = self.suite.read(
            root,
            limit=options.get("limit"),
            allow_partial=options.get("allow_partial", False),
            allow_outside=options.get("allow_outside", False),
        )
        # The names of the metrics do not depend on the answers, but metrics() needs at least one answer.
        first = self.data.questions[0]
        placeholder = Answer("", (1.0,) * len(first.choices), ORIGINAL)
        self._aggregation_list = {
            name: partial(_metric, self.suite, name)
            for name in self.suite.metrics([self.suite.score(first, placeholder)])
        }
        self._higher_is_better = {name: not name.startswith("invalid") for name in self._aggregation_list}
        documents = [_document(number, q) for number, q in enumerate(self.data.questions)]
        self.dataset = DatasetDict({_SPLIT: Dataset.from_list(documents)})
        self.dataset_no_image = self.dataset

    def process_results(
        self, doc: Mapping[str, Any], results: Sequence[Any], full_docs: Any = None
    ) -> dict[str, Sample]:
        """The scored answer, once for each metric, because every metric is computed from whole samples."""
        sample = self.suite.score(self.data.questions[doc["number"]], self.answer(doc["number"], results))
        return dict.fromkeys(self._aggregation_list, sample)

    def answer(self, number: int, results: Sequence[Any]) -> Answer:
        """A model's answer, from lmms-eval's form of it.

        Args:
            number: Number of the question.
            results: One text; or for each choice its loss, and whether greedy decoding gives the choice.
        """
        if self.data.questions[number].choices:
            shares = tuple(math.exp(-_loss(result)) for result in results)
            return Answer(probabilities=shares, frame=self._frame)
        return Answer(text=str(results[0]).strip(), frame=self._frame)


def image_of(document: Mapping[str, Any]) -> list[Image.Image]:
    """The RGB image of a document."""
    return [open_image(document["image"])]


class _Document(TypedDict):
    """A question for lmms-eval."""

    number: int
    """Position in the published order."""
    id: str
    image: str
    """A path."""
    message: str
    split: str
    choices: list[str]
    target: str
    """The right answer, for lmms-eval's log."""


def _document(number: int, question: Question) -> _Document:
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


def _metric(suite: Benchmark, name: str, samples: Sequence[Sample]) -> float | None:
    return percent(suite.metrics(samples)[name].value())


def _loss(result: Any) -> float:
    """The loss of a pair (loss, is greedy). lmms-eval 0.7.3 turns the pairs of other models into text."""
    pair = ast.literal_eval(result) if isinstance(result, str) else result
    return float(pair[0])
