"""`localign vlm demo`: does locality alignment improve a vision-language model? Measured on drawn scenes.

It runs the same code as `align` and `vlm train`. A small language model first learns the questions' language from
text alone. Then one model per adapter and seed is trained on the same conversations for the same number of steps,
and tested on questions about new scenes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from rich.table import Table

from localign.alignment import AlignConfig, AlignTask
from localign.engine import run_folder, train
from localign.engine.distributed import DistributedContext, choose_device
from localign.engine.log import Stopwatch, read_log, say
from localign.errors import UserError
from localign.options.demo import DemoConfig
from localign.options.vlm.demo import MODELS, VLMDemoConfig
from localign.options.vlm.train import VLMConfig
from localign.statistics.paired import paired_difference
from localign.text.printing import console, printable
from localign.vlm.benchmarks.scenes import Guess, Scenes, guessing
from localign.vlm.data.scene_dataset import write_dataset
from localign.vlm.demo.side_by_side import Job, available_cores, run_side_by_side
from localign.vlm.demo.tinylm import TinyLMConfig, train_tiny_lm
from localign.vlm.evaluation.models import fingerprint_of, open_model
from localign.vlm.evaluation.run import evaluate
from localign.vlm.task import VLMTask

EVALUATION = "eval"
"""Folder of a model's answers and scores, in its run folder."""
LLM_WIDTH, LLM_MLP_WIDTH = 128, 320
"""Widths of the language model, small enough to converge on a laptop."""
_EVAL_BATCH = 128
"""Questions per batch in evaluation."""


class KindScore(TypedDict):
    """A model's score on one kind of question."""

    accuracy: float
    """Share, 0..1."""
    interval: list[float] | None
    """95 % interval (low, high) of the accuracy; None if there are too few questions."""
    questions: int


class TrainedModel(TypedDict):
    """The results of one model with one seed."""

    seed: int
    loss: float
    """The last logged training loss."""
    kinds: dict[str, KindScore]


class VLMDemoResults(TypedDict):
    """Content of the demo's ``results.json``."""

    command: str
    config: dict[str, Any]
    versions: Mapping[str, Any]
    seconds: float
    models: dict[str, list[TrainedModel]]
    """Name of a model -> its results by seed."""
    guessing: dict[str, Guess]
    notes: list[str]


def fast_options(device: str) -> dict[str, Any]:
    """Options that train small models on short conversations faster on this machine than the defaults.

    On CPUs padded rows are faster than packed rows. bf16 instructions make matrix products four to five times as
    fast, but not fused attention.
    """
    if choose_device(device).type != "cpu":
        return {}
    # torch 2.9 lacks the function; there the models train in float32.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    bf16 = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return {"batching": "padded", **({"precision": "bf16", "llm_attention": "eager"} if bf16 else {})}


def run_vlm_demo(config: VLMDemoConfig) -> VLMDemoResults:
    """Run the demo, from drawing scenes to the table of results; returns the content of ``results.json``.

    Raises:
        UserError: The folder holds a demo with other options.
        RunFailure: A training failed.
        RunStopped: SIGTERM or SIGUSR1 was received.
    """
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    _check_unchanged(folder, config)
    run_folder.save_config(folder, "vlm demo", config)
    clock = Stopwatch()
    say("writing questions")
    train_file = _write_split(config, "train", config.scenes)
    test_file = _write_split(config, "test", config.test_scenes)
    _prepare(config, folder, train_file)
    seeds = range(config.seed, config.seed + config.seeds)
    _train_models(
        [
            config.vlm_config(name, seed, **fast_options(config.device))
            for seed in seeds
            for name in config.models
        ],
        config,
    )
    say("evaluating")
    models = {
        name: [_evaluate_model(config, name, seed, test_file) for seed in seeds] for name in config.models
    }
    results = VLMDemoResults(
        command="vlm demo",
        config=asdict(config),
        versions=run_folder.provenance(),
        seconds=clock.elapsed,
        models=models,
        guessing=guessing(*(Scenes().questions(file.parent) for file in (train_file, test_file))),
        notes=[
            "Scenes are drawn and the language model is small: the results compare adapters and do not transfer "
            "to photographs.",
            "All models of a seed see the same conversations in the same order, for the same number of steps.",
        ],
    )
    path = run_folder.write_results(folder, dict(results))
    console().print(_table(results))
    print(f"results    {printable(path)}")
    return results


def _write_split(config: VLMDemoConfig, split: str, scenes: int) -> Path:
    """Write a split's images and questions; returns the file of questions."""
    processes = available_cores() if available_cores() > 1 else 0
    folder = Path(config.out) / split
    return write_dataset(folder, split, scenes, config.questions, config.kinds, processes=processes)


def _check_unchanged(folder: Path, config: VLMDemoConfig) -> None:
    """Refuse to resume a demo with options that change its results; more seeds and models are allowed."""
    if not (folder / run_folder.CONFIG_FILE).is_file():
        return
    saved, now = run_folder.read_config(folder)["config"], run_folder.to_dict(config)
    changeable = ("seeds", "models", "device", "workers", "at_once", "out")
    fields = [f for f in now if f not in changeable and saved.get(f) != now[f]]
    if fields:
        listed = "; ".join(f"{f}: {saved.get(f)!r} there, {now[f]!r} now" for f in fields)
        raise UserError(f"{folder} holds a demo with another config: {listed}; give another --out")


def _prepare(config: VLMDemoConfig, folder: Path, train_file: Path) -> None:
    """Train the language model, and align the backbone if a model needs it, unless that was done before."""
    lm = TinyLMConfig(
        data=str(train_file),
        out=str(folder / "llm"),
        steps=config.llm_steps,
        warmup_steps=config.llm_steps // 10,
        width=LLM_WIDTH,
        mlp_width=LLM_MLP_WIDTH,
        seed=config.seed,
        device=config.device,
        resume="auto",
    )
    if not (folder / "llm" / run_folder.RESULTS_FILE).is_file():
        say("training the language model")
        train_tiny_lm(lm)
    if (
        any(MODELS[name][0] for name in config.models)
        and not (folder / "align" / run_folder.RESULTS_FILE).is_file()
    ):
        say("aligning")
        align = alignment_config(config)
        train(AlignTask(align), align, "align")


def alignment_config(config: VLMDemoConfig) -> AlignConfig:
    """The options of the alignment that all aligned models start from."""
    demo = DemoConfig(out=config.out, full=True, device=config.device)
    return replace(demo.align_config(config.seed), out=str(Path(config.out) / "align"))


def _train_models(configs: Sequence[VLMConfig], demo: VLMDemoConfig) -> None:
    """Train the models that are not trained yet."""
    untrained = [vlm for vlm in configs if not (Path(vlm.out) / run_folder.RESULTS_FILE).is_file()]
    on_cpu = choose_device(demo.device).type == "cpu"
    at_once = min(len(untrained), demo.at_once or (available_cores() if on_cpu else 1))
    if at_once > 1:
        run_side_by_side([Job("vlm train", vlm) for vlm in untrained], at_once)
        return
    for vlm in untrained:
        say(Path(vlm.out).name)
        train(VLMTask(vlm), vlm, "vlm train")


def _evaluate_model(config: VLMDemoConfig, name: str, seed: int, test_file: Path) -> TrainedModel:
    out = Path(config.vlm_config(name, seed).out)
    losses = [entry["loss"] for entry in read_log(out) if "loss" in entry]
    return {"seed": seed, "loss": losses[-1], "kinds": _scores(config, out, test_file.parent)}


def _scores(config: VLMDemoConfig, out: Path, test: Path) -> dict[str, KindScore]:
    """A model's score on each kind of question; answers that are on disk already are reused."""
    suite = Scenes()
    context = DistributedContext(0, 1, 0, choose_device(config.device))
    model = open_model(str(out), fingerprint_of(str(out)), context.device, torch.float32)
    results = evaluate(model, [(suite, suite.read(test))], out / EVALUATION, context, _EVAL_BATCH, str(out))
    assert results is not None
    outcome = results["benchmarks"][suite.name]
    scores: dict[str, KindScore] = {}
    for kind, questions in outcome["splits"].items():
        figure = outcome["figures"][f"accuracy__Scenes-{kind}"]
        percent, bounds = figure["value"], figure["interval"]
        assert percent is not None
        scores[kind] = {
            "accuracy": percent / 100,
            "interval": None if bounds is None else [bound / 100 for bound in bounds],
            "questions": questions,
        }
    return scores


def _table(results: VLMDemoResults) -> Table:
    """Accuracy per kind of question, with the difference to the first model."""
    models = results["models"]
    first, *others = models
    table = Table(title="Accuracy on test scenes, %")
    for column in ("question", "guessing", first, *others):
        table.add_column(column, justify="left" if column == "question" else "right")
    for kind, guess in results["guessing"].items():
        values = {
            name: [100 * seed["kinds"][kind]["accuracy"] for seed in seeds] for name, seeds in models.items()
        }
        cells = [_cell(models[first], kind)]
        for name in others:
            change = paired_difference(values[first], values[name])
            margin = "" if change.half_width is None else f" ± {change.half_width:.1f}"
            cells.append(f"{_cell(models[name], kind)}  ({change.difference:+.1f}{margin})")
        table.add_row(kind, f"{100 * max(guess['majority'], guess['blind']):.1f}", *cells)
    table.caption = (
        "In parentheses: difference to the first model, ± half the width of its 95 % t-interval over seeds. "
        "Guessing: always the most common answer, or the most common answer to the same question; the better of both."
    )
    return table


def _cell(seeds: Sequence[TrainedModel], kind: str) -> str:
    """Mean accuracy in percent; for a single seed with its interval."""
    mean = sum(100 * s["kinds"][kind]["accuracy"] for s in seeds) / len(seeds)
    bounds = seeds[0]["kinds"][kind]["interval"]
    if len(seeds) > 1 or bounds is None:
        return f"{mean:.1f}"
    return f"{mean:.1f} [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"
