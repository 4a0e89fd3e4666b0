"""`localign vlm demo`: does an aligned backbone with its decoder make a better vision-language model? On scenes.

The same code as `align` and `vlm train` on questions about drawn scenes. A small language model learns the
questions' language first, from text alone; then one model per adapter and seed is trained on the same
conversations for the same steps, and asked about scenes that nothing was trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from localign.alignment import AlignTask
from localign.engine import run_folder, train
from localign.engine.distributed import DistributedContext, choose_device
from localign.engine.log import Stopwatch, read_log, say
from localign.errors import UserError
from localign.options.demo import DemoConfig
from localign.options.vlm.demo import MODELS, VLMDemoConfig
from localign.options.vlm.train import VLMConfig
from localign.statistics.paired import paired
from localign.vlm.benchmarks.scenes import Scenes, guessing
from localign.vlm.data.scene_dataset import write_dataset
from localign.vlm.demo.side_by_side import Job, available_cores, run_side_by_side
from localign.vlm.demo.tinylm import TinyLMConfig, train_tiny_lm
from localign.vlm.evaluation.models import fingerprint_of, open_model
from localign.vlm.evaluation.run import evaluate
from localign.vlm.task import VLMTask

EVALUATION = "eval"
"""Folder of a model's answers and results, in its run folder."""
LLM_WIDTH, LLM_MLP_WIDTH = 128, 320
"""Of the language model: small enough to converge on a laptop."""
_TOGETHER = 128
"""Questions that are asked at a time."""


def fast_options(device: str) -> dict[str, Any]:
    """Options of training a small model on short conversations that are faster on this machine than the defaults.

    On CPUs a packed row costs its whole mask. With bf16 instructions products are four to five times as fast, but
    fused attention is not.
    """
    if choose_device(device).type != "cpu":
        return {}
    # torch 2.9 lacks the function, and its users train in float32
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    bf16 = bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return {"batching": "padded", **({"precision": "bf16", "llm_attention": "eager"} if bf16 else {})}


def run_vlm_demo(config: VLMDemoConfig) -> dict[str, Any]:
    """Everything from scenes to the table; returns the content of ``results.json``."""
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    _check_same(folder, config)
    run_folder.save_config(folder, "vlm demo", config)
    clock = Stopwatch()
    say("writing questions")
    train_file = _written(config, "train", config.scenes)
    test_file = _written(config, "test", config.test_scenes)
    _prepare(config, folder, train_file)
    seeds = range(config.seed, config.seed + config.seeds)
    _train_models(
        [config.vlm_config(name, seed, **fast_options(config.device)) for seed in seeds for name in config.models],
        config,
    )
    say("asking")
    models = {name: [_asked_model(config, name, seed, test_file) for seed in seeds] for name in config.models}
    results = {
        "command": "vlm demo",
        "config": asdict(config),
        "versions": run_folder.provenance(),
        "seconds": clock.elapsed,
        "models": models,
        "guessing": guessing(*(Scenes().questions(file.parent) for file in (train_file, test_file))),
        "notes": [
            "Scenes are drawn, and the language model is small: the figures compare adapters, and say nothing "
            "about photographs.",
            "All models of a seed see the same conversations in the same order, for the same steps.",
        ],
    }
    path = run_folder.write_results(folder, results)
    Console().print(_table(results))
    print(f"results    {path}")
    return results


def _written(config: VLMDemoConfig, split: str, scenes: int) -> Path:
    """Questions on a split's scenes."""
    processes = available_cores() if available_cores() > 1 else 0
    folder = Path(config.out) / split
    return write_dataset(folder, split, scenes, config.questions, config.kinds, processes=processes)


def _check_same(folder: Path, config: VLMDemoConfig) -> None:
    """A demo may be continued with more seeds or models, on another device; all else must stay."""
    if not (folder / run_folder.CONFIG_FILE).is_file():
        return
    saved, now = run_folder.read_config(folder)["config"], run_folder.to_dict(config)
    free = ("seeds", "models", "device", "workers", "at_once", "out")
    fields = [f for f in now if f not in free and saved.get(f) != now[f]]
    if fields:
        listed = "; ".join(f"{f}: {saved.get(f)!r} there, {now[f]!r} now" for f in fields)
        raise UserError(f"{folder} holds a demo with another config: {listed}; give another --out")


def _prepare(config: VLMDemoConfig, folder: Path, train_file: Path) -> None:
    """The language model, and the aligned backbone where a model takes it."""
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
        say("the language model")
        train_tiny_lm(lm)
    if (
        any(MODELS[name][0] for name in config.models)
        and not (folder / "align" / run_folder.RESULTS_FILE).is_file()
    ):
        say("aligning")
        demo = DemoConfig(out=str(folder), device=config.device)
        align = replace(demo.align_config(config.seed), out=str(folder / "align"))
        train(AlignTask(align), align, "align")


def _train_models(configs: Sequence[VLMConfig], demo: VLMDemoConfig) -> None:
    """Train those that are not yet."""
    left = [vlm for vlm in configs if not (Path(vlm.out) / run_folder.RESULTS_FILE).is_file()]
    on_cpu = choose_device(demo.device).type == "cpu"
    at_once = min(len(left), demo.at_once or (available_cores() if on_cpu else 1))
    if at_once > 1:
        run_side_by_side([Job("vlm train", vlm) for vlm in left], at_once)
        return
    for vlm in left:
        say(Path(vlm.out).name)
        train(VLMTask(vlm), vlm, "vlm train")


def _asked_model(config: VLMDemoConfig, name: str, seed: int, test_file: Path) -> dict[str, Any]:
    """One model's results; what is on disk is taken as it is."""
    out = Path(config.vlm_config(name, seed).out)
    losses = [entry["loss"] for entry in read_log(out) if "loss" in entry]
    return {"seed": seed, "loss": losses[-1], "kinds": _asked(config, out, test_file.parent)}


def _asked(config: VLMDemoConfig, out: Path, test: Path) -> dict[str, Any]:
    """What a model scores on each kind of question, as `vlm eval` has it, in shares of 1; nothing is asked twice."""
    suite = Scenes()
    alone = DistributedContext(0, 1, 0, choose_device(config.device))
    model = open_model(str(out), fingerprint_of(str(out)), alone.device, torch.float32)
    results = evaluate(model, [(suite, suite.read(test))], out / EVALUATION, alone, _TOGETHER, str(out))
    assert results is not None
    outcome = results["benchmarks"][suite.name]
    found = {}
    for kind, questions in outcome["splits"].items():
        figure = outcome["figures"][f"accuracy__Scenes-{kind}"]
        value, bounds = figure["value"], figure["interval"]
        assert value is not None
        found[kind] = {
            "accuracy": value / 100,
            "interval": None if bounds is None else [end / 100 for end in bounds],
            "questions": questions,
        }
    return found


def _table(results: dict[str, Any]) -> Table:
    """Accuracy per kind of question, with the difference to the first model."""
    models: dict[str, list[dict[str, Any]]] = results["models"]
    first, *others = models
    table = Table(title="Accuracy on test scenes, %")
    for column in ("question", "guessing", first, *others):
        table.add_column(column, justify="left" if column == "question" else "right")
    for kind, guess in results["guessing"].items():
        values = {
            name: [100 * seed["kinds"][kind]["accuracy"] for seed in seeds] for name, seeds in models.items()
        }
        cells = [_interval(models[first], kind)]
        for name in others:
            change = paired(values[first], values[name])
            tail = "" if change.half_width is None else f" ± {change.half_width:.1f}"
            cells.append(f"{_interval(models[name], kind)}  ({change.difference:+.1f}{tail})")
        table.add_row(kind, f"{100 * max(guess.values()):.1f}", *cells)
    table.caption = (
        "In brackets: the difference to the first model, ± half its 95 % t-interval over seeds. "
        "Guessing: the better of one answer for all and the most common answer to the same words."
    )
    return table


def _interval(seeds: Sequence[dict[str, Any]], kind: str) -> str:
    mean = sum(100 * s["kinds"][kind]["accuracy"] for s in seeds) / len(seeds)
    bounds = seeds[0]["kinds"][kind]["interval"]
    if len(seeds) > 1 or bounds is None:
        return f"{mean:.1f}"
    return f"{mean:.1f} [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"
