"""`localign demo`: align the embedded backbone on scenes, probe it before and after, and write a report.

It runs the same code as `align` and `probe`. Heads are trained in the same way on both backbones, on scenes that the
backbones were not trained on. The reported recall is measured on a third set of scenes, on which nothing was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from localign.alignment import AlignTask, load_student
from localign.backbones import Backbone, create_backbone
from localign.data.scenes import SceneConfig
from localign.data.transforms import to_tensor
from localign.engine import run_folder, train
from localign.engine.distributed import DistributedContext, choose_device
from localign.engine.log import Stopwatch, say
from localign.engine.progress import progress_bars
from localign.errors import UserError
from localign.explore.command import run_explore
from localign.options.demo import DemoConfig
from localign.options.export import ExploreConfig
from localign.options.names import EMBEDDED
from localign.pictures import PICTURES, save_pictures
from localign.probing import (
    AttributeLabels,
    HeadSpec,
    LabelledSource,
    Probed,
    TrainedHeads,
    probe_heads,
    reduce_labels,
)
from localign.probing.datasets import labelled_scenes
from localign.probing.stored import read_probed, write_probed
from localign.probing.suite import differences
from localign.report import before_after, build_report, to_terminal
from localign.results import PICTURES_FILE, ProbeOutcome, Results
from localign.text.printing import console, printable

PICTURED_HEAD = HeadSpec("transformer", "local")
"""The head whose predictions the report shows."""
VALIDATION_SCENES = 1000
"""Scenes of the heads' validation set."""


def run_demo(config: DemoConfig) -> Results:
    """Draw scenes, align, probe and write the report; returns the content of ``results.json``.

    Raises:
        UserError: The folder holds a demo with other options.
        RunFailure: An alignment or a probing failed; the next call continues.
    """
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / run_folder.CONFIG_FILE).is_file():
        _check_same_demo(folder, config)
    run_folder.save_config(folder, "demo", config)
    clock = Stopwatch()
    device = choose_device(config.device)
    say("drawing scenes")
    assert config.train_scenes is not None  # the config has filled it in
    heads_train = labelled_scenes("train", config.train_scenes)
    validation = labelled_scenes("val", VALIDATION_SCENES)
    test = labelled_scenes("test", config.test_scenes)
    timings = {"scenes": clock.elapsed}
    baseline = create_backbone(EMBEDDED).to(device)
    outcomes: dict[str, list[ProbeOutcome]] = {"baseline": [], "aligned": []}
    probed: dict[str, list[Probed]] = {"baseline": [], "aligned": []}
    seeds = list(range(config.seed, config.seed + config.seeds))
    for seed in seeds:
        say(f"seed {seed}: aligning")
        student_folder = _aligned(config, seed)
        aligned = load_student(student_folder).encoder.backbone.to(device)
        heads: dict[str, TrainedHeads] = {}
        for name, backbone in (("baseline", baseline), ("aligned", aligned)):
            say(f"seed {seed}: probing the {name} backbone")
            found = _probed(config, seed, name, backbone, heads_train, validation, test)
            outcomes[name].append(found.outcome)
            probed[name].append(found)
            if found.trained.heads:
                heads[name] = found.trained
        if seed == seeds[0] and len(heads) == 2:
            _save_pictures(folder, config, seed, baseline, heads, test)
    timings["total"] = clock.elapsed
    results: Results = {
        "command": "demo",
        "config": asdict(config),
        "versions": run_folder.provenance(),
        "timings": timings,
        "seeds": seeds,
        "world": asdict(SceneConfig()),
        "classes": list(test.classes),
        "probe": outcomes,
        "notes": _notes(config),
    }
    if all(found.recalls for found in (*probed["baseline"], *probed["aligned"])):
        results["differences"] = differences("aligned", probed["aligned"], "baseline", probed["baseline"])
    path = run_folder.write_results(folder, results)
    console().print(to_terminal(before_after(results), title="Probing before and after alignment"))
    print(f"results    {printable(path)}")
    print(f"report     {printable(build_report(folder))}")
    _explore(config)
    return results


def _explore(config: DemoConfig) -> None:
    """Write the explorer's page of both backbones, with the classes that the pictured head predicts."""
    folder = Path(config.out)
    aligned = config.align_config(config.seed).out
    run_explore(
        ExploreConfig(
            models=(f"baseline={EMBEDDED}", f"aligned={aligned}"),
            images="scenes:val",
            probe=str(folder) if (folder / PICTURES_FILE).is_file() else None,
            out=str(folder / "explore.html"),
            device=config.device,
        )
    )


def _check_same_demo(folder: Path, config: DemoConfig) -> None:
    """Refuse to continue a demo with other options; seeds, device, workers and folder may change.

    Raises:
        UserError: Names the options that differ.
    """
    saved = run_folder.read_config(folder)["config"]
    now = run_folder.to_dict(config)
    may_change = ("seeds", "device", "workers", "out", "full")  # what --full sets is compared
    changed = [f for f in now if f not in may_change and saved.get(f) != now[f]]
    if changed:
        listed = "; ".join(f"{f}: {saved.get(f)!r} there, {now[f]!r} now" for f in changed)
        raise UserError(f"{folder} holds a demo with other options: {listed}; choose another --out")


def _aligned(config: DemoConfig, seed: int) -> Path:
    """Align with one seed, unless that is done; returns the folder of the exported student."""
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
) -> Probed:
    """The probing of one backbone; without heads if it is read from the disk, and without the replicates of the
    bootstrap if it is one of 0.1.0."""
    path = Path(config.out) / f"probe-seed{seed}-{name}.json"
    needs_heads = seed == config.seed and not (Path(config.out) / PICTURES_FILE).is_file()
    if path.is_file() and not needs_heads:
        return read_probed(path, path.with_suffix(".npz"))
    sources: dict[str, LabelledSource] = {"val": validation, "test": test}
    context = DistributedContext(0, 1, 0, choose_device(config.device))
    with progress_bars() as progress:
        (found,) = probe_heads(
            backbone, heads_train, sources, config.probe_config(seed), context=context, progress=progress
        )
    write_probed(found, path, path.with_suffix(".npz"))
    return found


def _save_pictures(
    folder: Path,
    config: DemoConfig,
    seed: int,
    baseline: Backbone,
    heads: Mapping[str, TrainedHeads],
    test: AttributeLabels,
) -> None:
    align_config = config.align_config(seed)
    # A copy, because the baseline stays on its device for the other seeds.
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
        heads_before=heads["baseline"].heads[PICTURED_HEAD].cpu(),
        heads_after=heads["aligned"].heads[PICTURED_HEAD].cpu(),
        truth=labels.patch,
        class_names=test.classes,
    )


def _notes(config: DemoConfig) -> list[str]:
    return [
        "Scenes are drawn: the results show that the method works end to end, not how well it works on photographs.",
        f"Heads are trained on {config.train_scenes} scenes, in the same way for both backbones, {_length(config)}. "
        f"Results are on {config.test_scenes} test scenes, on which nothing was chosen.",
        f"The alignment uses no labels. Its target ({config.target}), masks ({config.mask}) and LayerScale, and the "
        "heads' learning rate, differ from the published defaults; they were chosen on validation scenes.",
    ]


def _length(config: DemoConfig) -> str:
    if config.probe_steps is None:
        return "until their loss on a held-out fifth of these scenes stops falling"
    return "for a fixed number of steps"
