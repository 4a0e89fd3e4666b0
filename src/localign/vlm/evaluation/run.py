"""`localign vlm eval`: put benchmarks to a model on all ranks, and continue an interrupted evaluation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import torch

from localign.engine import run_folder
from localign.engine.distributed import DistributedContext, distributed_context
from localign.engine.progress import Bar
from localign.errors import RunFailure, UserError
from localign.files.disk import writing
from localign.files.output import EVAL_FILES, OutputFolder
from localign.options.vlm.evaluation import EvalConfig
from localign.text.printing import printable
from localign.vlm.data.images import open_image
from localign.vlm.evaluation.answer_cache import AnswerCacheWriter, answer_key, read_answer_cache
from localign.vlm.evaluation.model_base import AnsweringModel, LazyModel
from localign.vlm.evaluation.models import fingerprint_of, hub_commit, open_model
from localign.vlm.evaluation.printing import print_results
from localign.vlm.evaluation.results import (
    BenchmarkOutcome,
    EvalResults,
    outcome_of,
    score_answers,
    with_scoring,
    write_answers,
)
from localign.vlm.scoring.base import Benchmark, QuestionSet
from localign.vlm.scoring.boxes import BoxFrame
from localign.vlm.scoring.questions import MAX_NEW_TOKENS, Answer, Question

Suites = Sequence[tuple[Benchmark, QuestionSet]]


def run_eval(config: EvalConfig) -> None:
    """Read the official files, ask the model, write results.json and print a table.

    Raises:
        UserError: Data, model or options are wrong; the weights are not loaded before this is known.
    """
    with distributed_context(config.device) as ranks:
        frame = frame_of(config)
        suites = [
            (
                suite,
                suite.read(
                    config.data,
                    limit=config.limit,
                    allow_partial=config.allow_partial,
                    allow_outside=config.allow_outside,
                ),
            )
            for suite in [with_scoring(name, config.scoring) for name in config.benchmarks]
        ]
        model = model_of(config, ranks, frame)
        folder = Path(config.out)
        results = evaluate(model, suites, folder, ranks, config.batch_size, config.model)
        if results is not None:
            print_results(results["benchmarks"])
            print(f"answers    {printable(folder / 'answers.jsonl')}")
            print(f"results    {printable(folder / run_folder.RESULTS_FILE)}")


def frame_of(config: EvalConfig) -> BoxFrame | None:
    """The box frame of the command line; None for the default.

    Raises:
        UserError: It is not a box frame.
    """
    return None if config.boxes is None else BoxFrame.parse(config.boxes)


def model_of(config: EvalConfig, ranks: DistributedContext, frame: BoxFrame | None = None) -> LazyModel:
    """The model of the command line, without its weights.

    Raises:
        UserError: There is no such model.
    """
    is_low = config.dtype == "bfloat16" or (config.dtype == "auto" and ranks.device.type == "cuda")
    # The main rank does this for all: hashing the weights is slow, and a branch may move in between.
    identity = _commit_and_fingerprint(config) if ranks.is_main else (None, "")
    commit, fingerprint = ranks.all_gather_object(identity)[0]
    dtype = torch.bfloat16 if is_low else torch.float32
    return open_model(config.model, fingerprint, ranks.device, dtype, frame, commit)


def _commit_and_fingerprint(config: EvalConfig) -> tuple[str | None, str]:
    commit = hub_commit(config.model, config.revision)
    return commit, fingerprint_of(config.model, commit)


def evaluate(
    model: AnsweringModel,
    suites: Suites,
    folder: Path,
    ranks: DistributedContext,
    batch_size: int,
    name: str = "model",
) -> EvalResults | None:
    """Ask the questions that are not in the answer cache, score all answers, and write the results.

    Args:
        model: The model to ask.
        suites: Benchmarks with their questions.
        folder: Folder of ``answers.jsonl``, ``results.json`` and the answer cache; created if it does not exist.
        ranks: This process among all ranks. Each rank asks its share of the questions.
        batch_size: Questions per batch.
        name: The model's name in the results.

    Returns:
        The content of ``results.json`` on the main rank, None on other ranks.

    Raises:
        UserError: The model's answers could not be scored; another process writes into the folder; or, after all
            other questions were asked, an image cannot be read and the data may not be partial.
    """
    check_scorable(model, suites)
    output = None
    with ranks.raise_on_all_ranks(), writing(folder):
        if ranks.is_main:
            output = OutputFolder(folder, "vlm eval", EVAL_FILES)
    try:
        questions = [_keyed(model, suite, question) for suite, data in suites for question in data.questions]
        cached = read_answer_cache(folder, model.frame)
        ranks.barrier()  # every rank reads the cache before any rank writes to it
        pending = [question for question in questions if question.key not in cached]
        unreadable = ranks.all_gather_object(answer_pending(model, pending, folder, ranks, batch_size))
        if not ranks.is_main:
            return None
        return _write_results(model, suites, questions, set(chain.from_iterable(unreadable)), folder, name)
    finally:
        if output is not None:
            output.close()


def check_scorable(model: AnsweringModel, suites: Suites) -> None:
    """Check that the model's answers can be scored, before it is asked.

    Raises:
        UserError: They cannot.
    """
    for suite, data in suites:
        for choices in dict.fromkeys(question.choices for question in data.questions):
            if choices:
                model.check_choices(choices)
        one_per_split = {question.split: question for question in data.questions if not question.choices}
        for question in one_per_split.values():
            suite.score(question, Answer(frame=model.frame))


@dataclass(frozen=True, slots=True)
class _KeyedQuestion:
    """A question with its key in the answer cache."""

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
    """Ask this rank's share of the questions. Answers are on the disk as soon as their batch is done.

    Returns:
        The keys of questions whose image cannot be read.
    """
    unreadable: list[str] = []
    share = pending[ranks.rank :: ranks.size]
    if not share:
        return unreadable
    writer = AnswerCacheWriter(folder, ranks.rank)
    bar = Bar("questions", len(pending)) if ranks.is_main else None
    done = 0
    try:
        for batch in _batches(share, batch_size):
            answers = _readable_answers(model, batch)
            writer.add((asked.key, asked.question.id, answer) for asked, answer in answers)
            answered = {asked.key for asked, _ in answers}
            unreadable += [asked.key for asked in batch if asked.key not in answered]
            done += len(batch)
            if bar is not None:
                bar.update(min(done * ranks.size, len(pending)), len(pending))
    finally:
        writer.close()
        if bar is not None:
            bar.close()
    return unreadable


def _batches(pending: Sequence[_KeyedQuestion], size: int) -> Iterator[list[_KeyedQuestion]]:
    """Batches of one benchmark and one mode, longest prompts first, so that a lack of memory shows at once."""
    for _, group in groupby(pending, key=lambda asked: (asked.benchmark, asked.question.mode)):
        longest_first = sorted(group, key=lambda asked: -len(asked.prompt))
        for begin in range(0, len(longest_first), size):
            yield longest_first[begin : begin + size]


def _readable_answers(
    model: AnsweringModel, batch: Sequence[_KeyedQuestion]
) -> list[tuple[_KeyedQuestion, Answer]]:
    """Answers to the questions of a batch whose image can be read."""
    try:
        return _answers(model, batch)
    except UserError:
        # Images are checked only after a failure: decoding all of them twice would cost more than asking again.
        unreadable = {image for image in {asked.question.image for asked in batch} if not _is_readable(image)}
        if not unreadable:
            raise
    rest = [asked for asked in batch if asked.question.image not in unreadable]
    return _answers(model, rest) if rest else []


def _answers(model: AnsweringModel, batch: Sequence[_KeyedQuestion]) -> list[tuple[_KeyedQuestion, Answer]]:
    questions = [asked.question for asked in batch]
    if questions[0].choices:
        answers = [Answer(probabilities=tuple(row)) for row in model.choice_probabilities(questions)]
    else:
        answers = [Answer(text=text) for text in model.answer_texts(questions, MAX_NEW_TOKENS)]
    return list(zip(batch, answers, strict=True))


def _is_readable(image: str) -> bool:
    try:
        open_image(image)
    except UserError:
        return False
    return True


def _write_results(
    model: AnsweringModel,
    suites: Suites,
    questions: Sequence[_KeyedQuestion],
    unreadable: Collection[str],
    folder: Path,
    name: str,
) -> EvalResults:
    """Score all cached answers, and write ``answers.jsonl`` and ``results.json``."""
    answers = read_answer_cache(folder, model.frame)
    missing = sum(asked.key not in answers and asked.key not in unreadable for asked in questions)
    if missing:
        raise RunFailure(
            f"{missing} answers are missing in {folder}; do all ranks write to the same file system?"
        )
    remaining = iter(questions)
    scored = []
    for suite, data in suites:
        own = [next(remaining) for _ in data.questions]
        answered = [asked for asked in own if asked.key in answers]
        readable = suite.without_unreadable(
            data, {asked.question.id for asked in own if asked.key not in answers}
        )
        prompts = [asked.prompt for asked in answered]
        scored.append(score_answers(suite, readable, [answers[asked.key] for asked in answered], prompts))
    results = results_of(model, name, {part.benchmark.name: outcome_of(part) for part in scored})
    # An interruption must not leave new answers beside old results.
    (folder / run_folder.RESULTS_FILE).unlink(missing_ok=True)
    write_answers(folder, scored)
    run_folder.write_results(folder, dict(results))
    return results


def results_of(model: AnsweringModel, name: str, outcomes: Mapping[str, BenchmarkOutcome]) -> EvalResults:
    """The content of ``results.json``.

    Args:
        model: The model that was asked.
        name: The model's name in the results.
        outcomes: By benchmark.
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
