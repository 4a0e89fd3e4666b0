"""Heads train until they have converged, say whether they have, and a difference of heads that have not is marked."""

from __future__ import annotations

import dataclasses
import json
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from probing_toys import ALL, ALONE, CONFIG, GEOMETRY, Colours, fake_backbone, in_memory, toy

from localign.cli import main
from localign.errors import UserError
from localign.options.probe import MAX_STEPS, ProbeCommandConfig
from localign.probing import HeadSpec, ProbeConfig, TrainedHeads, probe, train_heads
from localign.probing.training import held_out_rows
from localign.probing.training.schedule import HeadSchedule, check_steps, has_converged

UNTIL = dataclasses.replace(CONFIG, steps=None, until_converged=True, max_steps=4000, warmup_steps=None)
LINEAR = HeadSpec("linear", "local")


def falling(steps: int, loss: float, rate: float, floor: float) -> list[tuple[int, float]]:
    """A loss that falls exponentially to a floor."""
    return [(step, floor + (loss - floor) * np.exp(-rate * step)) for step in check_steps(steps)]


def trained(config: ProbeConfig, specs: tuple[HeadSpec, ...] = ALL[:4], images: int = 60) -> TrainedHeads:
    return train_heads(in_memory(*toy(images, 0)), specs, GEOMETRY, config, ALONE)[0]


def same(a: TrainedHeads, b: TrainedHeads, spec: HeadSpec) -> bool:
    ours, theirs = a.heads[spec].state_dict(), b.heads[spec].state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


# -- the rule --------------------------------------------------------------------------------------------


def test_a_head_has_converged_where_its_loss_no_longer_falls() -> None:
    assert not has_converged(falling(200, 0.7, 0.005, 0.1))
    assert has_converged(falling(2000, 0.7, 0.005, 0.1))
    assert not has_converged(falling(3, 0.7, 0.5, 0.1)), "too short to tell"
    assert not has_converged([(0, 0.7)])


def test_a_loss_that_approaches_zero_has_stopped_falling() -> None:
    curve = falling(2000, 0.7, 0.005, 0.0)
    assert curve[-1][1] < 1e-4
    assert has_converged(curve)


def test_a_rising_loss_is_a_head_that_has_learned_what_it_could() -> None:
    fall = falling(400, 0.7, 0.02, 0.1)
    assert has_converged([*fall, *((step, 0.1 + step / 4000) for step in range(425, 700, 25))])


def test_a_learning_rate_too_low_to_get_anywhere_is_not_convergence() -> None:
    """The loss falls by 1 % in the last quarter, but that is a quarter of its whole fall."""
    assert not has_converged([(step, 0.7 - 0.00007 * step) for step in check_steps(400)])


def test_the_loss_is_measured_rarely_in_a_long_training() -> None:
    assert check_steps(60) == [0, 25, 50, 60]
    steps = check_steps(MAX_STEPS)
    assert steps[-1] == MAX_STEPS
    assert len(steps) < 120
    assert all(b - a <= max(25, a / 20) for a, b in pairwise(steps))


def test_the_learning_rate_falls_once_the_head_has_converged() -> None:
    schedule = HeadSchedule(UNTIL, check_steps(4000), warmup_steps=10)
    for step, loss in falling(4000, 0.7, 0.02, 0.1):
        schedule.add(step, loss)
        if schedule.converged_at is not None:
            break
    start, end = schedule.converged_at, schedule.end
    assert start is not None
    assert start >= 200
    assert start < end <= start * 4 / 3 + 25
    rates = [schedule.learning_rate(step) for step in range(end + 1)]
    assert rates[0] == pytest.approx(UNTIL.lr / 10)
    assert rates[9 : start + 1] == pytest.approx([UNTIL.lr] * (start - 8))
    assert all(a >= b for a, b in pairwise(rates[start:]))
    assert rates[end] == pytest.approx(UNTIL.final_lr)


# -- training --------------------------------------------------------------------------------------------


def test_a_head_trained_to_its_plateau_has_converged_and_one_given_too_few_steps_has_not() -> None:
    steps: list[tuple[int, int]] = []
    (one,) = train_heads(
        in_memory(*toy(60, 0)), [LINEAR], GEOMETRY, UNTIL, ALONE,
        progress=lambda stage, done, total: steps.append((done, total)),
    )  # fmt: skip
    plateau = one.convergence["linear"]["local"]
    assert plateau["converged"] is True
    assert steps[0] == (1, 4000)
    assert steps[-1] == (plateau["steps"], plateau["steps"]), (
        "the bar knows the end once the head has converged"
    )
    assert 200 <= plateau["reported_step"] <= plateau["steps"] < 4000
    short = trained(dataclasses.replace(UNTIL, max_steps=30)).convergence["linear"]["local"]
    assert (short["converged"], short["steps"]) == (False, 30)


def test_the_verdict_on_a_fixed_length_comes_from_the_validation_curve() -> None:
    features, validation = in_memory(*toy(60, 0)), in_memory(*toy(30, 1))

    def verdict(steps: int, **options: Any) -> bool | None:
        config = dataclasses.replace(CONFIG, steps=steps, warmup_steps=2, **options)
        (one,) = train_heads(features, [LINEAR], GEOMETRY, config, ALONE, validation=validation)
        assert one.convergence["linear"]["local"]["steps"] == steps
        return one.convergence["linear"]["local"]["converged"]

    assert verdict(8) is False
    assert verdict(80) is False
    assert verdict(2000) is True
    assert verdict(80, curve_images=0) is None, "there is no curve"


def test_no_head_is_trained_on_an_image_that_is_held_out() -> None:
    """Held-out images with the wrong labels change when training ends, but not a weight on the way."""
    on, held_out = held_out_rows(60, UNTIL)
    assert sorted([*on, *held_out]) == list(range(60))
    assert len(held_out) == 12
    tokens, labels = toy(60, 0)
    wrong = tokens.clone()
    wrong[held_out] = wrong[held_out].flip(1)
    config = dataclasses.replace(UNTIL, max_steps=20)
    # All checks are before the 25th step, but the last: the weights are those of step 0 or 20.
    right = train_heads(in_memory(tokens, labels), [LINEAR], GEOMETRY, config, ALONE)[0]
    other = train_heads(in_memory(wrong, labels), [LINEAR], GEOMETRY, config, ALONE)[0]
    assert right.convergence["linear"]["local"]["reported_step"] == 20
    assert right.curve[0]["linear"]["local"]["train"] == other.curve[0]["linear"]["local"]["train"]  # type: ignore[index]
    assert right.curve[0]["linear"]["local"]["validation"] < other.curve[0]["linear"]["local"]["validation"]  # type: ignore[index]


def test_the_reported_weights_are_those_with_the_lowest_held_out_loss() -> None:
    features, labels = toy(60, 0)
    mixed = features[torch.randperm(60, generator=torch.Generator().manual_seed(2))]  # it can only overfit
    (one,) = train_heads(in_memory(mixed, labels), [HeadSpec("mlp", "local")], GEOMETRY, UNTIL, ALONE)
    verdict = one.convergence["mlp"]["local"]
    losses: dict[Any, Any] = {point["step"]: point["mlp"]["local"]["validation"] for point in one.curve}  # type: ignore[index]
    assert verdict["converged"] is True
    assert verdict["reported_step"] == min(losses, key=losses.__getitem__) < verdict["steps"] == max(losses)


@pytest.mark.slow
def test_a_head_that_trains_until_it_converges_does_not_depend_on_the_heads_beside_it() -> None:
    specs = ALL[:3]
    together = trained(dataclasses.replace(UNTIL, seeds=2), specs)
    ends = {spec: together.convergence[spec.label][spec.task]["steps"] for spec in specs}
    assert len(set(ends.values())) > 1, "the heads end at different steps"
    for spec in specs:
        alone = trained(UNTIL, (spec,))
        assert same(alone, together, spec), spec
        assert alone.convergence[spec.label][spec.task] == together.convergence[spec.label][spec.task]
        own = [point[spec.label][spec.task] for point in alone.curve]  # type: ignore[index]
        among = [p[spec.label][spec.task] for p in together.curve if spec.task in p.get(spec.label, {})]  # type: ignore[index,operator]
        assert own == among


def test_every_way_to_keep_features_gives_the_same_training(tmp_path: Path) -> None:
    outcomes = {}
    for cache in ("none", "disk", "device"):
        config = dataclasses.replace(
            UNTIL, heads=("linear",), cache=cache, cache_dtype="float32", max_steps=60, extract_batch=16
        )
        (outcomes[cache],) = probe(
            fake_backbone(), Colours(40, "train"), Colours(20, "val"), config, cache_folder=tmp_path
        )
    assert outcomes["none"]["train"] == outcomes["disk"]["train"] == outcomes["device"]["train"]
    assert outcomes["device"]["train"]["images"] == 40
    assert outcomes["device"]["train"]["held_out"] == 8
    assert outcomes["device"]["config"]["steps"] == 60


def test_too_few_images_to_hold_some_out_are_refused_before_work() -> None:
    backbone = fake_backbone()
    with pytest.raises(UserError, match="there are 4; give more images, or a fixed length"):
        probe(backbone, Colours(4, "train"), Colours(20, "val"), UNTIL)
    assert backbone.forwards == 0


# -- the command -----------------------------------------------------------------------------------------


def test_a_length_is_fixed_where_the_user_fixes_it() -> None:
    assert ProbeCommandConfig().probe_config().until_converged
    assert ProbeCommandConfig(max_steps=7).probe_config().max_steps == 7
    for options in ({"epochs": 5.0}, {"steps": 100}, {"protocol": "published"}):
        config = ProbeCommandConfig(**options)
        assert not config.probe_config().until_converged
        with pytest.raises(UserError, match="--max-steps has no effect with --"):
            dataclasses.replace(config, max_steps=9)
    assert not ProbeConfig().until_converged, "the published settings have a fixed length"


TINY = (
    "probe first=vit_tiny_patch16_224,second=vit_tiny_patch16_224 --weights none --model-kwargs img_size=24 "
    "patch_size=8 embed_dim=24 depth=1 num_heads=2 --train-scenes 40 --test-scenes 20 --batch-size 8 "
    "--heads [linear] --tasks [local] --device cpu"
)


@pytest.mark.parametrize(("options", "converged"), [("--max-steps 30", False), ("--lr 0.03", True)])
def test_a_difference_of_heads_that_have_not_converged_is_marked(
    options: str, converged: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(f"{TINY} {options} --out {tmp_path}")) == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    (difference,) = results["differences"]
    assert difference["converged"] is converged
    for outcomes in results["probe"].values():
        assert outcomes[0]["train"]["convergence"]["linear"]["local"]["converged"] is converged
    assert f"converged: {'yes' if converged else 'no'}" in shown
    assert ("(heads not" in shown) is not converged
    places = [(tmp_path / name).read_text() for name in ("report.html", "tables/comparison.md")]
    for text in places:
        assert ("(heads not converged)" in text) is not converged
        assert ("it tells how fast heads learn" in text) is not converged
    assert ("first: linear (local), second: linear (local)" in places[0]) is not converged
    assert "linear,local,0,test,fixed" in (tmp_path / "recalls.csv").read_text()
    assert any(
        "until it converges" in note and "8 held-out training images" in note for note in results["notes"]
    )
