"""Alignment steps as `localign align` takes them, against the same mathematics written out plainly.

Each way has a process of its own, as what one does to its allocator or its products must not help the other; they
take turns, step by step, on the same images. See :mod:`localign.bench.align_ways`.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table

from localign.alignment import AlignConfig
from localign.backbones import create_backbone
from localign.bench import photographs
from localign.bench.align_ways import COMPILED, FULL, OURS, PLAIN
from localign.bench.ceiling import Ceiling
from localign.bench.show import both_times, show, timing_table, write_measurements
from localign.bench.timing import Timing, hardware
from localign.engine.distributed import choose_device
from localign.engine.log import say
from localign.engine.schedule import computes_in_bf16
from localign.errors import RunFailure, UserError
from localign.options.bench import AlignBenchConfig
from localign.planning.counting import CountedAlignment

BACKBONE, BATCH, STEPS, WARM = "vit_tiny_patch16_224", 32, 8, 2
CUDA_WORKERS = 8
PHOTOGRAPHS, SIZE = 64, (500, 375)
"""Drawn photographs have the size that is common in ImageNet."""
TOLERANCE = 5e-3
"""Relative difference of losses from which on ways are not compared."""
_MOST = 1 << 20


class AlignWay:
    """A process that takes steps when it is told to."""

    def __init__(self, name: str, config: AlignConfig, folder: Path) -> None:
        self.name, self.config = name, config
        self.steps: list[dict[str, Any]] = []
        self.full = False
        self._errors = (folder / "errors").open("w+")
        argument = {"way": name, "config": asdict(config)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "localign.bench.align_ways", json.dumps(argument)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def wait(self) -> None:
        """Until it is ready for steps."""
        self._answer()

    def step(self, counts: bool) -> None:
        """Take a step, unless the device's memory did not suffice for an earlier one."""
        if self.full:
            return
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        answer = self._answer()
        if counts and not self.full:
            self.steps.append(answer)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()
            raise RunFailure(f"bench align, {self.name}, ended: {said[-1] if said else 'without a word'}")
        answer: dict[str, Any] = json.loads(line)
        self.full = answer.get("error") == FULL
        return answer


def run_bench_align(config: AlignBenchConfig) -> None:
    """Measure, write the JSON file, show the tables."""
    content = write_measurements(config, bench_align(config))
    show(align_tables(content), config)


def bench_align(config: AlignBenchConfig) -> dict[str, Any]:
    """Time whole optimizer steps of each way, and a product of matrices between them.

    Raises:
        UserError: An unknown backbone, or no folder of readable photographs.
        RunFailure: A way ended.
    """
    device = choose_device(config.device)
    # Both processes would fail on a name that is none; this one says so. A backbone without weights takes a moment.
    backbone = create_backbone(
        config.backbone or BACKBONE, weights="none", image_size=config.image_size, seed=config.seed
    )
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = _photographs(config, folder)
        options = AlignConfig(
            backbone=config.backbone or BACKBONE, weights="none", image_size=config.image_size, data=str(images),
            seed=config.seed, batch_size=config.batch_size or BATCH, steps=_MOST, device=str(device),
            precision=config.precision or "auto", log_every=_MOST, checkpoint_every=_MOST,
            workers=config.workers if config.workers is not None else CUDA_WORKERS * (device.type == "cuda"),
        )  # fmt: skip
        # The target scale of a batch, in both ways.
        options = replace(options, scale_images=options.batch_size)
        names = [OURS, *([COMPILED] if config.compile else []), PLAIN]
        bf16 = computes_in_bf16(options, device.type)
        ceiling = Ceiling(device, torch.bfloat16 if bf16 else torch.float32)
        flops = CountedAlignment(options).flops().total
        parts = [_together(names, options, config.steps or STEPS, ceiling, folder, flops)]
        if device.type == "cuda":
            parts.append(_alone(names, options, config.steps or STEPS, ceiling, folder, flops))
    return {
        "backbone": options.backbone,
        "precision": "bf16" if bf16 else "fp32",
        "size": backbone.image_size[0],
        "steps": config.steps or STEPS,
        "hardware": hardware(device),
        "ceiling_flops": ceiling.flops,
        "parts": [{**part, "ways": [_with_mfu(row, ceiling) for row in part["ways"]]} for part in parts],
    }


def _photographs(config: AlignBenchConfig, folder: Path) -> Path:
    images = folder / "photographs"
    images.mkdir()
    if config.data is None:
        photographs.draw(images, PHOTOGRAPHS, config.seed, SIZE)
        return images
    if not Path(config.data).is_dir():
        raise UserError(f"there is no folder {config.data}")
    photographs.take(images, config.data, 4 * PHOTOGRAPHS)
    return images


def _together(
    names: Sequence[str], options: AlignConfig, steps: int, ceiling: Ceiling, folder: Path, flops: float
) -> dict[str, Any]:
    """All ways with the same batch, taking turns."""
    with _ways(names, options, folder) as ways:
        for way in ways:
            way.wait()
        for step in range(-WARM, steps):
            say(f"step {step + 1} of {steps}" if step >= 0 else "warming up")
            for way in ways:
                way.step(counts=step >= 0)
            ceiling()
    return _part("the same images", ways, flops)


def _alone(
    names: Sequence[str], options: AlignConfig, steps: int, ceiling: Ceiling, folder: Path, flops: float
) -> dict[str, Any]:
    """Each way with the largest batch that fits, looked for by doubling."""
    found = []
    for name in names:
        fitting: AlignWay | None = None
        batch = options.batch_size
        while fitting is None or not fitting.full:
            say(f"{name}: {batch} images")
            sized = replace(options, batch_size=batch, scale_images=batch)
            with _ways([name], sized, folder) as (way,):
                way.wait()
                for step in range(-WARM, steps):
                    way.step(counts=step >= 0)
                ceiling()
            if way.full:
                fitting = fitting or way
                break
            fitting, batch = way, 2 * batch
        found.append(fitting)
    return _part("as many as fit", found, flops, compare=True)


@contextmanager
def _ways(names: Sequence[str], options: AlignConfig, folder: Path) -> Iterator[list[AlignWay]]:
    with ExitStack() as stack:
        ways = []
        for name in names:
            room = Path(stack.enter_context(TemporaryDirectory(dir=folder)))
            config = replace(options, out=str(room / "run"), compile=name == COMPILED)
            ways.append(AlignWay(name, config, room))
            stack.callback(ways[-1].close)
        yield ways


def _part(images: str, ways: Sequence[AlignWay], flops: float, compare: bool = False) -> dict[str, Any]:
    """What was measured.

    Args:
        images: What the part's batches are.
        ways: After their steps.
        flops: Operations per image, of any way.
        compare: Whether speeds may be compared though batches, and so losses, differ.
    """
    rows = []
    for way in ways:
        row: dict[str, Any] = {"way": way.name, "batch_size": way.config.batch_size, "fits": not way.full}
        if not way.full:
            cost = Timing.median([Timing(step["wall"], step["cpu"]) for step in way.steps])
            waited = statistics.median(step["data_wait"] for step in way.steps)
            row |= {
                "seconds": asdict(cost),
                "seconds_of_steps": [step["wall"] for step in way.steps],
                "images_per_second": {
                    "wall": way.config.batch_size / cost.wall,
                    "cpu": way.config.batch_size / cost.cpu,
                },
                "data_wait": waited / cost.wall,
                "data_wait_seconds": waited,
                "flops": flops * way.config.batch_size,
                "peak_bytes": max(step["peak_bytes"] for step in way.steps),
                "loss": statistics.mean(step["loss"] for step in way.steps),
            }
        rows.append(row)
    losses = [row["loss"] for row in rows if row["fits"]]
    agree = compare or (math.isfinite(sum(losses)) and max(losses) - min(losses) <= TOLERANCE * max(losses))
    plain = next(row for row in rows if row["way"] == PLAIN)
    for row in rows:
        if agree and row["fits"] and plain["fits"]:
            row["times_faster"] = _ratio(row, plain, loading=True)
            row["times_faster_without_loading"] = _ratio(row, plain, loading=False)
    return {"images": images, "agree": agree and plain["fits"], "ways": rows}


def _ratio(row: dict[str, Any], plain: dict[str, Any], loading: bool) -> dict[str, float]:
    """How many times as many images per second, by either clock; loading is done by the processor."""

    def seconds_per_image(of: dict[str, Any], clock: str) -> float:
        spent = of["seconds"][clock] - (0.0 if loading else of["data_wait_seconds"])
        return spent / of["batch_size"]

    return {
        clock: seconds_per_image(plain, clock) / seconds_per_image(row, clock) for clock in ("wall", "cpu")
    }


def _with_mfu(row: dict[str, Any], ceiling: Ceiling) -> dict[str, Any]:
    if not row["fits"]:
        return row
    clock = "cpu" if ceiling.by_processor_time else "wall"
    speed = row["flops"] / row["seconds"][clock]
    return row | {"flops_per_second": speed, "mfu": speed / ceiling.flops}


def align_tables(content: dict[str, Any]) -> list[Table]:
    """What a step of either way costs, and how much of the ceiling it comes to."""
    cuda = content["hardware"]["device"].startswith("cuda")
    tables = []
    for part in content["parts"]:
        title = "Steps of aligning {backbone}, {precision}, {images} of {size} pixels".format(
            **content, images=part["images"]
        )
        ratios = ("times faster", "without loading") if part["agree"] else ()
        numbers = ("images/s", *ratios, "TFLOP/s", "MFU, %", "peak, GiB", "data wait, %", "loss")
        table = timing_table(title, content, ("way", "batch"), numbers)
        table.caption = (
            f"{table.caption}\nMFU: of {content['ceiling_flops'] / 1e12:.3g} TFLOP/s, the fastest product of matrices"
            + ("" if part["agree"] else "\nthe ways disagree about the loss: nothing is compared")
        )
        for row in part["ways"]:
            if not row["fits"]:
                table.add_row(row["way"], str(row["batch_size"]), "does not fit")
                continue
            named = ("times_faster", "times_faster_without_loading") if part["agree"] else ()
            table.add_row(
                row["way"],
                str(row["batch_size"]),
                both_times(row["images_per_second"], ".2f", wall_alone=cuda),
                *(both_times(row[name], ".2f", wall_alone=cuda) for name in named),
                f"{row['flops_per_second'] / 1e12:.3f}",
                f"{100 * row['mfu']:.0f}",
                f"{row['peak_bytes'] / 2**30:.2f}",
                f"{100 * row['data_wait']:.0f}",
                f"{row['loss']:.5f}",
            )
        tables.append(table)
    return tables
