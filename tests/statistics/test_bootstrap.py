"""Intervals over images: equal to a loop that draws, paired, and of the right width."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from localign.statistics import bootstrap
from localign.statistics.bootstrap import macro_recalls, percentile_interval, replicate_weights


def counts(images: int, classes: int, recall: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = np.random.default_rng(seed)
    positives = draw.integers(0, 9, (images, classes))
    return torch.from_numpy(draw.binomial(positives, recall)), torch.from_numpy(positives)


def test_a_replicate_draws_as_many_images_as_there_are() -> None:
    weights = replicate_weights(50, 0, 30)
    assert torch.equal(weights.sum(1), torch.full((30,), 50.0))
    assert weights.mean(0).std() < 0.3
    assert len(set(map(tuple, weights.tolist()))) == 30


def test_equal_to_drawing_image_by_image() -> None:
    hits, positives = counts(40, 3, 0.6)
    positives[:, 2] = 0
    positives[0, 2] = 4  # a class that many replicates do not have
    hits[:, 2] = torch.minimum(hits[:, 2], positives[:, 2])
    (ours,) = macro_recalls([(hits, positives)], replicates=20)
    for replicate, value in enumerate(ours):
        drawn = replicate_weights(40, replicate, replicate + 1)[0].long()
        rows = torch.repeat_interleave(torch.arange(40), drawn)
        recalls = [float(hits[rows, c].sum() / n) for c in range(3) if (n := positives[rows, c].sum()) > 0]
        assert float(value) == pytest.approx(sum(recalls) / len(recalls), abs=1e-6)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = [counts(40, 3, 0.6), counts(40, 5, 0.4, seed=1)]
    whole = macro_recalls(heads, replicates=50)
    monkeypatch.setattr(bootstrap, "CHUNK_BYTES", 7 * 4 * 40)
    for ours, theirs in zip(macro_recalls(heads, replicates=50), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_interval_of_one_class_is_that_of_a_proportion() -> None:
    draw = np.random.default_rng(0)
    hits = torch.from_numpy(draw.binomial(1, 0.7, (2000, 1)))
    (recalls,) = macro_recalls([(hits, torch.ones_like(hits))])
    low, high = percentile_interval(recalls) or [math.nan, math.nan]
    share = float(hits.double().mean())
    half = 1.96 * math.sqrt(share * (1 - share) / 2000)
    assert (low, high) == pytest.approx((share - half, share + half), abs=0.004)


def test_differences_are_paired() -> None:
    hits, positives = counts(300, 4, 0.5)
    better = torch.minimum(hits + 1, positives)
    first, second = macro_recalls([(hits, positives), (better, positives)])
    apart, _ = macro_recalls([(better, positives)])[0], None
    assert torch.equal(second, apart)  # alone or beside others: the draws are the same
    widths = [
        high - low for low, high in filter(None, map(percentile_interval, (first, second, second - first)))
    ]
    assert widths[2] < 0.7 * min(widths[:2])


def test_no_positive_is_no_interval() -> None:
    nothing = torch.zeros(5, 2, dtype=torch.int32)
    (recalls,) = macro_recalls([(nothing, nothing)], replicates=8)
    assert recalls.isnan().all()
    assert percentile_interval(recalls) is None
    assert macro_recalls([]) == []
