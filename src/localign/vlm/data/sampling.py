"""Which records make up a step, and how a step is split into ranks and micro-batches.

The records of a step depend on seed and step alone. The split decides which rank computes what and where padding
goes, but not the step's loss, which is a sum over labelled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from localign.data.stream import SampleStream
from localign.errors import UserError
from localign.vlm.data.examples import ConversationTokenizer
from localign.vlm.data.records import Conversations

Integers = NDArray[np.int64]

PUBLISHED_IMAGE_WORDS = 24 * 24
"""Words that the published sampler counts for an image, for any model, to find the longest record."""

_TOKENISED_RECORDS = 256
"""Records that are tokenised to estimate the tokens per character."""
_SURVEYED_STEPS, _SPLIT_STEPS = 512, 16
"""Steps whose totals are compared to find the heaviest micro-batch, and how many of them are split to find it."""
_TURN_CHARACTERS = 12
"""Characters that a prompt format adds to a turn, roughly."""


class RecordStream(Protocol):
    """The records of each step."""

    samples_per_epoch: int

    def indices(self, step: int) -> Integers:
        """int64 ``(batch,)``, the record at each global position of a step."""


class ShuffledRecords:
    """Every record once per epoch, in a new order each time; a step may span two epochs.

    Args:
        seed: The run's seed.
        records: Number of records.
        batch: Records per step.
        shuffle: False keeps the records in order.
    """

    def __init__(self, seed: int, records: int, batch: int, shuffle: bool = True) -> None:
        self.samples_per_epoch = records
        self._stream, self._batch = SampleStream(seed, records, shuffle), batch

    def indices(self, step: int) -> Integers:
        return self._stream.indices(step * self._batch, (step + 1) * self._batch)


class GroupedRecords:
    """The published sampler: each step has only records with images, or only records without.

    The records of each modality are shuffled and cut into steps, the last of which is filled from the beginning of
    the order; within a step the longest records come first. The steps of both modalities are shuffled together,
    then the step with the longest record is moved to the front.

    It fixes three defects of the published sampler without changing its order elsewhere: data without images is
    accepted, a modality with less than half a batch repeats as often as needed, and the length of an epoch counts
    the actual steps, so that the schedule ends with the data.

    Args:
        seed: The run's seed; seed + epoch seeds torch's generator, as in the published code.
        words: int ``(records,)``, words of each record.
        has_image: bool ``(records,)``.
        batch: Records per step.
    """

    def __init__(
        self, seed: int, words: NDArray[np.integer], has_image: NDArray[np.bool_], batch: int
    ) -> None:
        if not len(words):
            raise UserError("a data set without records gives no batches")
        self._seed, self._words, self._batch = seed, words.astype(np.int64), batch
        self._modalities = [np.flatnonzero(has_image), np.flatnonzero(~has_image)]
        self._lengths = self._words + PUBLISHED_IMAGE_WORDS * has_image
        self._steps = sum(-(-len(indices) // batch) for indices in self._modalities)
        self.samples_per_epoch = self._steps * batch
        self._epoch = -1
        self._order: Integers = np.empty((0, batch), np.int64)

    def indices(self, step: int) -> Integers:
        epoch, step_in_epoch = divmod(step, self._steps)
        if epoch != self._epoch:
            self._order, self._epoch = self._epoch_order(epoch), epoch
        indices: Integers = self._order[step_in_epoch]
        return indices

    def _epoch_order(self, epoch: int) -> Integers:
        """int64 ``(steps, batch)``."""
        generator = torch.Generator().manual_seed(self._seed + epoch)
        orders = [
            indices[torch.randperm(len(indices), generator=generator).numpy()] for indices in self._modalities
        ]
        steps: Integers = np.concatenate([self._cut(order) for order in orders])
        steps = steps[torch.randperm(len(steps), generator=generator).numpy()]
        longest = int(self._lengths[steps].max(axis=1).argmax())
        steps[[0, longest]] = steps[[longest, 0]]
        return steps

    def _cut(self, order: Integers) -> Integers:
        steps = np.resize(order, (-(-len(order) // self._batch), self._batch)) if len(order) else order
        steps = steps.reshape(-1, self._batch)
        by_length = np.argsort(-self._words[steps], axis=1, kind="stable")
        return np.take_along_axis(steps, by_length, axis=1)


def split_evenly(records: int, bins: int) -> list[Integers]:
    """Split a step into bins of equally many consecutive records.

    Returns:
        For each bin the offsets of its records in the step, int64 ``(records / bins,)``.
    """
    return list(np.arange(records).reshape(bins, -1))


def split_balanced(lengths: Sequence[int] | NDArray[np.integer], bins: int) -> list[Integers]:
    """Split a step into bins of similar total length: longest record first, each into the shortest bin.

    Args:
        lengths: ``(records,)``, all positive.
        bins: Ranks times micro-batches, at most as many as records.

    Returns:
        For each bin the offsets of its records in the step, int64, ascending; no bin is empty.
    """
    totals, split = [0] * bins, [[] for _ in range(bins)]  # type: list[int], list[list[int]]
    for offset in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        shortest = totals.index(min(totals))
        totals[shortest] += int(lengths[offset])
        split[shortest].append(offset)
    return [np.array(sorted(offsets), dtype=np.int64) for offsets in split]


def split_grouped(
    words: Sequence[int] | NDArray[np.integer], ranks: int, bins_per_rank: int
) -> list[Integers]:
    """The published split of a step whose longest records come first.

    Each record goes to the rank with the fewest words among those that are not full; a rank's records are cut into
    micro-batches in that order.

    Returns:
        For each bin the offsets of its records in the step, int64; bins of a rank are consecutive.
    """
    per_rank = len(words) // ranks
    totals, split = [0.0] * ranks, [[] for _ in range(ranks)]  # type: list[float], list[list[int]]
    for offset, length in enumerate(words):
        shortest = totals.index(min(totals))
        totals[shortest] += float(length)
        split[shortest].append(offset)
        if len(split[shortest]) == per_rank:
            totals[shortest] = float("inf")
    return list(np.array(split, dtype=np.int64).reshape(ranks * bins_per_rank, -1))


def heaviest_tokens(lengths: Integers, stream: RecordStream, batch: int, samples: int) -> int:
    """Tokens of the heaviest of a run's balanced micro-batches, by estimated lengths, in its first steps.

    Args:
        lengths: int64 ``(records,)``, tokens of each record.
        stream: The records of each step.
        batch: Records per step, over all ranks.
        samples: Records per micro-batch, on average.
    """
    steps = min(_SURVEYED_STEPS, -(-stream.samples_per_epoch // batch))
    tokens = [lengths[stream.indices(step)] for step in range(steps)]
    heaviest = sorted(tokens, key=lambda step: -int(step.sum()))[:_SPLIT_STEPS]
    bins = max(1, batch // samples)
    return max(int(step[part].sum()) for step in heaviest for part in split_balanced(step, bins))


def estimated_lengths(data: Conversations, encoder: ConversationTokenizer) -> Integers:
    """Estimated tokens of each record: its characters times the tokens per character of a sample of records.

    Images of several sizes count as the largest: most fill the budget of patches, and no image is opened. It computes
    in integers, so that all ranks get the same result.

    Returns:
        int64 ``(records,)``, positive.
    """
    sizes = data.characters.astype(np.int64) + _TURN_CHARACTERS * data.turns
    sample = np.unique(np.linspace(0, len(data) - 1, min(_TOKENISED_RECORDS, len(data))).astype(np.int64))
    image_tokens = encoder.num_image_tokens * data.has_image
    tokens = sum(encoder.length(data.record(int(i))) for i in sample) - int(image_tokens[sample].sum())
    lengths: Integers = 1 + image_tokens + sizes * tokens // int(sizes[sample].sum())
    limits = np.where(data.has_image, encoder.limit(True), encoder.limit(False))
    return np.minimum(lengths, limits)
