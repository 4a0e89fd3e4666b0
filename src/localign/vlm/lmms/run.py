"""`localign vlm eval --engine lmms-eval`: lmms-eval asks our models, its own tasks and ours alike."""

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
from localign.engine.lock import lock
from localign.errors import RunFailure, UserError, did_you_mean
from localign.vlm.evaluation.models import LocalignModel, TransformersModel
from localign.vlm.evaluation.options import IN_LMMS_EVAL, EvalConfig
from localign.vlm.evaluation.results import (
    ANSWERS_FILE,
    ScoredAnswers,
    console,
    outcome_of,
    score_answers,
    show_results,
    write_answers,
)
from localign.vlm.evaluation.run import check, frame_of, model_of, results_of
from localign.vlm.lmms.registration import MODEL_NAME, TASK_FOLDER

OUTPUT_FOLDER = "lmms-eval"
"""Of what lmms-eval writes by itself, a folder for each name asked for."""


def run_lmms_eval(config: EvalConfig) -> None:
    """Every task through lmms-eval: its own output, and beside it ours, as of ``localign vlm eval``.

    Raises:
        UserError: lmms-eval is missing, or data, model, tasks or options do not do.
        RunFailure: lmms-eval cannot load a task.
    """
    _require()
    with distributed_context(config.device) as ranks:
        if ranks.size > 1:
            raise UserError("--engine lmms-eval works in one process; start it without torchrun")
        if config.limit is not None and config.limit < 1:
            raise UserError(f"--limit must be at least 1, not {config.limit}")
        frame = frame_of(config)
        model = model_of(config, ranks, frame)
        manager = _manager(config)
        ours = {name: _our_task(manager, name, config, model) for name in config.benchmarks if _is_ours(name)}
        check(model, [(task.suite, task.data) for task in ours.values()])
        folder = Path(config.out)
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder)
        try:
            results = _evaluate(config, model, manager, ours, folder)
        finally:
            if held is not None:
                held.close()
    _say(results, folder)


def _require() -> None:
    try:
        importlib.import_module("lmms_eval.evaluator")
        importlib.import_module("filelock._api")  # which lmms-eval needs, and filelock 4 lacks
    except ImportError as error:
        raise UserError(
            f"--engine lmms-eval needs the package lmms-eval ({error}); install localign[lmms-eval]"
        ) from None
    from loguru import logger

    logger.remove()  # lmms-eval's warnings go where localign's go, not among the results
    logger.add(lambda message: sys.stderr.write(message), level="WARNING", format="lmms-eval  {message}")


def _is_ours(name: str) -> bool:
    return name in IN_LMMS_EVAL


def _manager(config: EvalConfig) -> Any:
    """lmms-eval's tasks and ours. Raises UserError if a name is not among them, or a folder is none."""
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


def _our_task(manager: Any, name: str, config: EvalConfig, model: LocalignModel | TransformersModel) -> Any:
    options = {
        "root": config.data,
        "limit": config.limit,
        "allow_partial": config.allow_partial,
        "scoring": config.scoring,
        "boxes": None if model.frame is None else str(model.frame),
    }
    return manager.load_config({"task": name, "dataset_kwargs": options})[name]


def _evaluate(
    config: EvalConfig,
    model: LocalignModel | TransformersModel,
    manager: Any,
    ours: Mapping[str, Any],
    folder: Path,
) -> dict[str, Any]:
    from localign.vlm.lmms.model import LocalignLMM

    asked = LocalignLMM(model, config.batch_size)
    judged: list[ScoredAnswers] = []
    outcomes: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for name in config.benchmarks:
        task = ours.get(name)
        output = _run(asked, name, task, config, manager)
        _save(output, config.model, folder / OUTPUT_FOLDER / name)
        if task is None:
            own |= {part: _numbers(found) for part, found in output["results"].items()}
        else:
            judged.append(_judged(task, output["samples"][name], model))
            outcomes[name] = outcome_of(judged[-1])
            for figure, values in outcomes[name]["figures"].items():
                values["value"] = output["results"][name][f"{figure},none"]
    results = results_of(model, config.model, outcomes)
    results |= {"engine": "lmms-eval", "tasks": own}
    results["versions"]["lmms-eval"] = importlib.metadata.version("lmms-eval")
    write_answers(folder, judged)
    run_folder.write_results(folder, results)
    return results


def _run(asked: Any, name: str, task: Any, config: EvalConfig, manager: Any) -> dict[str, Any]:
    """One task, or a group of lmms-eval's, asked and scored; ``task`` is there where it is one of ours."""
    from lmms_eval.evaluator import simple_evaluate
    from tenacity import RetryError

    try:
        found: dict[str, Any] = simple_evaluate(
            model=asked,
            tasks=[name if task is None else task],
            task_manager=manager,
            limit=config.limit if task is None else None,  # ours have theirs already, of each split
            batch_size=config.batch_size,
        )
    except RetryError as error:  # it tries five times, whatever is wrong
        cause = error.last_attempt.exception()
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise RunFailure(f"lmms-eval fails on {name}: {first}") from cause
    except ImportError as error:
        raise UserError(f"lmms-eval's task {name} needs a package that is missing: {error}") from None
    return found


def _save(output: dict[str, Any], model: str, folder: Path) -> None:
    """lmms-eval's own files, under its own names."""
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
        tracker.save_results_samples(name, [_brief(sample, name) for sample in samples[name]])


def _brief(sample: Mapping[str, Any], task: str) -> dict[str, Any]:
    """A sample for lmms-eval's file; of our tasks, what is the same for every figure is there once."""
    if task not in IN_LMMS_EVAL:
        return dict(sample)
    scored = {name: value for name, value in sample.items() if isinstance(value, dict) and "score" in value}
    rest = {name: value for name, value in sample.items() if name not in scored}
    return rest | next(iter(scored.values()))


def _judged(task: Any, samples: list[Any], model: LocalignModel | TransformersModel) -> ScoredAnswers:
    """Our records of the answers that lmms-eval collected."""
    by_number = {sample["doc"]["number"]: sample["filtered_resps"] for sample in samples}
    questions = task.data.questions
    if by_number.keys() != set(range(len(questions))):
        raise RunFailure(f"lmms-eval gave {len(by_number)} of {len(questions)} answers to {task.suite.name}")
    answers = [task.answer(number, by_number[number]) for number in range(len(questions))]
    return score_answers(
        task.suite, task.data, answers, [model.prompt(question.message) for question in questions]
    )


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, (int, float)) and name != "samples"
    }


def _say(results: Mapping[str, Any], folder: Path) -> None:
    if results["benchmarks"]:
        show_results(results["benchmarks"])
    if results["tasks"]:
        table = Table(title="tasks of lmms-eval", caption="in the tasks' own units")
        table.add_column("task")
        table.add_column("figure")
        table.add_column("value", justify="right")
        for task, figures in results["tasks"].items():
            shown = {name: value for name, value in figures.items() if "_stderr" not in name}
            for number, (figure, value) in enumerate(shown.items()):
                table.add_row("" if number else task, figure, f"{value:.4f}")
        console().print(table)
    print(f"answers    {folder / ANSWERS_FILE}")
    print(f"results    {folder / run_folder.RESULTS_FILE}")
    print(f"lmms-eval  {folder / OUTPUT_FOLDER}")
