"""Features on a disk: a folder of shards that are whole or absent, and a key that says what they are of.

    cache.json              the key, and how many images a shard holds
    shard-00000.safetensors features (images, P + n, d) and the packed targets of the same images
    ...

The key has everything that decides what the features are: the backbone's weights and how it is run, the data's
fingerprint, the geometry and the type. Shards are read through memory maps, so a set larger than memory can
be trained on. A cut-off extraction leaves whole shards and is continued.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from localign.engine.lock import lock
from localign.engine.log import say
from localign.errors import UserError
from localign.files import replace_text, replacing
from localign.probing.features import Batch, Extraction, PackedLabels, Rows, Told, equal_share, part

S = TypeVar("S")
T = TypeVar("T")
HEADER = "cache.json"
FORMAT = 1
SHARD_BYTES = 256 * 2**20
"""About the size of a shard; what a cut-off extraction loses at most."""
SPARE_BYTES = 2**30
"""What is left free on the disk."""


def cache_key(extraction: Extraction) -> dict[str, Any]:
    """Everything that decides what a source's features are, JSON-able."""
    backbone, source = extraction.backbone, extraction.source
    return {
        "backbone": extraction.sha256,
        "data": source.fingerprint(),
        "images": len(source),
        "classes": extraction.classes,
        "image_size": list(backbone.image_size),
        "patch_size": list(backbone.patch_size),
        "layer": backbone.depth - 1,
        "final_norm": backbone.final_norm,
        "soft_cap": backbone.soft_cap,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "dtype": str(extraction.dtype).removeprefix("torch."),
        "autocast": extraction.autocast,
        "format": FORMAT,
    }


class DiskFeatures:
    """Features of a folder that :func:`extract_to_disk` has filled.

    Args:
        folder: Of the cache.
        extraction: What the features are of; nothing is run.
        shard_images: Images in each shard but the last.

    Raises:
        UserError: a shard is damaged.
    """

    def __init__(self, folder: Path, extraction: Extraction, shard_images: int) -> None:
        self.extraction, self.context, self.shard_images = extraction, extraction.context, shard_images
        self.classes, self.codes = extraction.classes, extraction.codes
        shards = range(-(-len(self) // shard_images))
        self._shards = [_read_shard(_shard_path(folder, shard)) for shard in shards]

    def __len__(self) -> int:
        return len(self.extraction.source)

    def own(self) -> Rows:
        """A consecutive part."""
        return part(len(self), self.context)

    def share(self, rows: Rows) -> Rows:
        """A consecutive part. Raises UserError where the batch does not divide."""
        return equal_share(rows, self.context)

    def batches(self, rows: Sequence[Rows]) -> Iterator[Batch]:
        """Copies of the rows, the next batch read while one is in use."""
        device = self.context.device
        for tokens, labels in _one_ahead(self._gather, rows):
            yield tokens.to(device), labels.unpack(device)

    def _gather(self, rows: Rows) -> tuple[Tensor, PackedLabels]:
        """Runs beside the training, so in NumPy: torch would start a second team of threads."""
        arrays = {name: np.empty((len(rows), *a.shape[1:]), a.dtype) for name, a in self._shards[0].items()}
        shards, within = np.divmod(rows, self.shard_images)
        for shard in np.unique(shards):
            there = shards == shard
            for name, target in arrays.items():
                target[there] = self._shards[shard][name][within[there]]
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        tokens = tensors.pop("features").view(self.extraction.dtype)
        return tokens, PackedLabels(**tensors, classes=self.classes, codes=self.codes)


def extract_to_disk(extraction: Extraction, folder: Path, *, replace: bool, told: Told) -> DiskFeatures:
    """The features of a source from its cache, which is made or completed first where it must be.

    Args:
        extraction: What to run.
        folder: Of the cache.
        replace: Delete a cache of something else that is there, rather than refuse.
        told: Is told how many images this rank has done, of how many.

    Raises:
        UserError: the folder holds something else or a damaged shard, or the disk is too full.
        RunFailure: features that are not finite.
    """
    context = extraction.context
    refusal, held = None, None
    if context.is_main:
        try:
            held = _prepare(extraction, folder, replace)
        except UserError as error:
            refusal = str(error)
    if refusal := context.all_gather_object(refusal)[0]:  # every rank must know, or the others would wait
        raise UserError(refusal)
    shard_images = int(_read_header(folder)["shard_images"])
    missing = _missing(folder, len(extraction.source), shard_images)
    context.barrier()  # so that no rank counts what another has just written
    _write_shards(extraction, folder, missing[context.rank :: context.size], shard_images, told)
    context.barrier()
    if held is not None:
        held.close()
    return DiskFeatures(folder, extraction, shard_images)


def _prepare(extraction: Extraction, folder: Path, replace: bool) -> TextIO | None:
    """Make the folder, or find that it is of the same key; see that the disk has room for what is missing.

    Returns:
        A lock on the folder while it is written; None where nothing is missing.
    """
    key, count = cache_key(extraction), len(extraction.source)
    if (folder / HEADER).is_file():
        there = _read_header(folder)["key"]
        if there != key and not replace:
            raise UserError(f"{folder} holds features {_difference(there, key)}; give another --cache-dir")
        if there != key:
            shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is no cache of features: it has no {HEADER}; give another --cache-dir")
    if not (folder / HEADER).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        shard_images = extraction.batch * max(
            1, SHARD_BYTES // extraction.bytes_per_image // extraction.batch
        )
        replace_text(folder / HEADER, json.dumps({"key": key, "shard_images": shard_images}, indent=1) + "\n")
    shard_images = int(_read_header(folder)["shard_images"])
    if not _missing(folder, count, shard_images):
        return None
    held = lock(folder)
    for leftover in folder.glob(".shard-*.tmp"):  # of a process that was killed
        leftover.unlink()
    missing = _missing(folder, count, shard_images)
    needed = extraction.bytes_per_image * sum(len(_shard_rows(s, shard_images, count)) for s in missing)
    free = shutil.disk_usage(folder).free
    if needed + SPARE_BYTES > free:
        raise UserError(
            f"features need {gibibytes(needed)} in {folder}, where {gibibytes(free)} are free; "
            "give another --cache-dir, or --cache none"
        )
    say(f"writing {gibibytes(needed)} of features to {folder} ({gibibytes(free)} free)")
    return held


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """How two keys differ, as in "of another backbone (...)"."""
    names = [n for n in here if there.get(n) != here[n]]
    for name, kind in (("backbone", "another backbone"), ("data", "other data")):
        if name in names:
            return f"of {kind} ({str(there.get(name))[:12]} there, {here[name][:12]} here)"
    changes = ", ".join(f"{n} {there.get(n)} there, {here[n]} here" for n in names)
    return f"made with other settings ({changes})"


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(header, dict) or not isinstance(header.get("key"), dict):
        raise UserError(f"{path} was not written by localign")
    return header


def _shard_rows(shard: int, shard_images: int, count: int) -> Rows:
    return np.arange(shard * shard_images, min((shard + 1) * shard_images, count), dtype=np.int64)


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def _missing(folder: Path, count: int, shard_images: int) -> list[int]:
    shards = range(-(-count // shard_images))
    return [s for s in shards if not _shard_path(folder, s).is_file()]


def _write_shards(
    extraction: Extraction, folder: Path, shards: list[int], shard_images: int, told: Told
) -> None:
    """Run the backbone over the images of some shards, in one pass of the loader."""
    if not shards:
        return
    rows = [_shard_rows(s, shard_images, len(extraction.source)) for s in shards]
    # Only the last of all shards may be smaller, so with this batch none crosses from a shard to the next.
    batches = extraction.kept(np.concatenate(rows), batch=math.gcd(extraction.batch, shard_images))
    done, total = 0, sum(map(len, rows))
    for shard, wanted in zip(shards, rows, strict=True):
        held: list[tuple[Tensor, PackedLabels]] = []
        while sum(len(tokens) for tokens, _ in held) < len(wanted):
            tokens, labels = next(batches)
            held.append((tokens.cpu(), labels))
            done += len(tokens)
            told(done, total)
        tensors = {"features": torch.cat([tokens for tokens, _ in held])}
        tensors |= PackedLabels.cat([labels for _, labels in held]).tensors()
        with replacing(_shard_path(folder, shard)) as temporary:
            save_file(tensors, temporary)


def _read_shard(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a shard, memory-mapped; features as integers of their size, as NumPy knows no bfloat16."""
    try:
        tensors = load_file(path)
        features = tensors.pop("features")
        integers = features.view({2: torch.int16, 4: torch.int32}[features.dtype.itemsize])
        return {"features": integers.numpy(), **{name: t.numpy() for name, t in tensors.items()}}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and it is made again") from None


def _one_ahead(function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """``map(function, items)``, the next result made in a thread while one is in use."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        upcoming: Future[T] | None = None
        for item in items:
            current, upcoming = upcoming, thread.submit(function, item)
            if current is not None:
                yield current.result()
        if upcoming is not None:
            yield upcoming.result()


def gibibytes(count: float) -> str:
    """Bytes for people: ``1.3 GiB``."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
