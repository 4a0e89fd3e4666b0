"""Micro-batches of conversations."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from localign.backbones.native import padded_patches
from localign.data.loader import (
    REPLACEMENT_ATTEMPTS,
    BadImages,
    StreamReader,
    check_batches,
    served_batches,
)
from localign.data.sources import UnreadableImage
from localign.data.transforms import NativeView
from localign.data.workers import data_loader
from localign.engine.task import BatchPlan
from localign.errors import UserError
from localign.vlm.data.dialects import Record
from localign.vlm.data.examples import ConversationTokenizer, Example, NothingToLearn
from localign.vlm.data.prompts import IGNORE_INDEX
from localign.vlm.data.records import Conversations
from localign.vlm.data.sampling import (
    GroupedRecords,
    Integers,
    RecordStream,
    ShuffledRecords,
    estimated_lengths,
    heaviest_tokens,
    split_balanced,
    split_evenly,
    split_grouped,
)
from localign.vlm.data.vocabulary import image_token_id

ImageToTensor = Callable[[Image.Image], Tensor]


class RowCounts(NamedTuple):
    """What the loader counts, so that training need not wait for the device to count it."""

    tokens: int
    """Tokens without padding."""
    longest: int
    """Tokens of the longest sequence."""
    image_tokens: int
    """Image tokens among them."""
    predicted: Tensor | None = None
    """:attr:`VLMBatch.predicted`, on the model's device."""


class VLMBatch(NamedTuple):
    """The conversations of a micro-batch, packed into one row or padded to one row each.

    Images, positions and indices are in the order of the sequences.
    """

    input_ids: Tensor
    """int64, packed ``(1, tokens)`` or padded on the right ``(records, tokens)``."""
    labels: Tensor
    """int64, shaped like ``input_ids``: the ids of learned tokens, else -100. The first token of a sequence is never
    learned."""
    position_ids: Tensor
    """int64, shaped like ``input_ids``: from 0 for each sequence; each independent turn continues from the image."""
    attention_mask: Tensor | None
    """int64, shaped like ``input_ids``, 0 at padding; None if packed."""
    cu_seqlens: Tensor | None
    """int32 ``(records + 1,)``, the sequence borders of a packed row; None if padded."""
    turns: Tensor | None
    """int64, shaped like ``input_ids``, for independent turns: the turn of each token, or 0 for tokens that all turns
    attend to. None for ordinary conversations."""
    images: Tensor
    """uint8, of the records that have an image: ``(images, 3, H, W)``, or of several sizes patches ``(images, longest,
    3 * patch height * patch width)``, padded with 0."""
    positions: Tensor
    """int64 ``(records,)``, global positions in the stream of records."""
    indices: Tensor
    """int64 ``(records,)``, indices into the data, replacements included."""
    bad: tuple[tuple[str, str], ...]
    """(name, reason) of unusable records and images that were replaced."""
    grids: Sequence[Sequence[int]] = ()
    """Rows and columns of patches of each image, if images have several sizes."""
    predicted: Tensor | None = None
    """int64, indices of the tokens that a learned token follows, in the flattened rows; None if not counted."""
    counts: RowCounts | None = None
    """None if not counted."""

    def with_counts(self, image_token: int) -> VLMBatch:
        """The batch with ``predicted`` and ``counts``."""
        if self.cu_seqlens is not None:
            lengths = torch.diff(self.cu_seqlens)
        else:
            assert self.attention_mask is not None
            lengths = self.attention_mask.sum(dim=1)
        # The first token of a sequence is never learned, so the token before a learned one is of its sequence.
        predicted = (self.labels.flatten() != IGNORE_INDEX).nonzero().flatten() - 1
        images = int((self.input_ids == image_token).sum())
        return self._replace(
            predicted=predicted, counts=RowCounts(int(lengths.sum()), int(lengths.max()), images)
        )


def planned_batches(
    data: Conversations,
    encoder: ConversationTokenizer,
    transform: ImageToTensor,
    plan: BatchPlan,
    *,
    packed: bool = True,
    grouped: bool = False,
    shuffle: bool = True,
    max_bad_share: float = 0.01,
) -> Iterator[VLMBatch]:
    """This rank's micro-batches of a range of steps, in order.

    Step s holds the global positions s * batch .. (s + 1) * batch - 1 of the stream of records. A record is
    unusable if its image is unreadable or no answer begins within the token limit. It is replaced by a record
    drawn from (seed, position, attempt), so replacements are part of the stream.

    Args:
        data: The records.
        encoder: Turns records into tokens and labels.
        transform: RGB image -> uint8 ``(3, H, W)``; a :class:`~localign.data.transforms.NativeView` gives several
            sizes.
        plan: The steps, and this rank's part of them.
        packed: Put all records of a micro-batch into one row, and balance ranks and micro-batches by length;
            otherwise one row per record, and equally many in each micro-batch.
        grouped: Use the published sampler instead of the shuffled stream.
        shuffle: False serves records in the order of the data.
        max_bad_share: Stop when more than this share of the records is unusable.

    Raises:
        UserError: The sizes contradict one another; on iteration, too many records are unusable.
        RunFailure: On iteration, a loader worker died or a data file changed.
    """
    check_batches(plan.global_batch, plan.micro_batch, plan.rank, plan.world_size)
    if grouped and not shuffle:
        raise UserError("grouped batches are shuffled")
    if not packed and encoder.tokenizer.pad_token_id is None:
        raise UserError("padded batches need a tokenizer with a padding token")
    if plan.workers:  # otherwise tokenizers warns at every fork, because this process has tokenised already
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    stream = record_stream(data, plan, grouped=grouped, shuffle=shuffle)
    splitter = _MicroBatchSplitter(data, encoder, plan, stream, packed, grouped)
    reader = _RecordReader(data, encoder, transform, plan.seed, packed)
    loader = data_loader(reader, splitter.micro_batches, plan.workers, plan.pin_memory, None, plan.timeout)
    return served_batches(loader, BadImages(len(data), max_bad_share), "record")


def longest_batch(
    data: Conversations,
    encoder: ConversationTokenizer,
    transform: ImageToTensor,
    samples: int,
    *,
    packed: bool,
    plan: BatchPlan | None = None,
) -> VLMBatch:
    """A micro-batch of the longest records by estimated length; records repeat if there are fewer than ``samples``.

    Args:
        data, encoder, transform, packed: As for :func:`planned_batches`.
        plan: Of a run that balances its micro-batches by length. The records then have just the tokens of its heaviest
            micro-batch, because balanced micro-batches never hold the longest records together.
        samples: Records in the micro-batch. Of images of several sizes each has the most patches, and padding
            behind them, so that attention takes a mask.

    Raises:
        UserError: No usable record was found.
    """
    if native := isinstance(transform, NativeView):
        transform = _LargestView(transform.patch, transform.max_patches)
    lengths = estimated_lengths(data, encoder)
    longest = np.argsort(-lengths, kind="stable")
    first = 0
    if plan is not None and samples < len(longest):
        tokens = heaviest_tokens(lengths, record_stream(data, plan), plan.global_batch, samples)
        totals = np.convolve(lengths[longest], np.ones(samples, np.int64), mode="valid")
        first = max(0, int((totals >= tokens).sum()) - 1)  # totals descend
    chosen = np.resize(longest[first : first + samples], samples).tolist()
    batch: VLMBatch | None = _RecordReader(data, encoder, transform, 0, packed)[list(enumerate(chosen))].batch
    if batch is None:
        raise UserError(f"no usable record in {REPLACEMENT_ATTEMPTS} draws")
    return batch._replace(images=F.pad(batch.images, (0, 0, 0, 1))) if native else batch


class _LargestView(NativeView):
    """A blank image of the most patches in the place of any."""

    def __call__(self, image: Image.Image) -> Tensor:
        height, width = self.patch
        return torch.zeros(3, height, self.max_patches * width, dtype=torch.uint8)


def record_stream(
    data: Conversations, plan: BatchPlan, *, grouped: bool = False, shuffle: bool = True
) -> RecordStream:
    """The stream of records that a run trains on: the published sampler's if ``grouped``, else all, shuffled."""
    if grouped:
        return GroupedRecords(plan.seed, data.words, data.has_image, plan.global_batch)
    return ShuffledRecords(plan.seed, len(data), plan.global_batch, shuffle)


class _MicroBatchSplitter:
    """The (position, index) pairs of this rank's micro-batches."""

    def __init__(
        self,
        data: Conversations,
        encoder: ConversationTokenizer,
        plan: BatchPlan,
        stream: RecordStream,
        packed: bool,
        grouped: bool,
    ) -> None:
        self.plan, self.stream, self.packed, self.grouped = plan, stream, packed, grouped
        self.words = data.words
        self.lengths = estimated_lengths(data, encoder) if packed else None

    def micro_batches(self) -> Iterator[list[tuple[int, int]]]:
        per_rank = self.plan.global_batch // self.plan.world_size // self.plan.micro_batch
        mine = slice(self.plan.rank * per_rank, (self.plan.rank + 1) * per_rank)
        for step in range(self.plan.start_step, self.plan.end_step):
            indices = self.stream.indices(step)
            first = step * self.plan.global_batch
            for offsets in self._split(indices, per_rank)[mine]:
                yield [(first + int(offset), int(indices[offset])) for offset in offsets]

    def _split(self, indices: Integers, per_rank: int) -> list[Integers]:
        bins = self.plan.world_size * per_rank
        if self.lengths is not None:
            return split_balanced(self.lengths[indices], bins)
        if self.grouped:
            return split_grouped(self.words[indices], self.plan.world_size, per_rank)
        return split_evenly(len(indices), bins)


class _RecordReader(StreamReader):
    def __init__(
        self,
        data: Conversations,
        encoder: ConversationTokenizer,
        transform: ImageToTensor,
        seed: int,
        packed: bool,
    ) -> None:
        super().__init__(seed, len(data))
        self.data, self.encoder, self.transform, self.packed = data, encoder, transform, packed

    def read(self, index: int, position: int) -> tuple[Example, Tensor | None]:
        record = self.data.record(index)
        if isinstance(self.transform, NativeView) and record.image is not None:
            image = self.transform(self.data.load_image(index, record.image))
            return self._example(record, index, self._image_tokens(self.transform, image)), image
        example = self._example(record, index)
        if record.image is None:
            return example, None
        return example, self.transform(self.data.load_image(index, record.image))

    def _example(self, record: Record, index: int, image_tokens: int | None = None) -> Example:
        try:
            return self.encoder(record, image_tokens)
        except NothingToLearn as error:
            raise UnreadableImage(self.data.name(index), str(error)) from None

    def _image_tokens(self, view: NativeView, image: Tensor) -> int:
        return self.encoder.num_image_tokens - view.max_patches + image[0].numel() // math.prod(view.patch)

    def collate(
        self, samples: list[tuple[Example, Tensor | None]], positions: Tensor, indices: Tensor
    ) -> VLMBatch:
        examples = [example for example, _ in samples]
        images = [image for _, image in samples if image is not None]
        padding = self.encoder.tokenizer.pad_token_id
        rows = packed_row(examples) if self.packed else padded_rows(examples, int(padding))
        if images and isinstance(self.transform, NativeView):
            patches, grids = padded_patches(images, self.transform.patch)
            batch = VLMBatch(*rows, patches, positions, indices, (), grids)
        else:
            pixels = torch.stack(images) if images else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
            batch = VLMBatch(*rows, pixels, positions, indices, ())
        return batch.with_counts(image_token_id(self.encoder.tokenizer))


class _Rows(NamedTuple):
    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    cu_seqlens: Tensor | None
    turns: Tensor | None


def packed_row(examples: Sequence[Example]) -> _Rows:
    """Concatenate sequences into one row; see :class:`VLMBatch`."""
    lengths = [len(example.input_ids) for example in examples]
    borders = np.cumsum([0, *lengths])
    return _Rows(
        torch.cat([example.input_ids for example in examples])[None],
        torch.cat([example.labels for example in examples])[None],
        torch.cat([example.position_ids for example in examples])[None],
        None,
        torch.tensor(borders, dtype=torch.int32),
        torch.cat(turns)[None] if (turns := _turns(examples)) else None,
    )


def padded_rows(examples: Sequence[Example], padding: int) -> _Rows:
    """Pad sequences on the right to the longest, one row each; see :class:`VLMBatch`."""
    longest = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), longest), padding, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    attention_mask, positions = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    turns = torch.zeros_like(input_ids)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length], labels[row, :length] = example.input_ids, example.labels
        attention_mask[row, :length] = 1
        positions[row, :length] = example.position_ids
        if example.turns is not None:
            turns[row, :length] = example.turns
    return _Rows(input_ids, labels, positions, attention_mask, None, turns if _turns(examples) else None)


def _turns(examples: Sequence[Example]) -> list[Tensor]:
    """Each example's turns; empty unless turns are independent."""
    return [example.turns for example in examples if example.turns is not None]
