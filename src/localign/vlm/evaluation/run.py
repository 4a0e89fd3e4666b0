"""`localign vlm eval`: benchmarks put to a model, over all ranks, continued wherever it was cut off."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch

from localign.engine import run_folder
from localign.engine.distributed import DistributedContext, distributed_context
from localign.engine.lock import lock
from localign.engine.log import Bar
from localign.errors import RunFailure, UserError
from localign.vlm.data.images import open_image
from localign.vlm.evaluation.answer_cache import AnswerCacheWriter, answer_key, read_answer_cache
from localign.vlm.evaluation.models import (
    AnsweringModel,
    LocalignModel,
    TransformersModel,
    fingerprint_of,
    hub_commit,
    open_model,
)
from localign.vlm.evaluation.options import EvalConfig
from localign.vlm.evaluation.results import (
    outcome_of,
    score_answers,
    show_results,
    with_scoring,
    write_answers,
)
from localign.vlm.scoring.base import MAX_NEW_TOKENS, Answer, Benchmark, Question, QuestionSet
from localign.vlm.scoring.boxes import BoxFrame

Suites = Sequence[tuple[Benchmark, QuestionSet]]


def run_eval(config: EvalConfig) -> None:
    """Everything from the official files to results.json and a table.

    Raises:
        UserError: Data, model or options do not do; said before the weights are loaded.
    """
    with distributed_context(config.device) as ranks:
        frame = frame_of(config)
        suites = [
            (suite, suite.read(config.data, limit=config.limit, allow_partial=config.allow_partial))
            for suite in [with_scoring(name, config.scoring) for name in config.benchmarks]
        ]
        model = model_of(config, ranks, frame)
        results = evaluate(model, suites, Path(config.out), ranks, config.batch_size, config.model)
        if results is not None:
            _say(results, Path(config.out))


def frame_of(config: EvalConfig) -> BoxFrame | None:
    """What coordinates in answers refer to, if the command says so. Raises UserError if it is no frame."""
    return None if config.boxes is None else BoxFrame.parse(config.boxes)


def model_of(
    config: EvalConfig, ranks: DistributedContext, frame: BoxFrame | None = None
) -> LocalignModel | TransformersModel:
    """The model, its weights not yet loaded. Raises UserError if there is none."""
    low = config.dtype == "bfloat16" or (config.dtype == "auto" and ranks.device.type == "cuda")
    # Reading all weights takes a while, and a branch may move: one process does it for all.
    commit, fingerprint = ranks.all_gather_object(_version(config) if ranks.is_main else (None, ""))[0]
    dtype = torch.bfloat16 if low else torch.float32
    return open_model(config.model, fingerprint, ranks.device, dtype, frame, commit)


def _version(config: EvalConfig) -> tuple[str | None, str]:
    """The commit of a model of the Hub, and what stands for the weights."""
    commit = hub_commit(config.model, config.revision)
    return commit, fingerprint_of(config.model, commit)


def evaluate(
    model: AnsweringModel,
    suites: Suites,
    folder: Path,
    ranks: DistributedContext,
    batch_size: int,
    name: str = "model",
) -> dict[str, Any] | None:
    """Ask what was not asked before, score everything, and write ``answers.jsonl`` and ``results.json``.

    Args:
        model: What is asked.
        suites: Benchmarks and their questions.
        folder: Of answers and results; made if it is not there.
        ranks: This process among all; each asks its share.
        batch_size: Questions asked together.
        name: What the results call the model.

    Returns:
        The content of ``results.json``; None on all ranks but the main one.

    Raises:
        UserError: The model's answers could not be scored, or another process is writing into the folder. An image
            cannot be read and data may not be partial; this is said once all other questions were asked.
    """
    check(model, suites)
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder) if ranks.is_main else None
    try:
        asked = [_keyed(model, suite, question) for suite, data in suites for question in data.questions]
        known = read_answer_cache(folder, model.frame)
        ranks.barrier()  # nobody writes before everybody has read
        pending = [one for one in asked if one.key not in known]
        unreadable = ranks.all_gather_object(answer_pending(model, pending, folder, ranks, batch_size))
        if not ranks.is_main:
            return None
        return _finish(model, suites, asked, set(chain.from_iterable(unreadable)), folder, name)
    finally:
        if held is not None:
            held.close()


def check(model: AnsweringModel, suites: Suites) -> None:
    """Whether all answers could be scored, before one is asked for. Raises UserError if not."""
    for suite, data in suites:
        for choices in dict.fromkeys(question.choices for question in data.questions):
            if choices:
                model.check_choices(choices)
        words = {question.split: question for question in data.questions if not question.choices}
        for question in words.values():
            suite.score(question, Answer(frame=model.frame))


@dataclass(frozen=True, slots=True)
class _KeyedQuestion:
    benchmark: str
    question: Question
    prompt: str
    key: str


def _keyed(model: AnsweringModel, suite: Benchmark, question: Question) -> _KeyedQuestion:
    prompt = model.prompt(question.message)
    return _KeyedQuestion(suite.name, question, prompt, answer_key(model.identity, suite, question, prompt))


def answer_pending(
    model: AnsweringModel,
    pending: Sequence[_KeyedQuestion],
    folder: Path,
    ranks: DistributedContext,
    batch_size: int,
) -> list[str]:
    """Put this rank's share of questions to the model; answers are on the disk as soon as their batch is done.

    Returns:
        The keys of questions that were not asked because their image cannot be read.
    """
    unreadable: list[str] = []
    mine = pending[ranks.rank :: ranks.size]
    if not mine:
        return unreadable
    writer = AnswerCacheWriter(folder, ranks.rank)
    bar = Bar("questions", len(pending)) if ranks.is_main else None
    done = 0
    try:
        for batch in _batches(mine, batch_size):
            answers = _answers(model, batch)
            writer.add((one.key, one.question.id, answer) for one, answer in answers)
            answered = {one.key for one, _ in answers}
            unreadable += [one.key for one in batch if one.key not in answered]
            done += len(batch)
            if bar is not None:
                bar.at(min(done * ranks.size, len(pending)), len(pending))
    finally:
        writer.close()
        if bar is not None:
            bar.close()
    return unreadable


def _batches(pending: Sequence[_KeyedQuestion], size: int) -> Iterator[list[_KeyedQuestion]]:
    """Of one benchmark and one mode each, and of the longest prompts first: what does not fit, fails at once."""
    for _, group in groupby(pending, key=lambda one: (one.benchmark, one.question.mode)):
        members = sorted(group, key=lambda one: -len(one.prompt))
        for begin in range(0, len(members), size):
            yield members[begin : begin + size]


def _answers(model: AnsweringModel, batch: Sequence[_KeyedQuestion]) -> list[tuple[_KeyedQuestion, Answer]]:
    """Answers to the questions of a batch whose image can be read."""
    try:
        return list(zip(batch, _said(model, [one.question for one in batch]), strict=True))
    except UserError:
        # Only now: to decode every image twice would cost more than to ask this batch again.
        broken = {image for image in {one.question.image for one in batch} if not _can_be_read(image)}
        if not broken:
            raise
    rest = [one for one in batch if one.question.image not in broken]
    return list(zip(rest, _said(model, [one.question for one in rest]), strict=True)) if rest else []


def _said(model: AnsweringModel, questions: Sequence[Question]) -> list[Answer]:
    if questions[0].choices:
        return [Answer(probabilities=tuple(row)) for row in model.choice_probabilities(questions)]
    return [Answer(text=text) for text in model.answer_texts(questions, MAX_NEW_TOKENS)]


def _can_be_read(image: str) -> bool:
    try:
        open_image(image)
    except UserError:
        return False
    return True


def _finish(
    model: AnsweringModel,
    suites: Suites,
    asked: Sequence[_KeyedQuestion],
    unreadable: Collection[str],
    folder: Path,
    name: str,
) -> dict[str, Any]:
    answers = read_answer_cache(folder, model.frame)
    missing = sum(one.key not in answers and one.key not in unreadable for one in asked)
    if missing:
        raise RunFailure(
            f"{missing} answers are missing in {folder}: do all ranks write to the same file system?"
        )
    rest = iter(asked)
    judged = []
    for suite, data in suites:
        own = [next(rest) for _ in data.questions]
        known = [one for one in own if one.key in answers]
        found = suite.readable(data, {one.question.id for one in own if one.key not in answers})
        judged.append(
            score_answers(suite, found, [answers[one.key] for one in known], [one.prompt for one in known])
        )
    results = results_of(model, name, {part.benchmark.name: outcome_of(part) for part in judged})
    # Answers of this evaluation beside results of another one would not go together.
    (folder / run_folder.RESULTS_FILE).unlink(missing_ok=True)
    write_answers(folder, judged)
    run_folder.write_results(folder, results)
    return results


def results_of(model: AnsweringModel, name: str, outcomes: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``results.json``.

    Args:
        model: What was asked.
        name: What the results call it.
        outcomes: Of every benchmark, see :func:`~localign.vlm.evaluation.results.outcome_of`.
    """
    return {
        "command": "vlm eval",
        "model": {
            "name": name,
            **model.identity,
            "boxes": None if model.frame is None else str(model.frame),
        },
        "benchmarks": dict(outcomes),
        "versions": {key: value for key, value in run_folder.provenance().items() if key != "time"},
    }


def _say(results: Mapping[str, Any], folder: Path) -> None:
    show_results(results["benchmarks"])
    print(f"answers    {folder / 'answers.jsonl'}")
    print(f"results    {folder / run_folder.RESULTS_FILE}")
