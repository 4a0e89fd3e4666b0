"""Compares objectives of alignment on drawn scenes: what heads read, and what stays of the pooled output."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from benchmarks.config import ObjectivesConfig
from localign.alignment.setup import student_of_run
from localign.alignment.task import AlignTask
from localign.backbones import Backbone, create_backbone
from localign.bench.show import show, write_measurements
from localign.data.transforms import to_tensor
from localign.engine import train
from localign.engine.distributed import DistributedContext
from localign.engine.log import say
from localign.errors import UserError
from localign.files import replace_text
from localign.options.align import AlignConfig
from localign.options.demo import DemoConfig
from localign.options.names import EMBEDDED
from localign.probing import probe_heads
from localign.probing.datasets import labelled_scenes
from localign.probing.segmentation import LabelledSource
from localign.statistics.student_t import half_width

OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "maskembed": {},
    "readout": {"objective": "maskembed+", "pooled_weight": 0.0, "preserve_weight": 0.0},
    "pooled": {"objective": "maskembed+", "readout_weight": 0.0, "preserve_weight": 0.0},
    "preserve": {"objective": "maskembed+", "readout_weight": 0.0, "pooled_weight": 0.0},
    "plus": {"objective": "maskembed+"},
    "plus-0.1": {
        "objective": "maskembed+",
        "readout_weight": 0.1,
        "pooled_weight": 0.1,
        "preserve_weight": 0.1,
    },
    "plus-0.03": {
        "objective": "maskembed+",
        "readout_weight": 0.03,
        "pooled_weight": 0.03,
        "preserve_weight": 0.1,
    },
    "plus-1": {
        "objective": "maskembed+",
        "readout_weight": 1.0,
        "pooled_weight": 1.0,
        "preserve_weight": 1.0,
    },
    "plus-mean": {"objective": "maskembed+", "readout": "mean"},
    "plus-penultimate": {"objective": "maskembed+", "target": "penultimate"},
    "additive": {"objective": "additive", "target": "cls", "decoder_layer_scale": 1e-6},
}
"""Name -> options that differ from the demo's alignment."""
READINGS = ("local transformer", "local linear", "global transformer", "global linear")


def run_bench_objectives(config: ObjectivesConfig) -> None:
    """Align with each objective and seed, probe, and print differences to the teacher in points.

    Finished runs are not repeated: one JSON file for each is in the folder of the runs.

    Raises:
        UserError: An objective is unknown.
    """
    folder = _folder(config)
    if unknown := set(config.objectives) - OBJECTIVES.keys():
        raise UserError(f"unknown objective {', '.join(sorted(unknown))}; known: {', '.join(OBJECTIVES)}")
    seeds = range(config.seed, config.seed + config.seeds)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in config.objectives}
    for seed in seeds:
        teacher = _read_or(
            folder / f"teacher-seed{seed}-{config.split}.json", lambda s=seed: _teacher(config, s)
        )
        for name in config.objectives:
            path = folder / f"{name}-seed{seed}-{config.split}.json"
            row = _read_or(path, lambda n=name, s=seed: _measured(config, n, s))
            difference = {key: row[key] - teacher[key] if key in teacher else row[key] for key in row}
            found[name].append(difference)
            say(f"{name} seed {seed}: " + ", ".join(f"{k} {v:+.2f}" for k, v in difference.items()))
    write_measurements(config, {"differences": found})
    show([_table(config, found)], config)


def _folder(config: ObjectivesConfig) -> Path:
    return Path(config.file).with_suffix("")


def _read_or(path: Path, measure: Any) -> dict[str, float]:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(measure(), indent=1))
    content: dict[str, float] = json.loads(path.read_text())
    return content


def _demo(config: ObjectivesConfig) -> DemoConfig:
    return DemoConfig(
        out=str(_folder(config)), steps=config.steps, batch_size=config.batch_size, train_scenes=config.train_scenes,
        test_scenes=config.test_scenes, probe_steps=config.probe_steps, device=config.device, workers=0,
    )  # fmt: skip


def _teacher(config: ObjectivesConfig, seed: int) -> dict[str, float]:
    return _probed(config, create_backbone(EMBEDDED), seed)


def _measured(config: ObjectivesConfig, name: str, seed: int) -> dict[str, float]:
    options = dict(OBJECTIVES[name])
    base = _demo(config).align_config(seed)
    folder = _folder(config) / f"{name}-seed{seed}"
    if options.get("objective") == "additive":
        options["decoder"] = None
    aligned: AlignConfig = replace(base, **{"out": str(folder), **options})
    if not (folder / "results.json").is_file():
        train(AlignTask(aligned), aligned, "align")
    student, _ = student_of_run(folder)
    backbone = student.encoder.backbone
    return {**_probed(config, backbone, seed), **_pooling(config, backbone)}


def _probed(config: ObjectivesConfig, backbone: Backbone, seed: int) -> dict[str, float]:
    """Macro recall in percent, by task and head."""
    context = DistributedContext(0, 1, 0, torch.device("cpu"))
    train_source = labelled_scenes("train", config.train_scenes)
    source: dict[str, LabelledSource] = {config.split: labelled_scenes(config.split, config.test_scenes)}
    ((outcome, _, _),) = probe_heads(
        backbone, train_source, source, _demo(config).probe_config(seed), context=context
    )
    heads = outcome["results"][config.split]
    found = {}
    for reading in READINGS:
        task, head = reading.split()
        recall = heads[head][task]["macro_recall"]
        assert recall is not None  # every class occurs
        found[reading] = 100 * recall
    return found


@torch.no_grad()
def _pooling(config: ObjectivesConfig, backbone: Backbone) -> dict[str, float]:
    """How far the student's pooled output, by the teacher's norm and pooling, is the teacher's.

    The classifier is a linear one per class, trained on the teacher's pooled output and applied to the student's.
    """
    teacher = create_backbone(EMBEDDED)
    train_images, train_labels = _images(teacher, "train", config.train_scenes)
    images, labels = _images(teacher, config.split, config.test_scenes)
    outputs = torch.cat([teacher.pooled(part) for part in images.split(64)])
    students = torch.cat([teacher.pool(backbone.tokens(part, norm=False)) for part in images.split(64)])
    trained = torch.cat([teacher.pooled(part) for part in train_images.split(64)])
    classifier = _classifier(trained, train_labels)
    before, after = (_recall(classifier(o), labels) for o in (outputs, students))
    cosine = torch.nn.functional.cosine_similarity(outputs, students).mean()
    return {"pooled cosine": float(cosine), "classifier": after - before}


def _images(backbone: Backbone, split: Any, count: int) -> tuple[Tensor, Tensor]:
    """Normalised scenes, and their classes as 0 or 1, ``(count, classes)``."""
    source = labelled_scenes(split, count)
    table, images, labels = torch.from_numpy(source.attributes), [], []
    for index in range(count):
        image, codes = source.load_labelled(index)
        images.append(to_tensor(image))
        labels.append(table[torch.from_numpy(np.unique(np.asarray(codes))).long()].any(0))
    return backbone.normalise(torch.stack(images)), torch.stack(labels).float()


def _classifier(features: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    mean, std = features.mean(0), features.std(0)
    layer = torch.nn.Linear(features.shape[1], labels.shape[1])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    with torch.enable_grad():
        for _ in range(500):
            optimizer.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                layer((features - mean) / std), labels
            )
            loss.backward()
            optimizer.step()

    return lambda outputs: layer((outputs - mean) / std)


def _recall(logits: Tensor, labels: Tensor) -> float:
    """Macro recall in percent."""
    hits = ((logits > 0) & (labels > 0)).sum(0) / labels.sum(0).clamp(min=1)
    return float(100 * hits[labels.any(0)].mean())


def _table(config: ObjectivesConfig, found: Mapping[str, Sequence[Mapping[str, float]]]) -> Table:
    table = Table(
        title=f"difference to the teacher, points, {config.split} scenes", caption="\u00b1: 95 % t-interval"
    )
    columns = [*READINGS, "pooled cosine", "classifier"]
    for column in ("objective", *columns):
        table.add_column(column)
    for name, rows in found.items():
        cells = []
        for column in columns:
            values = [row[column] for row in rows]
            mean = sum(values) / len(values)
            digits = 3 if column == "pooled cosine" else 1
            half = half_width(values)
            cells.append(f"{mean:+.{digits}f}" + ("" if half is None else f" \u00b1 {half:.{digits}f}"))
        table.add_row(name, *cells)
    return table
