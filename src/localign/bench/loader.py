"""`localign bench loader`: loading of training crops against Pillow and torchvision transforms in a DataLoader."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from localign.bench import photographs
from localign.bench.show import show, timing_table, write_measurements
from localign.bench.timing import Timing, hardware, timed
from localign.data.loader import TrainLoader
from localign.data.sources import open_source
from localign.data.transforms import TrainTransform
from localign.engine.log import say
from localign.errors import RunFailure
from localign.options.bench import LoaderBenchConfig
from localign.options.names import Decode

REPEATS, BATCH, SIZE = 3, 32, 224
DRAWN, TAKEN = 64, 256
PLAIN = "plain"
CPU = torch.device("cpu")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class LoaderWay:
    """One loader of the photographs."""

    name: str
    decode: Decode
    batches: Iterable[Any]
    """Each iteration is one pass."""


class PillowImages(Dataset[Tensor]):
    """Image files loaded as in a plain script: opened and converted by Pillow, transformed by torchvision."""

    def __init__(self, folder: Path, size: int) -> None:
        self.files = sorted(folder.iterdir())
        self.transform = T.Compose(
            [T.RandomResizedCrop(size), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(_MEAN, _STD)]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.files[index]) as image:
            crop: Tensor = self.transform(image.convert("RGB"))
            return crop


def run_bench_loader(config: LoaderBenchConfig) -> None:
    """Run the benchmark, write its JSON file, and print its tables."""
    content = write_measurements(config, bench_loader(config))
    show(loader_tables(content), config)


def bench_loader(config: LoaderBenchConfig) -> dict[str, Any]:
    """Time passes over the same photographs; the loaders take turns, and the median of each loader counts.

    Our loaders return uint8 crops, which are normalised on the device; the plain loader normalises. All draw random
    resized crops and flips. Ours also draw the interpolation, bilinear or bicubic; the plain loader's is bilinear.

    Returns:
        The content of the JSON file, except for the command, the options and the versions.

    Raises:
        UserError: The folder has no readable photographs.
        RunFailure: The folder and the tar shards give different crops.
    """
    with TemporaryDirectory() as temporary, _one_thread():
        folder = Path(temporary) / "photographs"
        folder.mkdir()
        if config.data is None:
            say("drawing photographs")
            photographs.draw(folder, config.images or DRAWN, config.seed)
        else:
            photographs.copy_from(folder, config.data, config.images or TAKEN)
        files = sorted(folder.iterdir())
        facts = _facts(files, config)
        batch = min(config.batch_size or BATCH, len(files))
        forms = photographs.pack_forms(folder, Path(temporary))
        ways = [_plain(folder, config, batch), *_ours(forms, config, len(files), batch)]
        difference = _differences(ways)
        timings = _measure(ways, config.repeats or REPEATS)
        return {
            **facts,
            "batch_size": batch,
            "mean_difference": difference,
            "hardware": hardware(CPU),
            "ways": _rows(timings, len(files) // batch * batch),
        }


def _facts(files: list[Path], config: LoaderBenchConfig) -> dict[str, Any]:
    pixels = []
    for file in files:
        with Image.open(file) as image:
            pixels.append(image.width * image.height)
    return {
        "photographs": "synthetic photographs"
        if config.data is None
        else f"photographs of {Path(config.data).name}",
        "images": len(files),
        "megapixels": float(np.mean(pixels)) / 1e6,
        "kilobytes": sum(file.stat().st_size for file in files) / len(files) / 1e3,
        "size": config.image_size or SIZE,
        "workers": config.workers or 0,
    }


def _plain(folder: Path, config: LoaderBenchConfig, batch: int) -> LoaderWay:
    loader = DataLoader(
        PillowImages(folder, config.image_size or SIZE),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=config.workers or 0,
        generator=torch.Generator().manual_seed(config.seed),
    )
    return LoaderWay(PLAIN, "full", loader)


def _ours(forms: dict[str, str], config: LoaderBenchConfig, images: int, batch: int) -> Iterator[LoaderWay]:
    size = config.image_size or SIZE
    decodes: tuple[Decode, ...] = ("scaled", "full")
    for name, spec in forms.items():
        for decode in decodes:
            loader = TrainLoader(
                open_source(spec, allow_outside=True),
                TrainTransform(size, "rrc", decode=decode),
                seed=config.seed,
                global_batch=batch,
                micro_batch=batch,
                workers=config.workers or 0,
                end_step=images // batch,
            )
            yield LoaderWay(name, decode, loader)


def _differences(ways: list[LoaderWay]) -> float:
    """Run untimed passes, which also warm up, and compare their crops.

    Returns:
        The mean absolute difference between crops of scaled and full decodes, levels of 0..255.

    Raises:
        RunFailure: The tar shards, which hold the folder's images in its order, give different crops.
    """
    by_name = {(way.name, way.decode): way.batches for way in ways}
    for batches in by_name.values():
        _exhaust(batches)
    decodes: tuple[Decode, ...] = ("scaled", "full")
    for decode in decodes:
        for ours, packed in zip(by_name["folder", decode], by_name["tar", decode], strict=True):
            if not torch.equal(ours.images, packed.images):
                raise RunFailure(f"the folder and the tar shards give different crops, decoded {decode}")
    pairs = zip(*(by_name["folder", decode] for decode in decodes), strict=True)
    return float(np.mean([(a.images.float() - b.images.float()).abs().mean() for a, b in pairs]))


def _measure(ways: list[LoaderWay], repeats: int) -> dict[LoaderWay, Timing]:
    timings: dict[LoaderWay, list[Timing]] = {way: [] for way in ways}
    for repeat in range(repeats):
        say(f"pass {repeat + 1} of {repeats}")
        for way, passes in timings.items():
            before = _workers_cpu()
            _, timing = timed(partial(_exhaust, way.batches), CPU)
            passes.append(Timing(timing.wall, timing.cpu + _workers_cpu() - before))
    return {way: Timing.median(passes) for way, passes in timings.items()}


def _exhaust(batches: Iterable[Any]) -> None:
    for _ in batches:
        pass


def _workers_cpu() -> float:
    """CPU time of the worker processes that have ended, seconds."""
    times = os.times()
    return times.children_user + times.children_system


def _rows(timings: dict[LoaderWay, Timing], images: int) -> list[dict[str, Any]]:
    plain = next(timing for way, timing in timings.items() if way.name == PLAIN)
    return [
        {
            "way": way.name,
            "decode": way.decode,
            "seconds": asdict(timing),
            # By CPU time: images per second on one core, independent of other load.
            "images_per_second": {"wall": images / timing.wall, "cpu": images / timing.cpu},
            "times_faster": asdict(plain.over(timing)),
        }
        for way, timing in timings.items()
    ]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread, as loader workers do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def loader_tables(content: dict[str, Any]) -> list[Table]:
    """A table of the crops that each loader loads per second on one core."""
    title = "{images} {photographs}, {megapixels:.1f} megapixels and {kilobytes:,.0f} KB each, to {size} pixels".format(
        **content
    )
    numbers = ("images/s per core", "times faster than plain", "images/s")
    table = timing_table(title, content, ("way", "decode"), numbers)
    table.caption = (
        f"{table.caption}, {content['workers'] or 'no'} workers\n"
        f"crops of scaled decodes differ from crops of full decodes by {content['mean_difference']:.2f} of 255 levels"
    )
    for row in content["ways"]:
        speed, faster = row["images_per_second"], row["times_faster"]
        table.add_row(
            row["way"], row["decode"], f"{speed['cpu']:.1f}", f"{faster['cpu']:.2f}", f"{speed['wall']:.1f}"
        )
    return [table]
