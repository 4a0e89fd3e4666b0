"""What alignment does to real weights, as far as some minutes on a GPU show: vision or language.

    python scripts/gpu_science.py vision|language WORK MODELS PHOTOGRAPHS

MODELS is the folder of scripts/real_models.py, PHOTOGRAPHS a data set that `localign probe --data` takes. With TINY=1
the embedded backbone, drawn scenes and a language model of two steps take their places.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

TINY = bool(os.environ.get("TINY"))
DEVICE = "--device cpu --workers 0" if TINY else "--device cuda --workers 8"
SECONDS = 0 if TINY else 240
"""Time for the alignment."""


def command(text: str) -> None:
    """Run a localign command, which must succeed."""
    from localign.cli import main

    if code := main(shlex.split(text)):
        sys.exit(code)


def results(folder: Path) -> dict[str, Any]:
    """The content of a run's results.json."""
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def report(**figures: Any) -> None:
    """Print figures for gpu_visit.py."""
    print("PROBE " + json.dumps(figures), flush=True)


def align(backbone: str, data: str, batch: int, out: Path, seconds: float) -> None:
    """Align for as many steps as the seconds give, at the rate of a short first run."""
    options = f"--backbone {backbone} --data {data} --batch-size {batch} {DEVICE} --log-every 10"
    if not TINY:
        options += " --soft-cap none --image-size 224"
    command(f"align {options} --steps 4 --out {out}-rate")
    rate = results(Path(f"{out}-rate"))["images_per_second"]
    command(f"align {options} --steps {max(4, round(seconds * rate / batch))} --out {out}")


def vision(work: Path, models: Path, photographs: Path) -> None:
    """Align, and probe before and after."""
    out = work / "aligned"
    backbone = "scenes-vit" if TINY else str(models / "dinov2-small")
    images = "scenes" if TINY else str(photographs / "images" / "train")
    align(backbone, images, 4 if TINY else 256, out, SECONDS)
    probe = (
        "scenes --train-scenes 16 --test-scenes 8 --epochs 1" if TINY else f"{photographs} --image-size 224"
    )
    command(
        f"probe before={backbone},after={out} --data {probe} --heads [linear,mlp] {DEVICE.partition(' --workers')[0]} "
        f"--out {work / 'probe'}"
    )
    found = results(work / "probe")
    report(steps=results(out)["steps"], differences=found["differences"])


def language(work: Path, models: Path, photographs: Path) -> None:
    """Train a baseline with an MLP and an aligned backbone with its decoder on questions about scenes, three seeds."""
    from localign.vlm.data.scene_dataset import write_dataset

    kinds = ("count", "relation") if TINY else ("referring", "position", "count", "relation", "presence")
    train = write_dataset(work / "train", "train", 8 if TINY else 8000, 2 if TINY else 8, kinds)
    test = write_dataset(work / "test", "test", 2 if TINY else 300, 2 if TINY else 8, kinds)
    llm = models / "smollm2-135m"
    if TINY:
        from localign.vlm.demo.tinylm import TinyLMConfig, train_tiny_lm

        train_tiny_lm(
            TinyLMConfig(
                data=str(train),
                out=str(work / "llm"),
                steps=2,
                warmup_steps=0,
                width=32,
                mlp_width=64,
                device="cpu",
            )
        )
        llm = work / "llm" / "export"
    plain = "scenes-vit" if TINY else str(models / "dinov2-small")
    aligned = work / "aligned"
    if not aligned.is_dir():
        data = "scenes" if TINY else str(photographs / "images" / "train")
        align(plain, data, 4 if TINY else 256, aligned, SECONDS / 4)
    prompt = "in-out" if TINY else "chat-template"
    for seed in range(3):
        for name, backbone, adapter in (
            ("baseline-mlp", plain, "mlp"),
            ("aligned-decoder", aligned, "decoder"),
        ):
            out = work / f"{name}-seed{seed}"
            size = "--steps 2 --batch-size 4" if TINY else "--steps 150 --batch-size 32 --image-size 224"
            command(
                f"vlm train --data {train} --llm {llm} --backbone {backbone} --adapter {adapter} --seed {seed} {size} "
                f"--prompt {prompt} --turns independent --max-length 512 --lr 3e-4 {DEVICE} --out {out}"
            )
            batch = DEVICE.partition(" --workers")[0]
            command(
                f"vlm eval {out} --benchmarks scenes --data {test.parent} {batch} --out {out / 'answers'}"
            )
            scores = results(out / "answers")["benchmarks"]["scenes"]["figures"]
            report(model=name, seed=seed, scores={kind: figure["value"] for kind, figure in scores.items()})


if __name__ == "__main__":
    {"vision": vision, "language": language}[sys.argv[1]](*map(Path, sys.argv[2:5]))
