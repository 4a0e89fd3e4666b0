"""Which records make a step, and how they are dealt to ranks and micro-batches.

The records of a step are a function of seed and step alone. Dealing them out changes who computes what, and
where padding goes, but not the step's loss, which is a sum over labelled tokens.
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
"""What the published sampler takes an image for when it looks for the longest record, whatever the model."""

_MEASURED = 256
_TURN_CHARACTERS = 12  # the words of a prompt format around a question, roughly


class RecordStream(Protocol):
    """Which records a step holds."""

    samples_per_epoch: int

    def indices(self, step: int) -> Integers:
        """int64 ``(batch,)``, the record at each global position of a step."""


class ShuffledRecords:
    """Every record once per epoch, in a new order each time; steps do not heed where an epoch ends.

    Args:
        seed: The run's.
        records: How many there are.
        batch: Records per step.
        shuffle: False keeps their own order.
    """

    def __init__(self, seed: int, records: int, batch: int, shuffle: bool = True) -> None:
        self.samples_per_epoch = records
        self._stream, self._batch = SampleStream(seed, records, shuffle), batch

    def indices(self, step: int) -> Integers:
        return self._stream.indices(step * self._batch, (step + 1) * self._batch)


class GroupedRecords:
    """The published sampler: every step holds records with images only, or without only.

    Of each modality a random order is cut into steps, the last filled up with the order's beginning; within a
    step the longest come first. The steps of both come in a random order, the one with the longest record first.

    Three defects of the published sampler are mended, which changes nothing where it worked: data without images
    are taken, a modality of less than half a batch repeats its order as often as it must, and the length of an epoch
    counts the steps there are, so that the schedule ends with the data.

    Args:
        seed: The run's; with the epoch it seeds torch's generator, as published.
        words: int ``(records,)``.
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
        epoch, within = divmod(step, self._steps)
        if epoch != self._epoch:
            self._order, self._epoch = self._steps_of(epoch), epoch
        return self._order[within]

    def _steps_of(self, epoch: int) -> Integers:
        """int64 ``(steps, batch)``."""
        generator = torch.Generator().manual_seed(self._seed + epoch)
        orders = [
            indices[torch.randperm(len(indices), generator=generator).numpy()] for indices in self._modalities
        ]
        steps = np.concatenate([self._cut(order) for order in orders])
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
    """Consecutive places of a step, equally many for each bin."""
    return list(np.arange(records).reshape(bins, -1))


def split_balanced(lengths: Sequence[int] | NDArray[np.integer], bins: int) -> list[Integers]:
    """The places of a step for bins of like summed length: the longest first, each into the emptiest bin.

    Args:
        lengths: ``(records,)``, each above 0.
        bins: Ranks times micro-batches, at most as many as records.

    Returns:
        One int64 ``(some,)`` for each bin, none empty, in the order of their places.
    """
    sums, dealt = [0] * bins, [[] for _ in range(bins)]  # type: list[int], list[list[int]]
    for place in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        emptiest = sums.index(min(sums))
        sums[emptiest] += int(lengths[place])
        dealt[emptiest].append(place)
    return [np.array(sorted(places), dtype=np.int64) for places in dealt]


def split_grouped(
    words: Sequence[int] | NDArray[np.integer], ranks: int, bins_per_rank: int
) -> list[Integers]:
    """The published dealing of a step whose longest records come first.

    Each record goes to the rank with the fewest words that is not full yet; a rank's records are cut into
    micro-batches in that order.
    """
    per_rank = len(words) // ranks
    sums, dealt = [0.0] * ranks, [[] for _ in range(ranks)]  # type: list[float], list[list[int]]
    for place, length in enumerate(words):
        fewest = sums.index(min(sums))
        sums[fewest] += float(length)
        dealt[fewest].append(place)
        if len(dealt[fewest]) == per_rank:
            sums[fewest] = float("inf")
    return list(np.array(dealt, dtype=np.int64).reshape(ranks * bins_per_rank, -1))


def estimated_lengths(data: Conversations, encoder: ConversationTokenizer) -> Integers:
    """Tokens of each record, roughly: by its characters, with the ratio of some records that are tokenised.

    In whole numbers, for every rank must come to the very same.

    Returns:
        int64 ``(records,)``, above 0.
    """
    sizes = data.characters.astype(np.int64) + _TURN_CHARACTERS * data.turns
    chosen = np.unique(np.linspace(0, len(data) - 1, min(_MEASURED, len(data))).astype(np.int64))
    image_tokens = encoder.num_image_tokens * data.has_image
    tokens = sum(encoder.length(data.record(int(i))) for i in chosen) - int(image_tokens[chosen].sum())
    lengths = 1 + image_tokens + sizes * tokens // int(sizes[chosen].sum())
    limits = np.where(data.has_image, encoder.limit(True), encoder.limit(False))
    return np.minimum(lengths, limits)
