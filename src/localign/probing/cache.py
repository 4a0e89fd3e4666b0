"""Features on disk: a folder of shards, and a key that identifies the features.

    cache.json              the key, and the number of images in a shard
    shard-00000.safetensors features (images, P + n, d) and the packed targets of the same images
    ...

The key holds everything that decides the features: the backbone's weights and settings, the data's fingerprint, the
geometry and the dtype. Each shard is written completely or not at all, so that an interrupted extraction can be
continued. Shards are memory-mapped, so that a data set may be larger than memory.

A shard's header holds a digest of its tensors. It is compared whenever the cache is opened; shards of older caches,
which have no digests, are only searched for features that are not finite.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO, TypedDict, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from localign.backbones.export import content_hash
from localign.engine.log import say
from localign.errors import UserError
from localign.files import replace_text, replacing, sweep
from localign.files.lock import LOCK_FILE, lock
from localign.probing.features import (
    Batch,
    DoneCallback,
    Extraction,
    PackedLabels,
    Rows,
    batch_share,
    rank_part,
)
from localign.text.printing import printable
from localign.text.reading import read_json_object

S = TypeVar("S")
T = TypeVar("T")
HEADER = "cache.json"
DIGEST = "sha256"
"""Key of the tensors' digest in a shard's header."""
FORMAT = 1
SHARD_BYTES = 256 * 2**20
"""Approximate size of a shard, which is also the most that an interrupted extraction loses."""
SPARE_BYTES = 2**30
"""Disk space that is left free."""


class _Key(TypedDict):
    backbone: str
    """SHA-256 of the weights."""
    data: str  # fingerprint of the source
    images: int
    classes: int
    image_size: list[int]
    patch_size: list[int]
    layer: int
    final_norm: str
    soft_cap: float | None
    mean: list[float]
    std: list[float]
    dtype: str
    autocast: bool
    format: int


class CacheKey(_Key, total=False):
    """Everything that decides the features of a source."""

    interpolation: str  # missing if the backbone's folder states none
    max_patches: int  # missing if all images have one size


class _Header(TypedDict):
    key: CacheKey
    shard_images: int


class CacheHeader(_Header, total=False):
    """The content of ``cache.json``."""

    digests: bool
    """Whether all shards have a digest; missing in caches from before there were digests."""


def cache_key(extraction: Extraction) -> CacheKey:
    """The key of a source's features."""
    backbone, source = extraction.backbone, extraction.source
    key: CacheKey = {
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
    if backbone.preprocessing.interpolation is not None:
        key["interpolation"] = backbone.preprocessing.interpolation
    if extraction.native is not None:
        key["max_patches"] = extraction.native.max_patches
    return key


class DiskFeatures:
    """Features read from a folder that :func:`extract_to_disk` has filled.

    Args:
        folder: The cache folder.
        extraction: Describes the features; the backbone is not run.
        shard_images: Images per shard; the last shard may hold fewer.

    Raises:
        UserError: A shard cannot be read, or its tensors have other sizes.
    """

    def __init__(self, folder: Path, extraction: Extraction, shard_images: int) -> None:
        self.extraction, self.context, self.shard_images = extraction, extraction.context, shard_images
        self.classes, self.codes, self.ignores = extraction.classes, extraction.codes, extraction.ignores
        counts = _shard_sizes(len(self), shard_images)
        shards = [_read_shard(_shard_path(folder, s), extraction, count) for s, count in enumerate(counts)]
        self._shards = [_as_arrays(tensors) for tensors, _ in shards]

    def __len__(self) -> int:
        return len(self.extraction.source)

    def rank_rows(self) -> Rows:
        """A consecutive part of the images."""
        return rank_part(len(self), self.context)

    def rank_share(self, rows: Rows) -> Rows:
        """A consecutive part of the batch. Raises UserError if the batch cannot be divided evenly."""
        return batch_share(rows, self.context)

    def batches(self, rows: Sequence[Rows]) -> Iterator[Batch]:
        """Copies of the rows. The next batch is read while the current one is in use."""
        device = self.context.device
        for tokens, labels in _prefetched(self._gather, rows):
            yield tokens.to(device), labels.unpack(device)

    def _gather(self, rows: Rows) -> tuple[Tensor, PackedLabels]:
        """Runs in a second thread, and therefore in NumPy: torch would start another pool of threads there."""
        arrays = {name: np.empty((len(rows), *a.shape[1:]), a.dtype) for name, a in self._shards[0].items()}
        shards, within = np.divmod(rows, self.shard_images)
        for shard in np.unique(shards):
            in_shard = shards == shard
            for name, target in arrays.items():
                target[in_shard] = self._shards[shard][name][within[in_shard]]
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        tokens = tensors.pop("features").view(self.extraction.dtype)
        partial = self.ignores and int(arrays["majority"].min(initial=0)) < 0
        return tokens, PackedLabels(**tensors, classes=self.classes, codes=self.codes, partial=partial)


def extract_to_disk(
    extraction: Extraction, folder: Path, *, replace: bool, on_progress: DoneCallback
) -> DiskFeatures:
    """The features of a source from its cache. Missing shards are made first.

    Args:
        extraction: The backbone and the source.
        folder: The cache folder.
        replace: If the folder holds a cache with another key, delete that cache instead of raising an error.
        on_progress: Called with how many images this rank has done, and how many it has to do.

    Raises:
        UserError: The folder holds another cache, other files or a damaged shard, or the disk is too full.
        RunFailure: The features are not finite.
    """
    context = extraction.context
    refusal, folder_lock = None, None
    if context.is_main:
        try:
            folder_lock = _prepare(extraction, folder, replace)
        except UserError as error:
            refusal = str(error)
    if refusal := context.all_gather_object(refusal)[0]:  # all ranks must stop, or the others would wait
        raise UserError(refusal)
    header = _read_header(folder)
    shard_images = header["shard_images"]
    missing = _missing(folder, len(extraction.source), shard_images)
    _check_shards(extraction, folder, header, set(missing))
    context.barrier()  # all ranks look for missing shards before any rank writes one
    _write_shards(extraction, folder, missing[context.rank :: context.size], shard_images, on_progress)
    context.barrier()
    if folder_lock is not None:
        folder_lock.close()
    return DiskFeatures(folder, extraction, shard_images)


def _prepare(extraction: Extraction, folder: Path, replace: bool) -> TextIO | None:
    """Make the folder or check its key, and check that the disk has room for the missing shards.

    Returns:
        A lock on the folder; None if no shard is missing.
    """
    key, count = cache_key(extraction), len(extraction.source)
    if _is_whole(folder, key, count):  # perhaps on a disk that cannot be written to
        return None
    if (
        folder.exists()
        and not (folder / HEADER).is_file()
        and any(p.name != LOCK_FILE for p in folder.iterdir())
    ):
        raise UserError(f"{folder} is not a feature cache: it has no {HEADER}; give another --cache-dir")
    folder.mkdir(parents=True, exist_ok=True)
    folder_lock = lock(folder)
    sweep(folder)
    if (folder / HEADER).is_file():
        stored = _read_header(folder)["key"]
        if stored != key and not replace:
            raise UserError(f"{folder} holds features {_difference(stored, key)}; give another --cache-dir")
        if stored != key:
            _remove(folder)
    if not (folder / HEADER).is_file():
        shard_images = extraction.batch * max(
            1, SHARD_BYTES // extraction.bytes_per_image // extraction.batch
        )
        header: CacheHeader = {"key": key, "shard_images": shard_images, "digests": True}
        replace_text(folder / HEADER, json.dumps(header, indent=1) + "\n")
    shard_images = _read_header(folder)["shard_images"]
    missing = _missing(folder, count, shard_images)
    needed = extraction.bytes_per_image * sum(len(_shard_rows(s, shard_images, count)) for s in missing)
    free = shutil.disk_usage(folder).free
    if needed + SPARE_BYTES > free:
        raise UserError(
            f"the features need {format_bytes(needed)} in {folder}, which has {format_bytes(free)} free; "
            "give another --cache-dir, or --cache none"
        )
    say(f"writing {format_bytes(needed)} of features to {folder} ({format_bytes(free)} free)")
    return folder_lock


def _is_whole(folder: Path, key: CacheKey, count: int) -> bool:
    if not (folder / HEADER).is_file():
        return False
    header = _read_header(folder)
    return header["key"] == key and not _missing(folder, count, header["shard_images"])


def _remove(folder: Path) -> None:
    """Delete a cache, and nothing else that lies in its folder. Without the header no shard counts."""
    (folder / HEADER).unlink()
    for shard in folder.glob("shard-*.safetensors"):
        shard.unlink()


def _difference(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The difference between two keys, to follow the word "features"."""
    names = [n for n in wanted if stored.get(n) != wanted[n]]
    for name, kind in (("backbone", "of another backbone"), ("data", "of other data")):
        if name in names:
            return f"{kind} ({str(stored.get(name))[:12]}, not {wanted[name][:12]})"
    changes = ", ".join(f"{n} {stored.get(n)}, not {wanted[n]}" for n in names)
    return f"made with other settings ({changes})"


def _read_header(folder: Path) -> CacheHeader:
    path = folder / HEADER
    header = read_json_object(path)
    count = header.get("shard_images")
    if not isinstance(header.get("key"), dict) or type(count) is not int or not 0 < count < 2**40:
        raise UserError(f"{printable(path)} was not written by localign")
    return cast(CacheHeader, header)


def _shard_sizes(count: int, shard_images: int) -> list[int]:
    """Images in each shard."""
    return [min(shard_images, count - first) for first in range(0, count, shard_images)]


def _shard_rows(shard: int, shard_images: int, count: int) -> Rows:
    return np.arange(shard * shard_images, min((shard + 1) * shard_images, count), dtype=np.int64)


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def _missing(folder: Path, count: int, shard_images: int) -> list[int]:
    shards = range(-(-count // shard_images))
    return [s for s in shards if not _shard_path(folder, s).is_file()]


def _write_shards(
    extraction: Extraction, folder: Path, shards: list[int], shard_images: int, on_progress: DoneCallback
) -> None:
    """Run the backbone over the images of the shards, in one pass of the loader."""
    if not shards:
        return
    rows = [_shard_rows(s, shard_images, len(extraction.source)) for s in shards]
    # The batch divides every shard but the very last one, so no batch spans two shards.
    batches = extraction.stored(np.concatenate(rows), batch=math.gcd(extraction.batch, shard_images))
    done, total = 0, sum(map(len, rows))
    for shard, shard_rows in zip(shards, rows, strict=True):
        parts: list[tuple[Tensor, PackedLabels]] = []
        while sum(len(tokens) for tokens, _ in parts) < len(shard_rows):
            tokens, labels = next(batches)
            parts.append((tokens.cpu(), labels))
            done += len(tokens)
            on_progress(done, total)
        tensors = {"features": torch.cat([tokens for tokens, _ in parts])}
        tensors |= PackedLabels.cat([labels for _, labels in parts]).tensors()
        with replacing(_shard_path(folder, shard)) as temporary:
            save_file(tensors, temporary, metadata={DIGEST: content_hash(tensors)})


def _check_shards(extraction: Extraction, folder: Path, header: CacheHeader, missing: set[int]) -> None:
    """Read the shards that there are, each on one rank, and compare their digests. A call of all ranks.

    Raises:
        UserError: A shard is damaged or its features are not finite; the same on all ranks.
    """
    context, problem = extraction.context, None
    counts = list(enumerate(_shard_sizes(len(extraction.source), header["shard_images"])))
    for shard, count in [pair for pair in counts if pair[0] not in missing][context.rank :: context.size]:
        try:
            path = _shard_path(folder, shard)
            tensors, digest = _read_shard(path, extraction, count)
            if (digest is not None or header.get("digests")) and content_hash(tensors) != digest:
                raise _damaged(path, "its digest differs")
            if not torch.isfinite(tensors["features"]).all():
                raise _damaged(path, "it holds features that are NaN or infinite")
        except UserError as error:
            problem = str(error)
            break
    if problem := next(filter(None, context.all_gather_object(problem)), None):
        raise UserError(problem)


def _read_shard(path: Path, extraction: Extraction, count: int) -> tuple[dict[str, Tensor], str | None]:
    """The memory-mapped tensors of a shard of ``count`` images, and the digest in its header.

    Raises:
        UserError: The shard cannot be read, or its tensors have other names, types or sizes.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dictionary)
            digest = (file.metadata() or {}).get(DIGEST)
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(path, str(error)) from None
    (tokens, width), patches = extraction.token_shape, extraction.num_patches
    packed = -(-extraction.classes // 8)
    wanted = {
        "features": (extraction.dtype, (count, tokens, width)),
        "patch": (torch.uint8, (count, patches, packed)),
        "image": (torch.uint8, (count, packed)),
        "majority": (torch.int16, (count, patches)),
    }
    if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} != wanted:
        raise _damaged(path, "its tensors have other names, types or sizes")
    return tensors, digest


def _damaged(path: Path, reason: str) -> UserError:
    line = printable(reason.partition("\n")[0])
    return UserError(f"{printable(path)} is damaged ({line}); delete it, and the next run makes it again")


def _as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """NumPy has no bfloat16, so features are integers of the same size."""
    integers = {2: torch.int16, 4: torch.int32}[tensors["features"].dtype.itemsize]
    return {name: (t.view(integers) if name == "features" else t).numpy() for name, t in tensors.items()}


def _prefetched(function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """``map(function, items)``; a thread computes the next result while the current one is in use."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        upcoming: Future[T] | None = None
        for item in items:
            current, upcoming = upcoming, thread.submit(function, item)
            if current is not None:
                yield current.result()
        if upcoming is not None:
            yield upcoming.result()


def format_bytes(count: float) -> str:
    """A number of bytes for people to read: ``1.3 GiB`` or ``20.0 MiB``."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
