"""Frozen tokens and the targets that go with them: made at each step, or kept in memory or on a disk.

Whatever the mode, a training asks for batches of rows and gets the same tokens, up to the rounding of what is
kept (``cache_dtype``). Over several ranks each makes or holds its share:

- ``none``: every batch is loaded and run through the backbone when it is asked for; nothing is stored;
- ``device``: each rank keeps a consecutive part of the images in memory, on its GPU where they fit there, and
  takes of every batch the images that it keeps;
- ``disk``: shards of one folder that all ranks write and read; see :mod:`localign.probing.cache`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from localign.engine.distributed import DistributedContext
from localign.errors import RunFailure, UserError
from localign.probing.heads import Geometry
from localign.probing.labels import PatchLabels, reduce_labels
from localign.probing.segmentation import LabelledSource, labelled_batches

if TYPE_CHECKING:
    from localign.backbones.backbone import Backbone

Rows = NDArray[np.int64]
"""Indices of images in their source."""
Batch = tuple[Tensor, PatchLabels]
"""Tokens ``(B, P + n, d)`` and their targets, on one device."""

Told = Callable[[int, int], None]
"""Is told how many images are done, of how many."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MEMORY_SHARE = 0.5
"""Of the memory that is free: what features may take without being asked for."""


class Features(Protocol):
    """The tokens and targets of a labelled source, as a training or an evaluation asks for them."""

    classes: int
    """C of the local and the global task."""
    codes: int
    """C of the majority task."""

    def __len__(self) -> int:
        """How many images there are, over all ranks."""

    def own(self) -> Rows:
        """The images that this rank evaluates: consecutive, each image on one rank."""

    def share(self, rows: Rows) -> Rows:
        """This rank's part of a training batch; the parts of all ranks make the batch."""

    def batches(self, rows: Sequence[Rows]) -> Iterator[Batch]:
        """One batch for each entry, in order, empty where the entry is."""


@dataclass(frozen=True)
class PackedLabels:
    """Targets with eight classes to a byte: a set of 118,000 images at 183 classes takes 0.7 GB, not 5.5."""

    patch: Tensor
    """uint8 ``(N, n, ceil(C / 8))``."""
    image: Tensor
    """uint8 ``(N, ceil(C / 8))``."""
    majority: Tensor
    """int16 ``(N, n)``."""
    classes: int
    codes: int

    @staticmethod
    def pack(labels: PatchLabels) -> PackedLabels:
        """The same targets, on the same device."""
        packed = (_pack(labels.patch), _pack(labels.image), labels.majority.short())
        return PackedLabels(*packed, labels.classes, labels.codes)

    def __getitem__(self, rows: slice | Tensor) -> PackedLabels:
        return self._each(lambda t: t[rows])

    def to(self, device: torch.device) -> PackedLabels:
        """The same on another device."""
        return self._each(lambda t: t.to(device))

    def unpack(self, device: torch.device) -> PatchLabels:
        """The targets as the losses and metrics take them."""
        there = self.to(device)
        patch, image = _unpack(there.patch, self.classes), _unpack(there.image, self.classes)
        return PatchLabels(patch, image, there.majority.long(), self.codes)

    def tensors(self) -> dict[str, Tensor]:
        """By name, as the constructor takes them."""
        return {"patch": self.patch, "image": self.image, "majority": self.majority}

    @staticmethod
    def cat(parts: Sequence[PackedLabels]) -> PackedLabels:
        """The targets of several batches, one after the other."""
        tensors = [p.tensors() for p in parts]
        joined = {name: torch.cat([t[name] for t in tensors]) for name in tensors[0]}
        return PackedLabels(**joined, classes=parts[0].classes, codes=parts[0].codes)

    def _each(self, function: Callable[[Tensor], Tensor]) -> PackedLabels:
        tensors = {name: function(t) for name, t in self.tensors().items()}
        return PackedLabels(**tensors, classes=self.classes, codes=self.codes)


def _pack(flags: Tensor) -> Tensor:
    """bool ``(..., C)`` to uint8 ``(..., ceil(C / 8))``, the first class in the lowest bit."""
    bits = F.pad(flags.to(torch.uint8), (0, -flags.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=flags.device)).sum(-1, dtype=torch.uint8)


def _unpack(packed: Tensor, classes: int) -> Tensor:
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).flatten(-2)[..., :classes].bool()


class Picked:
    """Some images of a labelled source, in a given order."""

    def __init__(self, source: LabelledSource, rows: Rows) -> None:
        self.source, self.rows = source, rows
        self.kind, self.classes = source.kind, source.classes

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.source.name(int(self.rows[index]))

    def load_labelled(self, index: int) -> tuple[Image.Image, NDArray[Any]]:
        return self.source.load_labelled(int(self.rows[index]))

    def fingerprint(self) -> str:
        return self.source.fingerprint()


@dataclass(frozen=True)
class Extraction:
    """How tokens and targets come about: a frozen backbone over a labelled source.

    The tokens are those of the last block after the final norm, prefix tokens included.
    """

    backbone: Backbone
    sha256: str
    """Of the backbone's tensors, as an export folder's ``config.json`` has it."""
    source: LabelledSource
    dtype: torch.dtype
    """Of kept features."""
    autocast: bool
    """Run the backbone in bfloat16 autocast."""
    batch: int
    """Images per forward pass."""
    workers: int
    """Loader processes."""
    context: DistributedContext

    @property
    def classes(self) -> int:
        """C of the local and the global task."""
        return len(self.source.classes)

    @property
    def table(self) -> Tensor | None:
        """bool ``(codes, C)`` where label maps hold codes."""
        attributes = getattr(self.source, "attributes", None)
        return None if attributes is None else torch.from_numpy(np.ascontiguousarray(attributes))

    @property
    def codes(self) -> int:
        """What a pixel can hold: C of the majority task."""
        return self.classes if self.table is None else len(self.table)

    @property
    def token_shape(self) -> tuple[int, int]:
        """(P + n, d)."""
        geometry = Geometry.of(self.backbone)
        return geometry.num_prefix_tokens + geometry.num_patches, geometry.width

    @property
    def bytes_per_image(self) -> int:
        """Of kept features with their targets."""
        tokens, width = self.token_shape
        labels = (self.backbone.num_patches + 1) * -(-self.classes // 8) + 2 * self.backbone.num_patches
        return tokens * width * self.dtype.itemsize + labels

    @torch.no_grad()
    def run(self, rows: Rows, batch: int) -> Iterator[Batch]:
        """Tokens as the forward pass gives them, on the backbone's device; targets on the CPU.

        Raises:
            UserError: what the source raises.
        """
        device, table = self.context.device, self.table
        for images, maps in labelled_batches(
            Picked(self.source, rows), self.backbone.image_size, batch, self.workers
        ):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
                tokens = self.backbone.tokens(self.backbone.normalise(images.to(device)))
            yield tokens, reduce_labels(maps, self.backbone.patch_size, self.classes, table)

    def kept(self, rows: Rows, batch: int | None = None) -> Iterator[tuple[Tensor, PackedLabels]]:
        """Tokens in ``dtype`` on the backbone's device, and packed targets on the CPU.

        Raises:
            RunFailure: tokens that are not finite in ``dtype``.
        """
        for tokens, labels in self.run(rows, batch or self.batch):
            stored = tokens.to(self.dtype)
            if not bool(torch.isfinite(stored).all()):
                name = self.backbone.name
                raise RunFailure(f"features of {name} are not finite in {self.dtype}; try float32")
            yield stored, PackedLabels.pack(labels)


@contextmanager
def frozen(backbone: Backbone) -> Iterator[None]:
    """Inside, the backbone is in eval mode; it is given back as it was."""
    was_training = backbone.training
    backbone.eval()
    try:
        yield
    finally:
        backbone.train(was_training)


def part(count: int, context: DistributedContext) -> Rows:
    """A rank's consecutive part of ``count`` images; the parts differ by one image at most."""
    begin, end = context.rank * count // context.size, (context.rank + 1) * count // context.size
    return np.arange(begin, end, dtype=np.int64)


def equal_share(rows: Rows, context: DistributedContext) -> Rows:
    """A rank's consecutive part of a batch.

    Raises:
        UserError: the batch does not divide.
    """
    if len(rows) % context.size:
        raise UserError(f"a batch of {len(rows)} does not divide into {context.size} processes")
    return rows.reshape(context.size, -1)[context.rank]


class LiveFeatures:
    """Nothing is stored: images are loaded and run through the backbone batch by batch."""

    def __init__(self, extraction: Extraction) -> None:
        self.extraction, self.context = extraction, extraction.context
        self.classes, self.codes = extraction.classes, extraction.codes

    def __len__(self) -> int:
        return len(self.extraction.source)

    def own(self) -> Rows:
        """A consecutive part."""
        return part(len(self), self.context)

    def share(self, rows: Rows) -> Rows:
        """A consecutive part. Raises UserError where the batch does not divide."""
        return equal_share(rows, self.context)

    def batches(self, rows: Sequence[Rows]) -> Iterator[Batch]:
        """Loads and runs them; all entries but the last are of one length, as one loader serves them."""
        if not rows:
            return
        for tokens, labels in self.extraction.run(np.concatenate(rows), max(1, len(rows[0]))):
            yield tokens, labels.to(tokens.device)


class MemoryFeatures:
    """Features in memory.

    Args:
        features: ``(N, P + n, d)`` of this rank's images.
        labels: Of the same images.
        device: Where batches go; features stay where they are.
        count: Images over all ranks; the rank's own where missing.
        first: The index of this rank's first image.
    """

    def __init__(
        self,
        features: Tensor,
        labels: PackedLabels,
        device: torch.device | str = "cpu",
        count: int | None = None,
        first: int = 0,
    ) -> None:
        self.features, self.labels, self.device = features, labels, torch.device(device)
        self.count, self.first = len(features) if count is None else count, first
        self.classes, self.codes = labels.classes, labels.codes

    def __len__(self) -> int:
        return self.count

    def own(self) -> Rows:
        """What this rank keeps."""
        return np.arange(self.first, self.first + len(self.features), dtype=np.int64)

    def share(self, rows: Rows) -> Rows:
        """What this rank keeps of them, which may be nothing."""
        return rows[(rows >= self.first) & (rows < self.first + len(self.features))]

    def batches(self, rows: Sequence[Rows]) -> Iterator[Batch]:
        """Copies of the rows."""
        for wanted in rows:
            index = torch.from_numpy(wanted - self.first).to(self.features.device)
            yield self.features[index].to(self.device), self.labels[index].unpack(self.device)


def memory_place(total_bytes: int, context: DistributedContext) -> torch.device | None:
    """Where features are kept that need so many bytes over all ranks: the GPUs, the RAM, or (None) neither.

    Half of what is free may be taken, as every rank finds it.
    """
    device = context.device
    gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    fits_gpu, fits_ram = (
        total_bytes / context.size <= MEMORY_SHARE * gpu,
        total_bytes <= MEMORY_SHARE * free_ram(),
    )
    views = context.all_gather_object((fits_gpu, fits_ram))
    if all(on_gpu for on_gpu, _ in views):
        return device
    return torch.device("cpu") if all(in_ram for _, in_ram in views) else None


def free_ram() -> int:
    """Bytes of memory that new data can take."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def extract_to_memory(extraction: Extraction, place: torch.device, told: Told) -> MemoryFeatures:
    """This rank's part of a source's features.

    Args:
        extraction: What to run.
        place: Where features are kept.
        told: Is told how many images this rank has done, of how many.
    """
    rows = part(len(extraction.source), extraction.context)
    store = torch.empty(len(rows), *extraction.token_shape, dtype=extraction.dtype, device=place)
    targets: list[PackedLabels] = []
    done = 0
    for tokens, labels in extraction.kept(rows):
        store[done : done + len(tokens)] = tokens
        targets.append(labels)
        done += len(tokens)
        told(done, len(rows))
    labels = PackedLabels.cat(targets).to(place)
    return MemoryFeatures(store, labels, extraction.context.device, len(extraction.source), int(rows[0]))
