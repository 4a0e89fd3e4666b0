"""Frozen tokens and their targets: computed at each step, or stored in memory or on disk.

In every mode a training asks for batches of rows and gets the same tokens, up to the rounding of stored features
(``cache_dtype``). With several ranks each computes or stores a share:

- ``none``: every batch is loaded and run through the backbone when it is needed; nothing is stored;
- ``device``: each rank stores a consecutive part of the images in memory, on its GPU if they fit there, and takes
  from every batch the images that it stores;
- ``disk``: all ranks write and read the shards of one folder; see :mod:`localign.probing.cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from localign.backbones.native import native_batch, native_tokens
from localign.data.transforms import NativeView
from localign.engine.distributed import DistributedContext
from localign.errors import RunFailure, UserError
from localign.probing.labels import PatchLabels, reduce_labels
from localign.probing.segmentation import (
    LabelledSource,
    attribute_table,
    ignores_pixels,
    labelled_batches,
    native_labelled_batches,
)

if TYPE_CHECKING:
    from localign.backbones.backbone import Backbone

Rows = NDArray[np.int64]
"""Indices of images in their source."""
Batch = tuple[Tensor, PatchLabels]
"""Tokens ``(B, P + n, d)`` and their targets, on one device."""

DoneCallback = Callable[[int, int], None]
"""Called with how many images this rank has done, and how many it has to do."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Features(Protocol):
    """The tokens and targets of a labelled source, for training and evaluation."""

    classes: int
    """Number of classes of the local and the global task."""
    codes: int
    """Number of classes of the majority task."""
    ignores: bool
    """Whether label maps may hold pixels to ignore; the same on all ranks."""

    def __len__(self) -> int:
        """Number of images over all ranks."""

    def rank_rows(self) -> Rows:
        """The consecutive images that this rank evaluates; each image belongs to one rank."""

    def rank_share(self, rows: Rows) -> Rows:
        """This rank's part of a training batch; the parts of all ranks make up the batch."""

    def batches(self, rows: Sequence[Rows]) -> Iterator[Batch]:
        """One batch for each entry of ``rows``, in order. An empty entry gives an empty batch."""


@dataclass(frozen=True)
class PackedLabels:
    """Targets with eight classes per byte: 118,000 images with 183 classes take 0.7 GB instead of 5.5 GB."""

    patch: Tensor
    """uint8 ``(N, n, ceil(C / 8))``."""
    image: Tensor
    """uint8 ``(N, ceil(C / 8))``."""
    majority: Tensor
    """int16 ``(N, n)``, int32 for more than 32,768 codes."""
    classes: int
    codes: int
    partial: bool = False
    """As for :class:`PatchLabels`."""

    @staticmethod
    def pack(labels: PatchLabels) -> PackedLabels:
        """Pack targets, on their device."""
        majority = labels.majority.to(torch.int16 if labels.codes <= 2**15 else torch.int32)
        patch, image = _pack(labels.patch), _pack(labels.image)
        return PackedLabels(patch, image, majority, labels.classes, labels.codes, labels.partial)

    def __getitem__(self, rows: slice | Tensor) -> PackedLabels:
        return self._each(lambda t: t[rows])

    def to(self, device: torch.device) -> PackedLabels:
        """The packed targets on another device."""
        return self._each(lambda t: t.to(device))

    def unpack(self, device: torch.device) -> PatchLabels:
        """The targets on a device, as losses and metrics take them."""
        packed = self.to(device)
        patch, image = _unpack(packed.patch, self.classes), _unpack(packed.image, self.classes)
        return PatchLabels(patch, image, packed.majority.long(), self.codes, self.partial)

    def tensors(self) -> dict[str, Tensor]:
        """The three tensors by the names of the constructor's arguments."""
        return {"patch": self.patch, "image": self.image, "majority": self.majority}

    @staticmethod
    def cat(parts: Sequence[PackedLabels]) -> PackedLabels:
        """Concatenate the targets of several batches."""
        tensors = [p.tensors() for p in parts]
        joined = {name: torch.cat([t[name] for t in tensors]) for name in tensors[0]}
        first, partial = parts[0], any(p.partial for p in parts)
        return PackedLabels(**joined, classes=first.classes, codes=first.codes, partial=partial)

    def _each(self, function: Callable[[Tensor], Tensor]) -> PackedLabels:
        patch, image, majority = function(self.patch), function(self.image), function(self.majority)
        return PackedLabels(patch, image, majority, self.classes, self.codes, self.partial)


def _pack(flags: Tensor) -> Tensor:
    """bool ``(..., C)`` to uint8 ``(..., ceil(C / 8))``, the first class in the lowest bit."""
    padded = F.pad(flags.to(torch.uint8), (0, -flags.shape[-1] % 8))
    bits = padded.view(*padded.shape[:-1], padded.shape[-1] // 8, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=flags.device)).sum(-1, dtype=torch.uint8)


def _unpack(packed: Tensor, classes: int) -> Tensor:
    bits: Tensor = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).flatten(-2)[..., :classes].bool()


class SubsetSource:
    """Images of a labelled source by index, in a given order."""

    def __init__(self, source: LabelledSource, rows: Rows) -> None:
        self.source, self.rows = source, rows
        self.kind, self.classes, self.class_kinds = source.kind, source.classes, source.class_kinds
        self.attributes, self.ignores = source.attributes, ignores_pixels(source)

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
    """A frozen backbone and a labelled source: how tokens and targets are made.

    The tokens are the output of the last block after the final norm, prefix tokens included.
    """

    backbone: Backbone
    sha256: str
    """Hash of the backbone's tensors, the same as in an export folder's ``config.json``."""
    source: LabelledSource
    dtype: torch.dtype
    """Dtype of stored features."""
    autocast: bool
    """Whether the backbone runs in bfloat16 autocast."""
    batch: int
    """Images per forward pass."""
    workers: int
    """Loader processes."""
    context: DistributedContext
    native: NativeView | None = None
    """Sizes of images that keep their aspect ratio. Tokens of the padding are 0, and its targets count nowhere."""

    @property
    def classes(self) -> int:
        """Number of classes of the local and the global task."""
        return len(self.source.classes)

    @property
    def table(self) -> Tensor | None:
        """The classes of each code, bool ``(codes, C)``; None if label maps hold class ids."""
        return attribute_table(self.source)

    @property
    def ignores(self) -> bool:
        """Whether some patches may count nowhere."""
        return ignores_pixels(self.source) or self.native is not None

    @property
    def codes(self) -> int:
        """Number of values that a pixel can have, and of classes of the majority task."""
        return self.classes if self.table is None else len(self.table)

    @property
    def token_shape(self) -> tuple[int, int]:
        """Tokens of an image and their channels, (P + n, d)."""
        return self.backbone.num_prefix_tokens + self.num_patches, self.backbone.width

    @property
    def num_patches(self) -> int:
        """Patches of an image, those of padding included."""
        return self.backbone.num_patches if self.native is None else self.native.max_patches

    @property
    def bytes_per_image(self) -> int:
        """Bytes of an image's stored features and targets."""
        tokens, width = self.token_shape
        patches = self.num_patches
        return tokens * width * self.dtype.itemsize + (patches + 1) * -(-self.classes // 8) + 2 * patches

    @torch.no_grad()
    def run(self, rows: Rows, batch: int) -> Iterator[Batch]:
        """Tokens in the forward pass's dtype on the context's device, and targets on the CPU.

        Args:
            rows: Images to run.
            batch: Images per forward pass.

        Raises:
            UserError: An image or label map is bad.
        """
        device, table = self.context.device, self.table
        if self.native is not None:
            yield from self._run_native(self.native, rows, batch)
            return
        for images, maps in labelled_batches(
            SubsetSource(self.source, rows),
            self.backbone.image_size,
            batch,
            self.workers,
            self.context.timeout,
            self.backbone.preprocessing,
        ):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
                tokens = self.backbone.tokens(self.backbone.normalise(images.to(device)))
            labels = reduce_labels(maps, self.backbone.patch_size, self.classes, table, ignores=self.ignores)
            yield tokens, labels

    def _run_native(self, view: NativeView, rows: Rows, batch: int) -> Iterator[Batch]:
        backbone, most = self.backbone, view.max_patches
        source, ignores = SubsetSource(self.source, rows), ignores_pixels(self.source)
        for pairs in native_labelled_batches(source, view, batch, self.workers, self.context.timeout):
            images = native_batch(backbone, [i.to(self.context.device) for i, _ in pairs], most)
            with torch.autocast(self.context.device.type, torch.bfloat16, enabled=self.autocast):
                tokens = native_tokens(backbone, images)
            tokens = tokens * images.valid(backbone.num_prefix_tokens)[..., None]
            reduce = partial(reduce_labels, attributes=self.table, ignores=ignores)
            targets = [reduce(maps[None], view.patch, self.classes).padded(most) for _, maps in pairs]
            yield tokens, PatchLabels.cat(targets)

    def stored(self, rows: Rows, batch: int | None = None) -> Iterator[tuple[Tensor, PackedLabels]]:
        """Tokens in :attr:`dtype` on the context's device, and packed targets on the CPU, to be stored.

        Args:
            rows: Images to run.
            batch: Images per forward pass; default :attr:`batch`.

        Raises:
            RunFailure: Tokens are not finite in :attr:`dtype`.
        """
        for tokens, labels in self.run(rows, batch or self.batch):
            tokens = tokens.to(self.dtype)
            if not bool(torch.isfinite(tokens).all()):
                name = self.backbone.name
                raise RunFailure(f"the features of {name} are not finite in {self.dtype}; try float32")
            yield tokens, PackedLabels.pack(labels)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode inside the block, and back into its own mode afterwards."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def rank_part(count: int, context: DistributedContext) -> Rows:
    """A rank's consecutive part of ``count`` images; parts differ in size by at most one image."""
    begin, end = context.rank * count // context.size, (context.rank + 1) * count // context.size
    return np.arange(begin, end, dtype=np.int64)


def batch_share(rows: Rows, context: DistributedContext) -> Rows:
    """A rank's consecutive part of a batch, of the same size on all ranks.

    Raises:
        UserError: The batch cannot be divided evenly.
    """
    if len(rows) % context.size:
        raise UserError(f"a batch of {len(rows)} cannot be divided evenly among {context.size} processes")
    share: Rows = rows.reshape(context.size, -1)[context.rank]
    return share


class LiveFeatures:
    """Features that are not stored: images are loaded and run through the backbone batch by batch."""

    def __init__(self, extraction: Extraction) -> None:
        self.extraction, self.context = extraction, extraction.context
        self.classes, self.codes, self.ignores = extraction.classes, extraction.codes, extraction.ignores

    def __len__(self) -> int:
        return len(self.extraction.source)

    def rank_rows(self) -> Rows:
        """A consecutive part of the images."""
        return rank_part(len(self), self.context)

    def rank_share(self, rows: Rows) -> Rows:
        """A consecutive part of the batch. Raises UserError if the batch cannot be divided evenly."""
        return batch_share(rows, self.context)

    def batches(self, rows: Sequence[Rows]) -> Iterator[Batch]:
        """Load and run the images. All entries but the last must have the same length, because one loader
        serves them."""
        if not rows:
            return
        for tokens, labels in self.extraction.run(np.concatenate(rows), max(1, len(rows[0]))):
            yield tokens, labels.to(tokens.device)


class MemoryFeatures:
    """Features in memory.

    Args:
        features: ``(N, P + n, d)``, tokens of this rank's images.
        labels: Targets of the same images.
        device: Device of the batches; the features stay on their own device.
        count: Number of images over all ranks; default N.
        first: Index of this rank's first image.
        ignores: Whether the label maps of any rank may hold pixels to ignore.
    """

    def __init__(
        self,
        features: Tensor,
        labels: PackedLabels,
        device: torch.device | str = "cpu",
        count: int | None = None,
        first: int = 0,
        ignores: bool = False,
    ) -> None:
        self.features, self.labels, self.device = features, labels, torch.device(device)
        self.count, self.first = len(features) if count is None else count, first
        self.classes, self.codes, self.ignores = labels.classes, labels.codes, ignores or labels.partial

    def __len__(self) -> int:
        return self.count

    def rank_rows(self) -> Rows:
        """The images that this rank stores."""
        return np.arange(self.first, self.first + len(self.features), dtype=np.int64)

    def rank_share(self, rows: Rows) -> Rows:
        """The images of the batch that this rank stores, possibly none."""
        return rows[(rows >= self.first) & (rows < self.first + len(self.features))]

    def batches(self, rows: Sequence[Rows]) -> Iterator[Batch]:
        """Copies of the rows."""
        for wanted in rows:
            index = torch.from_numpy(wanted - self.first).to(self.features.device)
            yield self.features[index].to(self.device), self.labels[index].unpack(self.device)


def extract_to_memory(
    extraction: Extraction, storage: torch.device, on_progress: DoneCallback
) -> MemoryFeatures:
    """Compute this rank's part of a source's features.

    Args:
        extraction: The backbone and the source.
        storage: Device that stores the features.
        on_progress: Called with how many images this rank has done, and how many it has to do.
    """
    rows = rank_part(len(extraction.source), extraction.context)
    store = torch.empty(len(rows), *extraction.token_shape, dtype=extraction.dtype, device=storage)
    targets: list[PackedLabels] = []
    done = 0
    for tokens, labels in extraction.stored(rows):
        store[done : done + len(tokens)] = tokens
        targets.append(labels)
        done += len(tokens)
        on_progress(done, len(rows))
    labels = PackedLabels.cat(targets).to(storage)
    source, device = extraction.source, extraction.context.device
    return MemoryFeatures(store, labels, device, len(source), int(rows[0]), extraction.ignores)
