"""`localign vlm eval --engine lmms-eval`: lmms-eval asks our models, with its own tasks and with ours."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from localign.engine import run_folder
from localign.engine.distributed import distributed_context
from localign.errors import RunFailure, UserError, did_you_mean
from localign.files.output import EVAL_FILES, output_folder
from localign.options.vlm.evaluation import IN_LMMS_EVAL, EvalConfig
from localign.text.printing import console
from localign.vlm.evaluation.model_base import LazyModel
from localign.vlm.evaluation.printing import WIDTH, print_results
from localign.vlm.evaluation.results import (
    ANSWERS_FILE,
    BenchmarkOutcome,
    EvalResults,
    ScoredAnswers,
    outcome_of,
    score_answers,
    write_answers,
)
from localign.vlm.evaluation.run import check_scorable, frame_of, model_of, results_of
from localign.vlm.lmms.registration import MODEL_NAME, TASK_FOLDER

OUTPUT_FOLDER = "lmms-eval"
"""Folder of lmms-eval's own output, with one sub-folder per task."""


def run_lmms_eval(config: EvalConfig) -> None:
    """Run every task through lmms-eval; write its own output and ``localign vlm eval``'s files.

    Raises:
        UserError: lmms-eval is missing, or data, model, tasks or options are wrong.
        RunFailure: lmms-eval cannot load a task.
    """
    _require_lmms_eval()
    with distributed_context(config.device) as ranks:
        if ranks.size > 1:
            raise UserError("--engine lmms-eval runs in one process; start it without torchrun")
        if config.limit is not None and config.limit < 1:
            raise UserError(f"--limit must be at least 1, not {config.limit}")
        frame = frame_of(config)
        model = model_of(config, ranks, frame)
        manager = _task_manager(config)
        our_tasks = {
            name: _our_task(manager, name, config, model)
            for name in config.benchmarks
            if name in IN_LMMS_EVAL
        }
        check_scorable(model, [(task.suite, task.data) for task in our_tasks.values()])
        folder = Path(config.out)
        with output_folder(folder, "vlm eval", EVAL_FILES):
            results = _evaluate(config, model, manager, our_tasks, folder)
    _print_results(results, folder)


def _require_lmms_eval() -> None:
    try:
        importlib.import_module("lmms_eval.evaluator")
        importlib.import_module("filelock._api")  # lmms-eval needs this module, which filelock 4 lacks
    except ImportError as error:
        raise UserError(
            f"--engine lmms-eval needs the package lmms-eval ({error}); install localign[lmms-eval]"
        ) from None
    from loguru import logger

    logger.remove()  # warnings go to stderr, so that they do not mix with the results
    logger.add(lambda message: sys.stderr.write(message), level="WARNING", format="lmms-eval  {message}")


def _task_manager(config: EvalConfig) -> Any:
    """A task manager with lmms-eval's tasks and ours.

    Raises:
        UserError: There is no task of a given name, or a folder of tasks does not exist.
    """
    from lmms_eval.tasks import TaskManager

    for folder in config.task_folders:
        if not Path(folder).is_dir():
            raise UserError(f"--task-folders: there is no folder {folder}")
    manager = TaskManager(include_path=[str(TASK_FOLDER), *config.task_folders], model_name=MODEL_NAME)
    for name in config.benchmarks:
        if name not in manager.all_tasks:
            raise UserError(
                f"lmms-eval has no task {name!r}{did_you_mean(name, manager.all_tasks)}; `lmms-eval tasks` lists them"
            )
    return manager


def _our_task(manager: Any, name: str, config: EvalConfig, model: LazyModel) -> Any:
    options = {
        "root": config.data,
        "limit": config.limit,
        "allow_partial": config.allow_partial,
        "allow_outside": config.allow_outside,
        "scoring": config.scoring,
        "boxes": None if model.frame is None else str(model.frame),
    }
    return manager.load_config({"task": name, "dataset_kwargs": options})[name]


def _evaluate(
    config: EvalConfig,
    model: LazyModel,
    manager: Any,
    our_tasks: Mapping[str, Any],
    folder: Path,
) -> EvalResults:
    from localign.vlm.lmms.model import LocalignLMM

    lmm = LocalignLMM(model, config.batch_size)
    scored: list[ScoredAnswers] = []
    outcomes: dict[str, BenchmarkOutcome] = {}
    own_metrics: dict[str, dict[str, float]] = {}
    for name in config.benchmarks:
        task = our_tasks.get(name)
        output = _run_task(lmm, name, task, config, manager)
        _save(output, config.model, folder / OUTPUT_FOLDER / name)
        if task is None:
            own_metrics |= {part: _numbers(found) for part, found in output["results"].items()}
        else:
            scored.append(_scored_answers(task, output["samples"][name], model))
            outcomes[name] = outcome_of(scored[-1])
            for metric, values in outcomes[name]["figures"].items():
                values["value"] = output["results"][name][f"{metric},none"]
    results: EvalResults = {
        **results_of(model, config.model, outcomes),
        "engine": "lmms-eval",
        "tasks": own_metrics,
    }
    results["versions"]["lmms-eval"] = importlib.metadata.version("lmms-eval")
    write_answers(folder, scored)
    run_folder.write_results(folder, dict(results))
    return results


def _run_task(lmm: Any, name: str, task: Any, config: EvalConfig, manager: Any) -> dict[str, Any]:
    """Ask and score one task, or one group of lmms-eval's tasks.

    Args:
        lmm: The model.
        name: Name of the task or group.
        task: The task if it is ours, else None.
        config: The command's options.
        manager: The task manager.

    Returns:
        lmms-eval's output.

    Raises:
        UserError: The task needs a package that is missing.
        RunFailure: lmms-eval fails on the task.
    """
    from lmms_eval.evaluator import simple_evaluate
    from tenacity import RetryError

    try:
        output: dict[str, Any] = simple_evaluate(
            model=lmm,
            tasks=[name if task is None else task],
            task_manager=manager,
            limit=config.limit if task is None else None,  # our tasks limit each split themselves
            batch_size=config.batch_size,
        )
    except RetryError as error:  # lmms-eval tries five times, on any error
        cause = error.last_attempt.exception()
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise RunFailure(f"lmms-eval fails on {name}: {first}") from cause
    except ImportError as error:
        raise UserError(f"lmms-eval's task {name} needs a package that is missing: {error}") from None
    return output


def _save(output: dict[str, Any], model: str, folder: Path) -> None:
    """Write lmms-eval's own files under their usual names."""
    from lmms_eval.loggers import EvaluationTracker
    from lmms_eval.utils import get_datetime_str

    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.log_experiment_args(
        model_source=MODEL_NAME,
        model_args=f"pretrained={model}",
        system_instruction="",
        chat_template="",
        fewshot_as_multiturn=False,
    )
    samples = output["samples"]
    content = {name: value for name, value in output.items() if name != "samples"}
    tracker.save_results_aggregated(content, samples, get_datetime_str())
    for name in output["configs"]:
        tracker.save_results_samples(name, [_log_sample(sample, name) for sample in samples[name]])


def _log_sample(sample: Mapping[str, Any], task: str) -> dict[str, Any]:
    """A sample for lmms-eval's log. The samples of our tasks repeat the score for every metric; the log has it once."""
    if task not in IN_LMMS_EVAL:
        return dict(sample)
    scores = {name: value for name, value in sample.items() if isinstance(value, dict) and "score" in value}
    rest = {name: value for name, value in sample.items() if name not in scores}
    return rest | next(iter(scores.values()))


def _scored_answers(task: Any, samples: list[Any], model: LazyModel) -> ScoredAnswers:
    """The answers that lmms-eval collected for one of our tasks."""
    by_number = {sample["doc"]["number"]: sample["filtered_resps"] for sample in samples}
    questions = task.data.questions
    if by_number.keys() != set(range(len(questions))):
        raise RunFailure(
            f"lmms-eval returned {len(by_number)} of {len(questions)} answers to {task.suite.name}"
        )
    answers = [task.answer(number, by_number[number]) for number in range(len(questions))]
    return score_answers(
        task.suite, task.data, answers, [model.prompt(question.message) for question in questions]
    )


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """The numeric metrics of a task."""
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, (int, float)) and name != "samples"
    }


def _print_results(results: EvalResults, folder: Path) -> None:
    if results["benchmarks"]:
        print_results(results["benchmarks"])
    if results["tasks"]:
        table = Table(title="tasks of lmms-eval", caption="in the tasks' own units")
        table.add_column("task")
        table.add_column("figure")
        table.add_column("value", justify="right")
        for task, metrics in results["tasks"].items():
            shown = {name: value for name, value in metrics.items() if "_stderr" not in name}
            for number, (metric, value) in enumerate(shown.items()):
                table.add_row("" if number else task, metric, f"{value:.4f}")
        console(WIDTH).print(table)
    print(f"answers    {folder / ANSWERS_FILE}")
    print(f"results    {folder / run_folder.RESULTS_FILE}")
    print(f"lmms-eval  {folder / OUTPUT_FOLDER}")
