"""`localign bench align`: alignment steps of `localign align` against a plain implementation of the same method.

Each implementation runs in its own process, so that settings of one process, such as its allocator, do not affect the
other. They take turns, step by step, on the same images. See :mod:`localign.bench.align_ways`.
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
from typing import Any, TypedDict, cast

import torch
from rich.table import Table

from localign.alignment import AlignConfig
from localign.backbones import create_backbone
from localign.bench import photographs
from localign.bench.align_ways import COMPILED, OURS, OUT_OF_MEMORY, PLAIN
from localign.bench.ceiling import Ceiling
from localign.bench.show import both_times, show, timing_table, write_measurements
from localign.bench.timing import Timing, hardware
from localign.engine.distributed import choose_device
from localign.engine.log import say
from localign.engine.schedule import computes_in_bf16
from localign.errors import RunFailure, UserError
from localign.options.bench import AlignBenchConfig
from localign.planning.counting import CountedAlignment

BACKBONE, BATCH, STEPS, WARMUP_STEPS = "vit_tiny_patch16_224", 32, 8, 2
CUDA_WORKERS = 8
PHOTOGRAPHS, SIZE = 64, (500, 375)
"""Number and size (width, height) of synthetic photographs; the size is common in ImageNet."""
TOLERANCE = 5e-3
"""Relative difference of losses above which speeds are not compared."""
_UNLIMITED = 1 << 20


class StepCost(TypedDict):
    """The cost of one step of a process."""

    wall: float
    """Seconds."""
    cpu: float
    """Seconds of CPU time of the process."""
    data_wait: float
    """Seconds spent waiting for the batch."""
    loss: float
    peak_bytes: int


class AlignWay:
    """A process that takes a step on request."""

    def __init__(self, name: str, config: AlignConfig, folder: Path) -> None:
        self.name, self.config = name, config
        self.steps: list[StepCost] = []
        self.out_of_memory = False
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
        """Wait until the process is ready for steps."""
        self._read_reply()

    def step(self, measured: bool) -> None:
        """Take a step, and record its cost if ``measured``. Does nothing after the process ran out of memory."""
        if self.out_of_memory:
            return
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        reply = self._read_reply()
        if measured and not self.out_of_memory:
            self.steps.append(cast(StepCost, reply))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _read_reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            errors = self._errors.read().strip().splitlines()
            raise RunFailure(
                f"the process {self.name!r} of bench align died: {errors[-1] if errors else 'no message'}"
            )
        reply: dict[str, Any] = json.loads(line)
        self.out_of_memory = reply.get("error") == OUT_OF_MEMORY
        return reply


def run_bench_align(config: AlignBenchConfig) -> None:
    """Run the benchmark, write its JSON file, and print its tables."""
    content = write_measurements(config, bench_align(config))
    show(align_tables(content), config)


def bench_align(config: AlignBenchConfig) -> dict[str, Any]:
    """Time whole optimizer steps of each implementation, and matrix products between them.

    Returns:
        The content of the JSON file, except for the command, the options and the versions.

    Raises:
        UserError: The backbone is unknown, or the folder has no readable photographs.
        RunFailure: A process died.
    """
    device = choose_device(config.device)
    if config.largest_batch and device.type != "cuda":
        raise UserError(
            f"--largest-batch measures the memory of CUDA GPUs, not of {device.type}; leave it out"
        )
    # Built here first, so that an unknown name gives a clear error before the processes start.
    backbone = create_backbone(
        config.backbone or BACKBONE, weights="none", image_size=config.image_size, seed=config.seed
    )
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = _photographs(config, folder)
        options = AlignConfig(
            backbone=config.backbone or BACKBONE, weights="none", image_size=config.image_size, data=str(images),
            seed=config.seed, batch_size=config.batch_size or BATCH, steps=_UNLIMITED, device=str(device),
            precision=config.precision or "auto", log_every=_UNLIMITED, checkpoint_every=_UNLIMITED,
            workers=config.workers if config.workers is not None else CUDA_WORKERS * (device.type == "cuda"),
        )  # fmt: skip
        # Both implementations estimate the scale of the targets from the first batch.
        options = replace(options, scale_images=options.batch_size)
        names = [OURS, *([COMPILED] if config.compile else []), PLAIN]
        bf16 = computes_in_bf16(options, device.type)
        ceiling = Ceiling(device, torch.bfloat16 if bf16 else torch.float32)
        flops = CountedAlignment(options).flops().total
        parts = [_measure_same_batch(names, options, config.steps or STEPS, ceiling, folder, flops)]
        if config.largest_batch:
            parts.append(
                _measure_largest_batch(names, options, config.steps or STEPS, ceiling, folder, flops)
            )
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
    photographs.copy_from(images, config.data, 4 * PHOTOGRAPHS)
    return images


def _measure_same_batch(
    names: Sequence[str], options: AlignConfig, steps: int, ceiling: Ceiling, folder: Path, flops: float
) -> dict[str, Any]:
    """Measure all implementations with the same batches, taking turns."""
    with _ways(names, options, folder) as ways:
        for way in ways:
            way.wait()
        for step in range(-WARMUP_STEPS, steps):
            say(f"step {step + 1} of {steps}" if step >= 0 else "warming up")
            for way in ways:
                way.step(measured=step >= 0)
            ceiling()
    return _summarise("the same images", ways, flops)


def _measure_largest_batch(
    names: Sequence[str], options: AlignConfig, steps: int, ceiling: Ceiling, folder: Path, flops: float
) -> dict[str, Any]:
    """Measure each implementation alone with the largest batch that fits, found by doubling."""
    largest = []
    for name in names:
        fitting: AlignWay | None = None
        batch = options.batch_size
        while fitting is None or not fitting.out_of_memory:
            say(f"{name}: {batch} images")
            sized = replace(options, batch_size=batch, scale_images=batch)
            with _ways([name], sized, folder) as (way,):
                way.wait()
                for step in range(-WARMUP_STEPS, steps):
                    way.step(measured=step >= 0)
                ceiling()
            if way.out_of_memory:
                fitting = fitting or way
                break
            fitting, batch = way, 2 * batch
        largest.append(fitting)
    return _summarise("as many as fit", largest, flops, always_compare=True)


@contextmanager
def _ways(names: Sequence[str], options: AlignConfig, folder: Path) -> Iterator[list[AlignWay]]:
    with ExitStack() as stack:
        ways = []
        for name in names:
            own_folder = Path(stack.enter_context(TemporaryDirectory(dir=folder)))
            config = replace(options, out=str(own_folder / "run"), compile=name == COMPILED)
            ways.append(AlignWay(name, config, own_folder))
            stack.callback(ways[-1].close)
        yield ways


def _summarise(
    images: str, ways: Sequence[AlignWay], flops: float, always_compare: bool = False
) -> dict[str, Any]:
    """The results of one part of the benchmark.

    Args:
        images: Description of the batches.
        ways: The processes, after their steps.
        flops: Floating-point operations per image, which are the same for all implementations.
        always_compare: Compare speeds although batches, and therefore losses, differ.
    """
    rows = []
    for way in ways:
        row: dict[str, Any] = {
            "way": way.name,
            "batch_size": way.config.batch_size,
            "fits": not way.out_of_memory,
        }
        if not way.out_of_memory:
            cost = Timing.median([Timing(step["wall"], step["cpu"]) for step in way.steps])
            data_wait = statistics.median(step["data_wait"] for step in way.steps)
            row |= {
                "seconds": asdict(cost),
                "seconds_of_steps": [step["wall"] for step in way.steps],
                "images_per_second": {
                    "wall": way.config.batch_size / cost.wall,
                    "cpu": way.config.batch_size / cost.cpu,
                },
                "data_wait": data_wait / cost.wall,
                "data_wait_seconds": data_wait,
                "flops": flops * way.config.batch_size,
                "peak_bytes": max(step["peak_bytes"] for step in way.steps),
                "loss": statistics.mean(step["loss"] for step in way.steps),
            }
        rows.append(row)
    losses = [row["loss"] for row in rows if row["fits"]]
    agree = always_compare or (
        math.isfinite(sum(losses)) and max(losses) - min(losses) <= TOLERANCE * max(losses)
    )
    plain = next(row for row in rows if row["way"] == PLAIN)
    for row in rows:
        if agree and row["fits"] and plain["fits"]:
            row["times_faster"] = _ratio(row, plain, loading=True)
            row["times_faster_without_loading"] = _ratio(row, plain, loading=False)
    return {"images": images, "agree": agree and plain["fits"], "ways": rows}


def _ratio(row: dict[str, Any], plain: dict[str, Any], loading: bool) -> dict[str, float]:
    """Images per second relative to the plain implementation, by wall and by CPU time, with or without loading."""

    def seconds_per_image(measured: dict[str, Any], clock: str) -> float:
        seconds: float = measured["seconds"][clock] - (0.0 if loading else measured["data_wait_seconds"])
        images: int = measured["batch_size"]
        return seconds / images

    return {
        clock: seconds_per_image(plain, clock) / seconds_per_image(row, clock) for clock in ("wall", "cpu")
    }


def _with_mfu(row: dict[str, Any], ceiling: Ceiling) -> dict[str, Any]:
    if not row["fits"]:
        return row
    clock = "cpu" if ceiling.by_cpu_time else "wall"
    speed = row["flops"] / row["seconds"][clock]
    return row | {"flops_per_second": speed, "mfu": speed / ceiling.flops}


def align_tables(content: dict[str, Any]) -> list[Table]:
    """Tables of the cost of a step, and of its share of the measured ceiling."""
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
            f"{table.caption}\nMFU: share of {content['ceiling_flops'] / 1e12:.3g} TFLOP/s, the fastest matrix product"
            + ("" if part["agree"] else "\nthe losses differ, so speeds are not compared")
        )
        for row in part["ways"]:
            if not row["fits"]:
                table.add_row(row["way"], str(row["batch_size"]), "does not fit")
                continue
            named = ("times_faster", "times_faster_without_loading") if part["agree"] else ()
            table.add_row(
                row["way"],
                str(row["batch_size"]),
                both_times(row["images_per_second"], ".2f", wall_only=cuda),
                *(both_times(row[name], ".2f", wall_only=cuda) for name in named),
                f"{row['flops_per_second'] / 1e12:.3f}",
                f"{100 * row['mfu']:.0f}",
                f"{row['peak_bytes'] / 2**30:.2f}",
                f"{100 * row['data_wait']:.0f}",
                f"{row['loss']:.5f}",
            )
        tables.append(table)
    return tables
