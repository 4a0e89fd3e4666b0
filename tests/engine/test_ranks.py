"""Results depend neither on the number of ranks nor on the micro-batch size."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from engine_runs import logged, make_images, max_difference, run, tiny, weights
from rank_forks import on_ranks

from localign.engine.log import read_log
from localign.engine.run_folder import read_results

TOLERANCE = 1e-5
STEPS = 8
EPS = 1e-5
"""Some gradients are zero up to rounding, such as those of attention's key biases, and Adam makes full steps of them.
This eps is larger than the rounding. With 1e-8, weights differ by 3e-5."""


def equal(a: Path, b: Path) -> None:
    """Weights, averages and losses agree within the tolerance, samples exactly."""
    assert logged(a, "samples") == logged(b, "samples")
    for file in ("model.safetensors", "ema.safetensors"):
        assert max_difference(weights(a, STEPS, file), weights(b, STEPS, file)) < TOLERANCE, file
    for field in ("loss", "val_loss", "grad_norm"):
        ours, theirs = logged(a, field), logged(b, field)
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), field


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("loss_tokens", ["all", "hidden"])
def test_accumulated_gradients_equal_those_of_the_full_batch(
    tmp_path: Path, images: Path, val: Path, micro_batch: int, loss_tokens: str
) -> None:
    # Without complements, micro-batches differ in their number of hidden tokens, so a mean of means would be wrong.
    values: dict[str, Any] = {"loss_tokens": loss_tokens, "ema_decay": 0.9, "val": str(val), "eps": EPS}
    values["complement"] = loss_tokens == "all"
    run(tiny(tmp_path / "full", images, **values))
    run(tiny(tmp_path / "pieces", images, micro_batch=micro_batch, **values))
    equal(tmp_path / "full", tmp_path / "pieces")


@pytest.mark.parametrize(
    ("ranks", "loss_tokens", "micro_batch", "more"),
    [
        (2, "all", None, {}),
        (2, "hidden", None, {"ddp_bucket_mb": 0.01}),
        (2, "hidden", 2, {}),
        (4, "all", None, {"ddp_bucket_mb": 0.01}),
        (4, "hidden", 1, {}),
    ],
)
def test_several_ranks_equal_one(
    tmp_path: Path, images: Path, val: Path, ranks: int, loss_tokens: str, micro_batch: int | None,
    more: dict[str, Any],
) -> None:  # fmt: skip
    # Without complements, ranks differ in their number of hidden tokens, so a mean of means would be wrong.
    values: dict[str, Any] = {
        "loss_tokens": loss_tokens, "complement": loss_tokens == "all", "ema_decay": 0.9, "val": str(val),
        "val_every": 3, "eps": EPS,
    }  # fmt: skip
    run(tiny(tmp_path / "one", images, **values))
    end = on_ranks(ranks, run, tiny(tmp_path / "several", images, micro_batch=micro_batch, **values, **more))
    assert end.codes == [0] * ranks, end.output
    equal(tmp_path / "one", tmp_path / "several")
    one, several = read_results(tmp_path / "one"), read_results(tmp_path / "several")
    assert (one["world_size"], several["world_size"]) == (1, ranks)
    assert (one["micro_batch"], several["micro_batch"]) == (8, micro_batch or 8 // ranks)
    assert one["best"]["step"] == several["best"]["step"]
    assert one["target_scale"] == several["target_scale"]


def test_two_ranks_skip_a_step_with_one_bad_loss_and_report_all_bad_images(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    make_images(folder, 24, truncated=(3, 17))
    config = tiny(tmp_path / "two", folder, batch_size=8, steps=6, max_bad_share=0.1)
    # The loss is NaN on rank 0 only.
    end = on_ranks(2, run, config, poison=(2,))
    assert end.codes == [0, 0], end.output
    results = read_results(tmp_path / "two")
    assert results["skipped_steps"] == [3]
    assert sorted(results["skipped_images"]["images"]) == ["0003.png", "0017.png"]
    assert sorted(e["skipped_image"] for e in read_log(tmp_path / "two") if "skipped_image" in e) == [
        "0003.png",
        "0017.png",
    ]
    assert len(list((tmp_path / "two" / "nonfinite").iterdir())) == 2, "both ranks save their batches"


def test_a_refusal_ends_every_rank(tmp_path: Path, images: Path) -> None:
    end = on_ranks(2, run, tiny(tmp_path / "none", images, resume="must"))
    assert end.codes == [2, 2], end.output
    assert end.output.count("nothing to resume") == 1


@pytest.mark.slow
def test_compiled_equals_uncompiled(tmp_path: Path, images: Path) -> None:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("torch.compile on a CPU needs a C++ compiler")
    for name in ("plain", "compiled"):
        on = name == "compiled"
        run(
            tiny(
                tmp_path / name,
                images,
                steps=3,
                warmup_steps=1,
                decoder_depth=1,
                precision="bf16",
                compile=on,
            )
        )
    plain, compiled = logged(tmp_path / "plain", "loss"), logged(tmp_path / "compiled", "loss")
    assert compiled == pytest.approx(plain, rel=2e-2)
    # Each of three steps is at most the learning rate, 1e-3. Rounding to bf16 may flip the sign of a step.
    assert max_difference(weights(tmp_path / "plain", 3), weights(tmp_path / "compiled", 3)) < 6e-3
