"""Results of a sharded run depend neither on its number of ranks nor on kills."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sharded_runs
import torch
from engine_runs import kill_all, last_step, logged, max_difference, start
from rank_forks import on_ranks
from safetensors.torch import load_file
from sharded_runs import TokenModel, part, run, run_parts, run_until, token
from torch import Tensor

from localign.engine import TrainConfig
from localign.engine.checkpoints.replicated import Checkpoints

STEPS = 8
TOLERANCE = 1e-5


def run_ranks(ranks: int, *parts: dict[str, Any], fails: bool = False) -> str:
    """Do runs one after another on several ranks. Returns the output."""
    end = on_ranks(ranks, run_parts, list(parts))
    assert any(end.codes) == fails, end.output
    return end.output


def exported(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "export" / "model.safetensors")


def equal(a: Path, b: Path) -> None:
    """Exports, losses and gradient norms agree within the tolerance, samples exactly."""
    assert logged(a, "samples") == logged(b, "samples")
    assert sorted(logged(a, "samples")) == list(range(1, STEPS + 1))
    assert max_difference(exported(a), exported(b)) < TOLERANCE
    for field in ("loss", "grad_norm"):
        assert logged(a, field) == pytest.approx(logged(b, field), rel=1e-4), field
    assert logged(a, "val_loss")[STEPS] == pytest.approx(logged(b, "val_loss")[STEPS], rel=1e-4)


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted, unsharded run on one rank."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("unsharded") / "run"
    run(token(out, sharding="none"))
    torch.set_num_threads(before)
    return out


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path, unsharded: Path) -> None:
    sharded = token(tmp_path / "sharded")
    accumulated = token(tmp_path / "accumulated", micro_batch=1, val_every=3, grad_checkpointing=True)
    halved = token(tmp_path / "halved", micro_batch=2)
    in_bf16 = token(tmp_path / "in_bf16", precision="bf16", reduce_dtype="bf16")
    zero_loss = token(tmp_path / "zero_loss", weight_decay=0.5, ema_decay=None, lr=1e-2, steps=4)
    undecayed = token(tmp_path / "undecayed", weight_decay=0.0)
    poisoned = token(tmp_path / "poisoned")
    meta_device = token(tmp_path / "meta_device", val_every=3)
    run_ranks(
        2, part(sharded), part(accumulated), part(halved), part(in_bf16), part(zero_loss, zero_loss=True),
        part(undecayed), part(poisoned, poison=3), part(meta_device, meta_device=True),
    )  # fmt: skip
    for name in ("sharded", "accumulated", "halved", "meta_device"):
        equal(tmp_path / name, unsharded)

    # bfloat16 has about three digits. Trained weights stay float32.
    assert logged(tmp_path / "in_bf16", "loss") == pytest.approx(logged(unsharded, "loss"), rel=3e-2)
    assert 1e-6 < max_difference(exported(tmp_path / "in_bf16"), exported(unsharded)) < 8e-2
    assert all(t.dtype == torch.float32 for t in exported(tmp_path / "in_bf16").values())

    # With a loss of zero, AdamW only decays weights.
    before = {n: t for n, t in sharded_runs.TokenTask(zero_loss).module.state_dict().items()}
    rates = logged(tmp_path / "zero_loss", "lr").values()
    decay = torch.tensor([1 - rate * 0.5 for rate in rates]).prod()
    for name, after in exported(tmp_path / "zero_loss").items():
        frozen = name.startswith(("tower.", "blocks.1."))
        decayed = before[name].ndim > 1 and not frozen
        assert torch.allclose(after, before[name] * (decay if decayed else 1), rtol=1e-6), name
    assert decay < 0.99
    assert max_difference(exported(tmp_path / "undecayed"), exported(unsharded)) > 100 * TOLERANCE

    results = json.loads((tmp_path / "poisoned" / "results.json").read_text())
    assert results["skipped_steps"] == [4]
    assert len(list((tmp_path / "poisoned" / "nonfinite").iterdir())) == 2, "both ranks save their batches"

    folder = Checkpoints(tmp_path / "sharded" / "checkpoints").path(STEPS)
    sizes = [sum(t.numel() for t in load_file(f).values()) for f in sorted(folder.glob("*.safetensors"))]
    assert len(sizes) == 2, "each rank writes its share"
    assert max(sizes) < 0.6 * sum(sizes)


def test_a_run_moves_from_two_ranks_to_one_and_back(tmp_path: Path, unsharded: Path) -> None:
    config = token(tmp_path, keep_checkpoints=1)
    run_ranks(2, part(config, stop_before=3))
    assert Checkpoints(tmp_path / "checkpoints").steps() == [2]
    run_until(replace(config, resume="must"), 5)
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == 4
    run_ranks(2, part(replace(config, resume="must"), meta_device=True))
    equal(tmp_path, unsharded)


def test_nodes_as_replicas(tmp_path: Path, unsharded: Path) -> None:
    config = token(tmp_path, sharding="hybrid", micro_batch=1)
    continued = replace(config, resume="must")
    run_ranks(4, part(config, local_size=2, meta_device=True, stop_before=5), part(continued, local_size=2))
    equal(tmp_path, unsharded)
    folder = Checkpoints(tmp_path / "checkpoints").path(STEPS)
    held = [load_file(f).keys() for f in sorted(folder.glob("*.safetensors"))]
    assert sum("model.embedding.weight" in names for names in held) == 2, (
        "only one of its holders writes a part"
    )


@pytest.mark.parametrize(
    ("death", "ranks"),
    [({"die_writing": [4, 1]}, 2), ({"die_writing": [4, 0]}, 1), ({"die_publishing": 4}, 1)],
)
def test_a_death_during_a_checkpoint_leaves_the_previous_one(
    tmp_path: Path, unsharded: Path, death: dict[str, Any], ranks: int
) -> None:
    config = token(tmp_path, keep_checkpoints=1)
    run_ranks(2, part(config, **death), fails=True)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [2]
    assert list((tmp_path / "checkpoints").glob(".*.tmp")), "the checkpoint was being written"
    resumed = replace(config, resume="must")
    if ranks == 1:
        run(resumed)
    else:
        run_ranks(2, part(resumed))
    assert not list(tmp_path.rglob(".*.tmp"))
    equal(tmp_path, unsharded)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds a run's processes through /proc")
def test_three_kills_at_random_times(tmp_path: Path, unsharded: Path) -> None:
    config = token(tmp_path, resume="auto", checkpoint_every=1)
    draw = random.Random(5)
    for ranks in (2, 1, 2):
        _kill_during(ranks, config, draw)
    run_ranks(2, part(config))
    equal(tmp_path, unsharded)


def _kill_during(ranks: int, config: TrainConfig, draw: random.Random) -> None:
    """Start or resume a run and kill it at a random time after it has taken a step."""
    out = Path(config.out)
    began = last_step(out)
    events = {"sleep": 0.3, "slow_writing": 0.2}
    process = start(ranks, sharded_runs.__file__, json.dumps([part(config, **events)]))
    deadline = time.monotonic() + 200
    while last_step(out) in (0, began) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(draw.uniform(0.0, 0.7))
    alive = process.poll() is None
    kill_all(process)
    assert alive, "the run ended before it could be killed"
    assert last_step(out) < STEPS


def test_the_model_has_parameters_that_do_not_divide() -> None:
    assert any(p.shape[0] % 2 for p in TokenModel().parameters())
    assert any(p.shape[0] < 2 for p in TokenModel().parameters())
