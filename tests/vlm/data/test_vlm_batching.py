"""The records of a step depend on seed and step alone; ranks, micro-batches and packing only split them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vlm_data import IMAGE_TOKENS, mixed_data, record, tiny_encoder, write_json

from localign.data.stream import SampleStream
from localign.data.transforms import to_tensor
from localign.engine.task import BatchPlan
from localign.errors import UserError
from localign.vlm.data.batching import (
    VLMBatch,
    longest_batch,
    packed_row,
    padded_rows,
    planned_batches,
    record_stream,
)
from localign.vlm.data.prompts import IGNORE_INDEX
from localign.vlm.data.records import Conversations
from localign.vlm.data.sampling import (
    GroupedRecords,
    estimated_lengths,
    split_balanced,
    split_evenly,
    split_grouped,
)

ENCODER = tiny_encoder()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Conversations:
    return mixed_data(tmp_path_factory.mktemp("mixed"), count=13)


def plan(**options: Any) -> BatchPlan:
    settings = {"seed": 7, "global_batch": 8, "micro_batch": 8, "rank": 0, "world_size": 1, "workers": 0}
    return BatchPlan(**{**settings, "start_step": 0, "end_step": 2, "pin_memory": False, **options})


def batches(data: Conversations, *, kind: dict[str, bool] | None = None, **options: Any) -> list[VLMBatch]:
    return list(planned_batches(data, ENCODER, to_tensor, plan(**options), **(kind or {})))


def sequences(batch: VLMBatch) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each sequence without padding."""
    if batch.cu_seqlens is None:
        assert batch.attention_mask is not None
        lengths = batch.attention_mask.sum(dim=1).tolist()
        rows = zip(batch.input_ids, batch.labels, lengths, strict=True)
        return [(ids[:n].tolist(), labels[:n].tolist()) for ids, labels, n in rows]
    ends = batch.cu_seqlens.tolist()
    spans = pairwise(ends)
    return [(batch.input_ids[0, a:b].tolist(), batch.labels[0, a:b].tolist()) for a, b in spans]


def by_position(batches: Iterable[VLMBatch]) -> dict[int, tuple[Any, ...]]:
    """Position -> (record, ids, labels, the image's value or None); positions are distinct."""
    found: dict[int, tuple[Any, ...]] = {}
    for batch in batches:
        images = iter(batch.images)
        image_token = ENCODER.tokenizer.convert_tokens_to_ids("<image>")
        for position, index, (ids, labels) in zip(
            batch.positions.tolist(), batch.indices.tolist(), sequences(batch), strict=True
        ):
            assert position not in found
            shown = int(next(images)[0, 0, 0]) if image_token in ids else None
            found[position] = (index, ids, labels, shown)
        assert next(images, None) is None
    return found


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_ranks_micro_batches_and_packing_change_nothing(
    data: Conversations, packed: bool, grouped: bool, ranks: int, micro: int
) -> None:
    whole = by_position(batches(data, kind={"packed": False, "grouped": grouped}))
    assert sorted(whole) == list(range(16))
    split: list[VLMBatch] = []
    for rank in range(ranks):
        own = batches(
            data,
            kind={"packed": packed, "grouped": grouped},
            rank=rank,
            world_size=ranks,
            micro_batch=micro,
        )
        assert len(own) == 2 * 8 // ranks // micro
        steps = [set((batch.positions // 8).tolist()) for batch in own]
        assert steps == [{step} for step in range(2) for _ in range(8 // ranks // micro)]
        split += own
    assert by_position(split) == whole


def test_images_belong_to_their_records(data: Conversations) -> None:
    for index, ids, _, shown in by_position(batches(data)).values():
        assert shown == (None if index % 3 == 2 else index)
        text = ENCODER.tokenizer.decode(ids)
        assert f"r{index}" in text
        assert text.count("<image>") == (0 if shown is None else IMAGE_TOKENS)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_resuming_gives_the_batches_of_an_uninterrupted_run(
    data: Conversations, packed: bool, grouped: bool
) -> None:
    kind = {"packed": packed, "grouped": grouped}
    whole = batches(data, kind=kind, micro_batch=4, end_step=6)
    rest = batches(data, kind=kind, micro_batch=4, start_step=3, end_step=6)
    assert len(rest) == 6
    for one, other in zip(whole[6:], rest, strict=True):
        for name, value in one._asdict().items():
            same = torch.equal(value, getattr(other, name)) if isinstance(value, torch.Tensor) else True
            assert same, name


def test_workers_change_nothing(data: Conversations) -> None:
    alone, helped = batches(data, micro_batch=4), batches(data, micro_batch=4, workers=2)
    assert by_position(alone) == by_position(helped)
    assert [b.positions.tolist() for b in alone] == [b.positions.tolist() for b in helped]


def test_every_record_comes_once_per_epoch(data: Conversations) -> None:
    found = by_position(batches(data, global_batch=13, micro_batch=13, end_step=2))
    first, second = ([found[i + 13 * epoch][0] for i in range(13)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(13))
    assert first != second
    stream = SampleStream(7, 13)
    assert first == [stream(i)[1] for i in range(13)]
    unshuffled = batches(data, kind={"shuffle": False, "packed": False}, end_step=2)
    assert [b.indices.tolist() for b in unshuffled] == [list(range(8)), [8, 9, 10, 11, 12, 0, 1, 2]]


def test_a_packed_row(data: Conversations) -> None:
    for batch in batches(data, micro_batch=4):
        assert batch.attention_mask is None
        assert batch.cu_seqlens is not None
        assert batch.cu_seqlens.dtype == torch.int32
        assert (
            batch.input_ids.shape
            == batch.labels.shape
            == batch.position_ids.shape
            == (1, batch.cu_seqlens[-1])
        )
        assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
        assert len(batch.cu_seqlens) == len(batch.positions) + 1
        ends = batch.cu_seqlens.tolist()
        for begin, end in pairwise(ends):
            assert batch.position_ids[0, begin:end].tolist() == list(range(end - begin))
            assert batch.labels[0, begin] == IGNORE_INDEX  # no sequence predicts the start of the next
            assert batch.input_ids[0, begin] == ENCODER.tokenizer.bos_token_id
        assert batch.images.dtype == torch.uint8
        assert batch.images.ndim == 4
        assert batch.positions.tolist() == sorted(batch.positions.tolist())


def test_packed_and_padded_rows_of_two_sequences(data: Conversations) -> None:
    short, long = sorted((ENCODER(data.record(i)) for i in (2, 3)), key=lambda e: len(e.input_ids))
    a, b = len(short.input_ids), len(long.input_ids)
    packed, padded = packed_row([short, long]), padded_rows([short, long], 3)
    assert packed.cu_seqlens is not None
    assert packed.cu_seqlens.tolist() == [0, a, a + b]
    assert packed.input_ids[0].tolist() == [*short.input_ids.tolist(), *long.input_ids.tolist()]
    assert padded.input_ids[0].tolist() == [*short.input_ids.tolist(), *[3] * (b - a)]
    assert padded.labels[0].tolist() == [*short.labels.tolist(), *[IGNORE_INDEX] * (b - a)]
    assert padded.attention_mask is not None
    assert padded.attention_mask.tolist() == [[1] * a + [0] * (b - a), [1] * b]
    assert padded.position_ids.tolist() == [[*range(a), *[0] * (b - a)], [*range(b)]]
    assert packed.turns is padded.turns is None


def test_bins_are_balanced() -> None:
    assert [bin.tolist() for bin in split_balanced([9, 1, 5, 4, 1], 2)] == [[0, 1], [2, 3, 4]]
    lengths = np.random.default_rng(0).integers(20, 2000, 128)
    bins = split_balanced(lengths, 16)
    assert sorted(np.concatenate(bins).tolist()) == list(range(128))
    sums = [int(lengths[bin].sum()) for bin in bins]
    assert max(sums) <= 1.02 * lengths.sum() / 16
    unbalanced = [int(lengths[bin].sum()) for bin in split_evenly(128, 16)]
    assert max(unbalanced) > 1.2 * lengths.sum() / 16
    assert [len(bin) for bin in split_balanced([5000, 1, 1, 1], 4)] == [1, 1, 1, 1]


def test_lengths_are_estimated_well(tmp_path: Path) -> None:
    numbers = np.random.default_rng(1).integers(1, 60, 400)
    entries = [record(int(n) % 10, words=int(n), turns=1 + int(n) % 3) for n in numbers]
    data = Conversations.open([write_json(tmp_path / "data.json", entries)])
    estimated = estimated_lengths(data, ENCODER)
    exact = np.array([min(400, ENCODER.length(data.record(i))) for i in range(len(data))])
    assert np.abs(estimated / exact - 1).mean() < 0.1
    assert estimated.max() == 400
    assert estimated.dtype == np.int64


# The published sampler in a case small enough to follow: eight records, all with images.


def test_the_published_split_by_hand() -> None:
    split = split_grouped([9, 7, 5, 5, 4, 3, 2, 1], ranks=2, bins_per_rank=1)
    # 9 | 7, then 5 to the second (7 < 9), 5 to the first (9 < 12), 4 to the second (12 < 14), 3 to the first
    # (14 < 16), 2 to the second (16 < 17), which is then full, and 1 to the first.
    assert [bin.tolist() for bin in split] == [[0, 3, 5, 7], [1, 2, 4, 6]]
    cut = split_grouped([9, 7, 5, 5, 4, 3, 2, 1], ranks=2, bins_per_rank=2)
    assert [bin.tolist() for bin in cut] == [[0, 3], [5, 7], [1, 2], [4, 6]]


def test_the_published_sampler_by_hand() -> None:
    words, batch = np.array([3, 1, 4, 1, 5, 9, 2, 6]), 8
    stream = GroupedRecords(7, words, np.ones(8, bool), batch)
    assert stream.samples_per_epoch == 8
    for epoch in range(3):
        permutation = torch.randperm(8, generator=torch.Generator().manual_seed(7 + epoch)).tolist()
        expected = sorted(permutation, key=lambda i: -words[i])
        assert stream.indices(epoch).tolist() == expected
        ones = [i for i in permutation if words[i] == 1]
        assert stream.indices(epoch).tolist() == [
            5,
            7,
            4,
            2,
            0,
            6,
            *ones,
        ]  # equally long: in the random order


def published_epoch(words: list[int], has_image: list[bool], batch: int, seed: int) -> list[list[int]]:
    """The steps of an epoch by the published rules, one record at a time."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for kind in (True, False):
        own = [i for i, image in enumerate(has_image) if image == kind]
        order = [own[i] for i in torch.randperm(len(own), generator=generator)]
        chunks = [order[i : i + batch] for i in range(0, len(order), batch)]
        if chunks:
            chunks[-1] = chunks[-1] + chunks[0][: batch - len(chunks[-1])]
        steps += [sorted(chunk, key=lambda i: words[i], reverse=True) for chunk in chunks]
    steps = [steps[i] for i in torch.randperm(len(steps), generator=generator)]
    longest = [max(words[i] + 576 * has_image[i] for i in step) for step in steps]
    first = longest.index(max(longest))
    steps[0], steps[first] = steps[first], steps[0]
    return steps


def test_grouped_steps_follow_the_published_rules() -> None:
    draw = np.random.default_rng(3)
    words, has_image = draw.integers(1, 30, 100), draw.random(100) < 0.7
    stream = GroupedRecords(5, words, has_image, 16)
    per_epoch = stream.samples_per_epoch // 16
    for epoch in range(2):
        expected = published_epoch(words.tolist(), has_image.tolist(), 16, 5 + epoch)
        assert [stream.indices(epoch * per_epoch + i).tolist() for i in range(per_epoch)] == expected
        assert {i for step in expected for i in step} == set(range(100))
    assert all(len(set(has_image[stream.indices(step)])) == 1 for step in range(per_epoch))


def test_where_the_published_sampler_fails(data: Conversations) -> None:
    """Text-only data; a modality with less than half a batch; the length of an epoch."""
    words = np.arange(1, 13)
    text = GroupedRecords(0, words, np.zeros(12, bool), 8)
    assert text.samples_per_epoch == 16
    assert set(text.indices(0)) | set(text.indices(1)) == set(range(12))
    few = GroupedRecords(0, words, words == 4, 8)
    alone = next(step for step in (few.indices(s) for s in range(3)) if 3 in step)
    assert alone.tolist() == [3] * 8
    halves = GroupedRecords(0, np.arange(24), np.arange(24) < 12, 8)
    assert halves.samples_per_epoch == 32
    assert record_stream(data, plan(), grouped=True).samples_per_epoch == 24
    assert record_stream(data, plan()).samples_per_epoch == 13


def test_unusable_records_are_replaced_and_named(tmp_path: Path) -> None:
    data = mixed_data(tmp_path, count=30, broken=(3, 4))
    kinds = [{"packed": True}, {"packed": False}]
    runs = [
        list(planned_batches(data, ENCODER, to_tensor, plan(global_batch=30, micro_batch=m, end_step=1), **kind,
                             max_bad_share=0.2))
        for kind, m in zip(kinds, (15, 30), strict=True)
    ]  # fmt: skip
    found, other = map(by_position, runs)
    assert found == other
    assert not {3, 4} & {entry[0] for entry in found.values()}
    assert {name for batch in runs[0] for name, _ in batch.bad} == {"images/3.png", "images/4.png"}
    stream = SampleStream(7, 30)
    changed = [i for i, entry in found.items() if entry[0] != stream(i)[1]]
    assert sorted(stream(i)[1] for i in changed) == [3, 4]
    with pytest.raises(UserError, match=r"1 of 30 images are unreadable .*images/[34].png"):
        list(planned_batches(data, ENCODER, to_tensor, plan(global_batch=30, micro_batch=1, end_step=1)))


def test_records_cut_before_their_answers_are_replaced(tmp_path: Path) -> None:
    entries = [record(i) for i in range(9)]
    entries[5]["conversations"][0]["value"] = "long " * 20
    data = Conversations.open([write_json(tmp_path / "data.json", entries)])
    short = tiny_encoder(max_length=60)
    (batch,) = planned_batches(
        data, short, to_tensor, plan(global_batch=9, micro_batch=9, end_step=1), max_bad_share=0.2
    )
    ((name, reason),) = batch.bad
    assert name.endswith("record 6 (id 'r5')")
    assert reason == "no answer begins within 60 tokens"
    assert 5 not in batch.indices
    useless = Conversations.open([write_json(tmp_path / "none.json", [entries[5]] * 2)])
    with pytest.raises(UserError, match="no usable record for position 0 in 100 draws"):
        list(planned_batches(useless, short, to_tensor, plan(end_step=1), max_bad_share=1.0))


def test_text_only_records_have_no_images(tmp_path: Path) -> None:
    data = Conversations.open([write_json(tmp_path / "data.json", [record(i) for i in range(4)])])
    (batch,) = batches(data, end_step=1)
    assert len(batch.images) == 0


@pytest.mark.parametrize(
    ("options", "kind", "reason"),
    [
        ({"micro_batch": 3}, {}, "does not divide"),
        ({"rank": 1}, {}, "rank 1 does not exist"),
        ({}, {"grouped": True, "shuffle": False}, "grouped batches are shuffled"),
    ],
)
def test_contradictions(data: Conversations, options: Any, kind: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        planned_batches(data, ENCODER, to_tensor, plan(**options), **kind)


def test_the_heaviest_balanced_micro_batch_is_not_one_of_the_longest_records(tmp_path: Path) -> None:
    entries = [record(n, words=60 if n % 8 == 0 else 1 + n % 3) for n in range(64)]
    data = Conversations.open([write_json(tmp_path / "data.json", entries)])
    run = plan(global_batch=16, micro_batch=4, end_step=4)

    def tokens(batch: VLMBatch) -> int:
        return int(batch.input_ids.shape[1])

    actual = max(tokens(b) for b in planned_batches(data, ENCODER, to_tensor, run))
    stacked = longest_batch(data, ENCODER, to_tensor, 4, packed=True)
    sized = longest_batch(data, ENCODER, to_tensor, 4, packed=True, plan=run)
    assert tokens(stacked) > 1.5 * actual, "the longest four never come together"
    assert 0.95 * actual < tokens(sized) < 1.5 * actual
    assert len(sized.positions) == 4
