"""`localign demo`: align the embedded backbone on scenes, probe it before and after, and report.

It runs the same code as `align` and `probe`. Heads are trained alike on both backbones, on scenes that the
backbones were not trained on; the figures come from a third set that nothing was chosen with.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from localign.alignment import AlignTask, load_student
from localign.backbones import Backbone, create_backbone
from localign.data.scenes import SceneConfig
from localign.data.transforms import to_tensor
from localign.engine import run_folder, train
from localign.engine.distributed import DistributedContext, choose_device
from localign.engine.log import Stopwatch, progress_bars, say
from localign.errors import UserError
from localign.files import replace_text
from localign.options.demo import DemoConfig
from localign.options.names import EMBEDDED
from localign.pictures import PICTURES, save_pictures
from localign.probing import AttributeLabels, HeadSpec, LabelledSource, probe_heads, reduce_labels
from localign.probing.datasets import labelled_scenes
from localign.report import PICTURES_FILE, before_after, build_report, to_terminal

SHOWN_HEAD = HeadSpec("transformer", "local")


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Everything from scenes to report; returns the content of ``results.json``."""
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / run_folder.CONFIG_FILE).is_file():
        _check_same_demo(folder, config)
    run_folder.save_config(folder, "demo", config)
    clock = Stopwatch()
    device = choose_device(config.device)
    say("drawing scenes")
    heads_train = labelled_scenes("train", config.train_scenes)
    validation = labelled_scenes("val", 1000)
    test = labelled_scenes("test", config.test_scenes)
    timings = {"scenes": clock.elapsed}
    baseline = create_backbone(EMBEDDED).to(device)
    probes: dict[str, list[dict[str, Any]]] = {"baseline": [], "aligned": []}
    seeds = list(range(config.seed, config.seed + config.seeds))
    for seed in seeds:
        say(f"seed {seed}: aligning")
        student_folder = _aligned(config, seed)
        aligned = load_student(student_folder).encoder.backbone.to(device)
        kept: dict[str, Any] = {}
        for name, backbone in (("baseline", baseline), ("aligned", aligned)):
            say(f"seed {seed}: probing the {name} backbone")
            result, kept[name] = _probed(config, seed, name, backbone, heads_train, validation, test)
            probes[name].append(result)
        if seed == seeds[0] and all(kept.values()):
            _save_pictures(folder, config, seed, baseline, kept, test)
    timings["total"] = clock.elapsed
    results = {
        "command": "demo",
        "config": asdict(config),
        "versions": run_folder.provenance(),
        "timings": timings,
        "seeds": seeds,
        "world": asdict(SceneConfig()),
        "classes": list(test.classes),
        "probe": probes,
        "notes": _notes(config),
    }
    path = run_folder.write_results(folder, results)
    Console().print(to_terminal(before_after(results), title="Probing before and after alignment"))
    print(f"results    {path}")
    print(f"report     {build_report(folder)}")
    return results


def _check_same_demo(folder: Path, config: DemoConfig) -> None:
    """A demo may be continued with more seeds, on another device; all else must stay."""
    saved = run_folder.read_config(folder)["config"]
    now = run_folder.to_dict(config)
    free = ("seeds", "device", "workers", "out")
    fields = [f for f in now if f not in free and saved.get(f) != now[f]]
    if fields:
        listed = "; ".join(f"{f}: {saved.get(f)!r} there, {now[f]!r} now" for f in fields)
        raise UserError(f"{folder} holds a demo with another config: {listed}; give another --out")


def _aligned(config: DemoConfig, seed: int) -> Path:
    align_config = config.align_config(seed)
    folder = Path(align_config.out)
    if not (folder / run_folder.RESULTS_FILE).is_file():
        train(AlignTask(align_config), align_config, "align")
    return folder / "export"


def _probed(
    config: DemoConfig,
    seed: int,
    name: str,
    backbone: Backbone,
    heads_train: AttributeLabels,
    validation: AttributeLabels,
    test: AttributeLabels,
) -> tuple[dict[str, Any], Any]:
    """One backbone's result, and the heads; a result already on disk is taken as it is, without heads."""
    path = Path(config.out) / f"probe-seed{seed}-{name}.json"
    first = seed == config.seed
    if path.is_file() and not (first and not (Path(config.out) / PICTURES_FILE).is_file()):
        return json.loads(path.read_text()), None
    sources: dict[str, LabelledSource] = {"val": validation, "test": test}
    context = DistributedContext(0, 1, 0, choose_device(config.device))
    with progress_bars() as progress:
        ((result, trained, _),) = probe_heads(
            backbone, heads_train, sources, config.probe_config(seed), context=context, progress=progress
        )
    replace_text(path, json.dumps(result))
    return result, trained


def _save_pictures(
    folder: Path,
    config: DemoConfig,
    seed: int,
    baseline: Backbone,
    kept: dict[str, Any],
    test: AttributeLabels,
) -> None:
    align_config = config.align_config(seed)
    # A copy: the baseline itself stays on its device for the seeds that follow.
    task = AlignTask(align_config, baseline.copy().cpu())
    task.student = load_student(Path(align_config.out) / "export")
    task.load_state_dict(run_folder.read_results(align_config.out))
    images, maps = zip(*(test.load_labelled(i) for i in range(PICTURES)), strict=True)
    table = torch.from_numpy(test.attributes)
    labels = reduce_labels(torch.from_numpy(np.stack(maps)), baseline.patch_size, len(test.classes), table)
    save_pictures(
        folder,
        task,
        torch.stack([to_tensor(image) for image in images]),
        heads_before=kept["baseline"].heads[SHOWN_HEAD].cpu(),
        heads_after=kept["aligned"].heads[SHOWN_HEAD].cpu(),
        truth=labels.patch,
        class_names=test.classes,
    )


def _notes(config: DemoConfig) -> list[str]:
    return [
        "Scenes are drawn: the figures show that the method works end to end, not how well it does on photographs.",
        f"Heads are trained on {config.train_scenes} scenes, alike for both backbones, for a fixed number of steps; "
        f"the figures are of {config.test_scenes} test scenes, which nothing was chosen with.",
        f"The alignment uses no labels. Its target ({config.target}), masks ({config.mask}) and LayerScale, and "
        "the heads' learning rate, differ from the published defaults; they were chosen on validation scenes.",
    ]
