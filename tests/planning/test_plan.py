"""`localign plan`: figures that follow from the method, and figures compared with real steps."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from planned_steps import planned, step, task

from localign.backbones import CATALOGUE
from localign.cli import main
from localign.gpus import GPUS
from localign.options.plan import PlanConfig
from localign.planning.counting import CountedAlignment
from localign.planning.plan import GIB, OCCUPIED, make_plan
from localign.planning.pretraining import PRETRAINING, pretraining_flops, pretraining_of
from localign.recipes import read_recipe, recipe_names

RECIPES = [name for name in recipe_names() if name.startswith("align/")]
LARGE = [name for name in RECIPES if "vit-l" in name or "so400m" in name]


def recipe(name: str, **options: Any) -> PlanConfig:
    values = read_recipe(name, "align").values
    return PlanConfig(**{**values, "betas": tuple(values["betas"]), **options})


@pytest.mark.slow
def test_three_masks_cost_as_published() -> None:
    plan = make_plan(recipe("align/clip-vit-b", gpus=4, gpu="A100"))
    assert plan.mask_cost == pytest.approx(1.66, abs=0.03)
    assert plan.steps == 61_523  # five epochs of 12.6 million images, 1,024 at a time
    assert plan.gpu_hours == pytest.approx(4 * plan.hours)
    assert plan.hours == pytest.approx(plan.images * plan.flops.total / (4 * 312e12 * 0.4) / 3600)
    assert plan.decode_cores == pytest.approx(plan.images_per_second / 400)


def test_operations_equal_a_count_by_hand() -> None:
    counted = CountedAlignment(planned(target="last"))
    tokens, width, masks = 197, 192, 3
    block = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    patches = 2 * 196 * 3 * 16 * 16 * width
    linear = 2 * tokens * width**2
    forward_student = patches + 3 * block + linear
    decoder = masks * (2 * block + linear)
    flops = counted.flops()
    assert flops.teacher == pytest.approx(masks * (patches + 3 * block), rel=1e-6)
    # The backward pass costs twice the forward pass, except for the pixels, which need no gradient.
    assert flops.student == pytest.approx(3 * (forward_student + decoder) - patches, rel=1e-6)


def test_gradient_checkpointing_costs_operations_and_saves_memory() -> None:
    stored, recomputed = (make_plan(planned(grad_checkpointing=on)) for on in (False, True))
    assert 1.1 < recomputed.flops.student / stored.flops.student < 1.4
    assert recomputed.memory.per_image < 0.6 * stored.memory.per_image
    assert recomputed.flops.teacher == stored.flops.teacher


def test_parameters_equal_those_of_the_run() -> None:
    plan, run = make_plan(planned(train_blocks=2)), task(train_blocks=2)
    summary = run.summary()
    assert plan.parameters["encoder"] + plan.parameters["decoder"] == summary["parameters"]
    assert plan.trained == summary["trainable_parameters"]
    assert plan.parameters["teacher"] == sum(p.numel() for p in run.teacher.parameters())
    assert plan.memory.moments == 8 * plan.trained
    assert plan.memory.gradients == 4 * plan.trained


@pytest.mark.slow
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="this system does not report peak memory"
)
def test_memory_matches_a_measured_step() -> None:
    images = 16
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("planned_steps.py")), str(images)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    measured = json.loads(done.stdout.splitlines()[-1])
    memory = make_plan(planned()).memory
    assert memory.fixed + images * memory.per_image == pytest.approx(measured, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [{"complement": False, "all_visible": False}, {"model_kwargs": {"depth": 6}}]
)
def test_time_grows_with_operations(change: dict[str, Any]) -> None:
    """The speed of one run predicts the time of another run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    tasks = {False: task(), True: task(**change)}
    for _ in range(4):
        for changed, chosen in tasks.items():
            seconds[changed].append(step(chosen, 4))
    torch.set_num_threads(threads)
    known, wanted = (make_plan(planned(**options)).flops.total for options in ({}, change))
    rate = known / min(seconds[False][1:])
    assert wanted / rate == pytest.approx(statistics.median_low(sorted(seconds[True])[:2]), rel=0.2)


def test_the_largest_micro_batch_fits_and_divides() -> None:
    config = recipe("align/clip-vit-b", gpus=4, gpu="A10", batch_size=192 * 4)
    plan = make_plan(config)
    assert plan.largest is not None
    room = OCCUPIED * GPUS["A10"].gib * GIB
    assert plan.memory.of(plan.largest) <= room
    larger = [n for n in range(plan.largest + 1, 193) if 192 % n == 0]
    assert all(plan.memory.of(n) > room for n in larger)
    assert larger  # in this case not everything fits


def test_bf16_takes_less_than_float32() -> None:
    low, full = (make_plan(planned(attention="auto", precision=p)) for p in ("bf16", "fp32"))
    assert low.memory.per_image < 0.75 * full.memory.per_image
    assert low.flops == full.flops
    assert low.images_per_second > 10 * full.images_per_second


@pytest.mark.parametrize("name", [n for n in RECIPES if n not in LARGE])
def test_recipes_can_be_counted(name: str) -> None:
    counted = CountedAlignment(recipe(name))
    assert 1e9 < counted.flops().total < 1e12


@pytest.mark.thorough
@pytest.mark.parametrize("name", LARGE)
def test_large_recipes_can_be_planned(name: str) -> None:
    plan = make_plan(recipe(name))
    assert plan.largest is not None
    assert 10 < plan.gpu_hours < 2000


@pytest.mark.slow
def test_the_command_prints_and_writes_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plans" / "plan.json"
    options = ["--config", "align/in1k-vit-t", "--gpus", "2", "--gpu", "a10", "--out", str(file)]
    assert main(["plan", *options]) == 0
    shown = capsys.readouterr().out
    assert "GPU-hours" in shown
    assert "--micro-batch" in shown
    written = json.loads(file.read_text())
    assert written["gpu_hours"] == pytest.approx(2 * written["hours"])
    assert set(written["parameters"]) == {"teacher", "encoder", "decoder"}
    sizes = {int(n): size for n, size in written["bytes_by_micro_batch"].items()}
    assert list(sizes) == sorted(sizes)
    assert list(sizes.values()) == sorted(sizes.values())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--gpu", "H10"], "unknown GPU 'H10'"),
        (["--gpus", "0"], "--gpus must be above 0, not 0"),
        (["--mfu", "40"], "--mfu is a share"),
        (["--data", "/somewhere"], "give --dataset-size"),
        (["--dataset-size", "-1"], "--dataset-size must be above 0"),
        (["--backbone", "clip-vit-bb"], "clip-vit-b"),
        (["--gpus", "7"], "does not divide"),
        (["--sharding", "full"], "leave --sharding at none"),
        (["--objective", "clipself", "--target", "cls"], "cannot be planned"),
        (["--config", "probe/coco"], "is for `localign probe`"),
    ],
)
def test_bad_input_is_one_line(options: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--backbone", "vit_tiny_patch16_224", "--data", "imagenet-1k", *options]
    assert main(["plan", *given]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


# -- pre-training ------------------------------------------------------------------------------------------


def test_every_backbone_of_the_catalogue_has_a_pre_training_with_its_source() -> None:
    assert PRETRAINING.keys() == CATALOGUE.keys()
    for name, known in PRETRAINING.items():
        assert known.source[-1] not in ".,"
        assert known.views > 0
        for images, side in known.stages:
            assert 1e8 < images < 1e11
            assert side in (224, 336)
        if CATALOGUE[name].loader == "timm":
            assert pretraining_of(CATALOGUE[name].timm_name) == known
    assert pretraining_of("vit_base_patch16_224") is None, "an architecture alone does not tell its weights"


def test_pre_training_is_counted_as_by_hand() -> None:
    tokens, width, depth = 197, 768, 12
    forward = depth * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width) + 2 * 196 * 768 * width
    assert pretraining_flops("clip-vit-b") == pytest.approx(3 * forward * 12.8e9, rel=1e-3)
    assert pretraining_flops("mae-vit-b") == pytest.approx(3 * forward * 0.25 * 1600 * 1_281_167, rel=1e-3)
    assert pretraining_flops("vit_tiny_patch16_224") is None


@pytest.mark.slow
def test_a_plan_prints_the_share_of_the_pre_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", "--config", "align/clip-vit-b", "--out", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    facts = json.loads(out.read_text())
    spent = facts["steps"] * 1024 * (facts["flops"]["teacher"] + facts["flops"]["student"])
    assert facts["pretraining_share"] == pytest.approx(spent / pretraining_flops("clip-vit-b"))
    assert f"share of the backbone's pre-training compute │ {facts['pretraining_share']:.2%}" in said
    assert "Radford et al. 2021: 400 M pairs, 32 epochs" in said


def test_the_share_is_unknown_without_a_known_pre_training() -> None:
    assert make_plan(planned()).pretraining_share is None
