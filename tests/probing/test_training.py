"""Heads trained together equal heads trained alone, also with several seeds; and training can fail."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from probing_toys import ALL, ALONE, CONFIG, GEOMETRY, in_memory, toy
from torch import Tensor

from localign.errors import RunFailure, UserError
from localign.probing import HeadSpec, ProbeConfig, TrainedHeads, evaluate_heads, train_heads
from localign.probing.training import SeededHead, learning_rate

SHORT = dataclasses.replace(CONFIG, steps=12, warmup_steps=2)


def trained(config: ProbeConfig = SHORT, specs: tuple[HeadSpec, ...] = ALL) -> list[TrainedHeads]:
    return train_heads(in_memory(*toy(50, 0)), specs, GEOMETRY, config, ALONE)


def same(a: TrainedHeads, b: TrainedHeads, spec: HeadSpec) -> bool:
    ours, theirs = a.heads[spec].state_dict(), b.heads[spec].state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def recalls(trained: TrainedHeads) -> dict[SeededHead, Any]:
    heads = {(trained.seed, spec): head for spec, head in trained.heads.items()}
    counts = evaluate_heads(heads, in_memory(*toy(100, 1)), CONFIG, ALONE)
    return {key: c.metrics["macro_recall"] for key, c in counts.items()}


def test_separable_features_are_read_and_shuffled_ones_are_not() -> None:
    features, labels = toy(200, 0)
    specs = (*ALL, HeadSpec("linear", "majority"))
    (one,) = train_heads(in_memory(features, labels), specs, GEOMETRY, CONFIG, ALONE)
    for key, recall in recalls(one).items():
        assert recall == pytest.approx(1.0, abs=1e-3), key
    mixed = features[torch.randperm(200, generator=torch.Generator().manual_seed(2))]
    (one,) = train_heads(in_memory(mixed, labels), specs, GEOMETRY, CONFIG, ALONE)
    assert all(recall < 0.5 for (_, spec), recall in recalls(one).items() if spec.task == "local")


def test_a_head_trained_alone_equals_the_head_trained_among_others() -> None:
    (together,) = trained()
    for spec in ALL:
        (alone,) = trained(specs=(spec,))
        assert same(alone, together, spec), spec


def test_seeds_trained_one_at_a_time_equal_seeds_trained_together() -> None:
    together = trained(dataclasses.replace(SHORT, seed=3, seeds=2))
    assert [one.seed for one in together] == [3, 4]
    for one in together:
        (alone,) = trained(dataclasses.replace(SHORT, seed=one.seed))
        assert alone.curve == one.curve
        assert all(same(alone, one, spec) for spec in ALL)
    assert not any(same(together[0], together[1], spec) for spec in ALL)


def test_nothing_global_decides_or_is_changed() -> None:
    (first,) = trained()
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    (again,) = trained()
    assert all(same(first, again, spec) for spec in ALL)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_curves_tell_training_and_validation_loss_every_hundred_steps() -> None:
    features = in_memory(*toy(60, 0))

    def train(validation: bool, images: int = 512) -> TrainedHeads:
        held_out = in_memory(*toy(30, 1)) if validation else None
        config = dataclasses.replace(CONFIG, curve_images=images)
        return train_heads(features, ALL[:2], GEOMETRY, config, ALONE, validation=held_out)[0]

    one = train(True)
    assert [point["step"] for point in one.curve] == [100, 120]
    points: Any = one.curve
    first, last = (point["linear"]["local"] for point in points)
    assert set(first) == {"train", "validation"}
    assert last["train"] < first["train"]
    without = train(False)
    points = without.curve
    assert "validation" not in points[0]["linear"]["local"]
    assert all(same(one, without, spec) for spec in ALL[:2])  # the validation changes nothing
    assert train(True, images=0).curve == without.curve


def test_learning_rate_warms_up_and_ends_on_the_final_rate() -> None:
    rates = [learning_rate(step, 1000, 500, 1e-3, 1e-4) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-6)
    assert rates[499] == pytest.approx(1e-3)
    assert rates[500] == pytest.approx(5.5e-4)
    assert rates[-1] == pytest.approx(1e-4, rel=1e-3)


def test_epochs_end_where_every_image_was_seen() -> None:
    config = ProbeConfig(epochs=3, batch=4)
    assert config.resolved(10) == (7, 0)
    assert config.epoch_ends(10) == {3: 1, 5: 2, 7: 3}  # 12, 20 and 28 of 30 images
    assert ProbeConfig(steps=2, batch=4).epoch_ends(10) == {2: 1}
    assert ProbeConfig(steps=6, batch=5).epoch_ends(10) == {2: 1, 4: 2, 6: 3}
    assert ProbeConfig(steps=2, batch=25).epoch_ends(10) == {1: 2, 2: 5}  # several epochs in a step


def test_each_epoch_is_announced_once() -> None:
    seen: list[tuple[int, int]] = []
    config = dataclasses.replace(SHORT, steps=None, warmup_steps=None, epochs=2.9)
    train_heads(
        in_memory(*toy(50, 0)), ALL[:1], GEOMETRY, config, ALONE,
        after_epoch=lambda epoch, heads: seen.append((epoch, len(heads))),
    )  # fmt: skip
    assert seen == [(1, 1), (2, 1), (3, 1)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": ("transfomer",)}, "unknown probing head 'transfomer'"),
        ({"tasks": ()}, "each once"),
        ({"cache_dtype": "int8"}, "unknown cache_dtype"),
        ({"cache": "ram"}, "unknown cache 'ram'; known: auto, none, disk, device"),
        ({"protocol": "best"}, "unknown protocol"),
        ({"precision": "fp16"}, "unknown precision"),
        ({"lr": 1e-5}, "final_lr <= lr"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"epochs": 0.0}, "at least one step"),
    ],
)
def test_misuse_is_refused_before_any_work(options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ProbeConfig(**options)  # type: ignore[arg-type]


def test_a_warm_up_as_long_as_the_training_is_refused() -> None:
    with pytest.raises(UserError, match="shorter than the training"):
        trained(ProbeConfig(steps=10, warmup_steps=10))


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    features, labels = toy(20, 0)
    features[3] = math.nan
    with pytest.raises(RunFailure, match="linear head"):
        train_heads(in_memory(features, labels), ALL[:1], GEOMETRY, SHORT, ALONE)


def test_batches_are_the_rows_asked_for_in_the_type_they_are_kept_in() -> None:
    tokens, labels = toy(20, 0)
    features = in_memory(tokens.bfloat16(), labels)
    rows = [features.rank_rows()[:3], features.rank_rows()[:0]]
    (some, targets), (none, _) = features.batches(rows)
    assert torch.equal(some, tokens[:3].bfloat16())
    assert none.shape == (0, 5, 16)

    def equal(a: Tensor, b: Tensor) -> bool:
        return a.dtype == b.dtype and torch.equal(a, b)

    assert equal(targets.patch, labels.patch[:3])
    assert equal(targets.image, labels.image[:3])
    assert equal(targets.majority, labels.majority[:3])
