"""A sharded run on one rank gives the same numbers, in other files."""

from __future__ import annotations

import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import logged, make_images, max_difference, reseal, same_bits, tiny
from engine_runs import run as align
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sharded_runs import (
    LENGTH,
    TokenModel,
    TokenTask,
    Writer,
    run,
    run_until,
    token,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load

from localign.engine import TrainConfig
from localign.engine.checkpoints.replicated import Checkpoints
from localign.engine.checkpoints.sharded import OFFSETS_KEY
from localign.engine.distributed import DistributedContext
from localign.engine.nonfinite import FOLDER as NONFINITE
from localign.engine.sharding import meta_copy, shard
from localign.errors import RunFailure, UserError

STEPS = 8
SHARD = "shard-00000.safetensors"


def tensors(folder: Path, step: int = STEPS) -> dict[str, Tensor]:
    """The tensors in a checkpoint of one rank."""
    return load_file(folder / "checkpoints" / f"step-{step:07d}" / SHARD)


def exported(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unsharded run."""
    out = tmp_path_factory.mktemp("unsharded") / "run"
    run(token(out, sharding="none"))
    return out


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted sharded run."""
    out = tmp_path_factory.mktemp("sharded") / "run"
    run(token(out))
    return out


@pytest.fixture
def stopped(sharded: Path, tmp_path: Path) -> TrainConfig:
    """A sharded run that seems to have ended after its checkpoint of step 6, ready to resume."""
    shutil.copytree(sharded, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-0000008")
    (tmp_path / "run" / "checkpoints" / "best.json").unlink()
    config = token(tmp_path / "run", resume="must")
    for file in ("config.yaml", "checkpoints/step-0000006/state.json"):
        path = tmp_path / "run" / file
        path.write_text(path.read_text().replace(str(sharded), config.out))
    reseal(path.parent)
    return config


def test_a_sharded_run_on_one_rank_equals_an_unsharded_run(unsharded: Path, sharded: Path) -> None:
    assert same_bits(exported(sharded), exported(unsharded))
    for field in ("loss", "grad_norm", "val_loss", "samples"):
        assert logged(sharded, field) == logged(unsharded, field), field


def test_the_exported_module_is_complete(sharded: Path) -> None:
    # TokenTask.export asserts that tied weights are tied. The loss needs the unsaved buffers too.
    loss = json.loads((sharded / "export" / "loss.json").read_text())
    assert loss == pytest.approx(logged(sharded, "val_loss")[STEPS], rel=1e-6)


def test_checkpoints_hold_each_trained_tensor_once(sharded: Path) -> None:
    names = tensors(sharded).keys()
    frozen = ("tower.", "blocks.1.")
    trained = {n for n in TokenModel().state_dict() if not n.startswith(frozen)} - {"head.weight"}
    assert {n.removeprefix("model.") for n in names if n.startswith("model.")} == trained
    assert {n.removeprefix("ema.") for n in names if n.startswith("ema.")} == trained
    moments = {n.removeprefix("optimizer.") for n in names if n.startswith("optimizer.")}
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert moments == {f"{kind}.{name}" for kind in kinds for name in trained - {"gain"}}


def test_checkpoints_are_safetensors_and_json(sharded: Path) -> None:
    folder = sharded / "checkpoints" / "step-0000008"
    assert sorted(p.name for p in folder.iterdir()) == [SHARD, "state.json"]
    assert json.loads((folder / "state.json").read_text())["step"] == STEPS
    with safe_open(folder / SHARD, "pt") as file:
        offsets = json.loads(file.metadata()[OFFSETS_KEY])
    assert offsets["model.embedding.weight"] == {"saved_offsets": [0, 0]}


def test_torchs_reader_reads_them_too(sharded: Path) -> None:
    hf = pytest.importorskip("torch.distributed.checkpoint.hf_storage")
    expected = tensors(sharded)
    read = {name: torch.empty_like(t) for name, t in expected.items() if t.ndim}
    folder = sharded / "checkpoints" / "step-0000008"
    with pytest.warns(UserWarning, match="single process"):
        load(read, storage_reader=hf.HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert all(torch.equal(read[name], expected[name]) for name in read)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_resumed_run_equals_an_uninterrupted_one(sharded: Path, tmp_path: Path, sharding: str) -> None:
    config = token(tmp_path, sharding=sharding, keep_checkpoints=1, val_every=3)
    for step in (3, 5, 7):
        run_until(replace(config, resume="auto"), step)
    run(replace(config, resume="must"))
    assert same_bits(exported(tmp_path), exported(sharded))
    for field in ("loss", "samples", "lr"):
        assert logged(tmp_path, field) == logged(sharded, field), field
    assert not list(tmp_path.rglob(".*.tmp"))


def test_sharding_may_not_change_on_resume(stopped: TrainConfig) -> None:
    with pytest.raises(UserError, match="sharding: 'full' before, 'none' now"):
        run(replace(stopped, sharding="none"))


def test_the_average_of_a_sharded_run_is_exported(sharded: Path) -> None:
    saved = tensors(sharded)
    assert torch.equal(exported(sharded)["embedding.weight"], saved["ema.embedding.weight"])
    assert not torch.equal(saved["ema.embedding.weight"], saved["model.embedding.weight"])


def split(folder: Path, rows: int) -> None:
    """Rewrite a checkpoint of one rank as if two ranks had written it, the first with ``rows`` rows of each tensor."""
    content = load_file(folder / SHARD)
    for number, part in enumerate((slice(rows), slice(rows, None))):
        held = {n: t[part] if t.ndim else t for n, t in content.items() if t.ndim or number == 0}
        begins = {
            n: [number * min(rows, len(content[n])), *[0] * (t.ndim - 1)] if t.ndim else []
            for n, t in held.items()
        }
        write_shard(folder / f"shard-{number:05d}.safetensors", held, begins)
    reseal(folder)


def write_shard(file: Path, content: dict[str, Tensor], begins: dict[str, list[int]]) -> None:
    offsets = json.dumps({name: {"saved_offsets": begin} for name, begin in begins.items()})
    save_file({n: t.contiguous() for n, t in content.items()}, file, metadata={OFFSETS_KEY: offsets})


@pytest.mark.parametrize("rows", [1, 3])
def test_parts_of_several_ranks_are_combined(stopped: TrainConfig, sharded: Path, rows: int) -> None:
    split(Path(stopped.out) / "checkpoints" / "step-0000006", rows)
    run(stopped)
    assert same_bits(tensors(Path(stopped.out)), tensors(sharded))


def refusal(config: TrainConfig) -> str:
    with pytest.raises(UserError) as caught:
        run(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_part_is_detected(stopped: TrainConfig) -> None:
    folder = Path(stopped.out) / "checkpoints" / "step-0000006"
    split(folder, 3)
    (folder / SHARD).unlink()
    reseal(folder)
    line = refusal(stopped)
    assert "step-0000006 is damaged: a part of " in line


def test_a_truncated_part_is_detected(stopped: TrainConfig) -> None:
    file = Path(stopped.out) / "checkpoints" / "step-0000006" / SHARD
    file.write_bytes(file.read_bytes()[:-9])
    assert "step-0000006 is damaged" in refusal(stopped)


def renamed(config: TrainConfig, old: str, new: str) -> None:
    file = Path(config.out) / "checkpoints" / "step-0000006" / SHARD
    content = load_file(file)
    content[new] = content.pop(old)
    write_shard(file, content, {name: [0] * t.ndim for name, t in content.items()})
    reseal(file.parent)


def test_tensors_that_are_missing_or_extra_are_named(stopped: TrainConfig) -> None:
    renamed(stopped, "model.blocks.0.norm.weight", "model.surplus")
    line = refusal(stopped)
    assert "missing 1 (model.blocks.0.norm.weight)" in line
    assert "extra 1 (model.surplus)" in line


def test_missing_moments_are_named(stopped: TrainConfig) -> None:
    renamed(stopped, "optimizer.exp_avg.blocks.0.norm.weight", "optimizer.exp_avg.surplus")
    assert "lacks the optimizer state of blocks.0.norm.weight: exp_avg" in refusal(stopped)


def test_training_continues_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[int], int]] = []
    writing = threading.Lock()

    class Watching(TokenTask):
        def step(self, model: nn.Module, batch: Any) -> Any:
            number = int(batch.positions[0]) // self.config.batch_size
            seen.append((number, Checkpoints(tmp_path / "checkpoints").steps(), int(writing.locked())))
            return super().step(model, batch)

    def slow(self: Writer, plan: Any, planner: Any) -> Any:
        assert writing.acquire(blocking=False), "two checkpoints are being written"
        time.sleep(0.3)
        result = super(Writer, self).write_data(plan, planner)
        writing.release()
        return result

    monkeypatch.setattr(Writer, "write_data", slow)
    run(token(tmp_path, checkpoint_every=2, keep_checkpoints=9), Watching)
    at = {number: steps for number, steps, _ in seen}
    assert at[2] == at[3] == [], "the steps after the first checkpoint did not wait for it"
    assert at[4] == [2], "but the second checkpoint did"
    assert Checkpoints(tmp_path / "checkpoints").steps() == [2, 4, 6, 8]


def test_a_checkpoint_holds_the_state_of_its_step(tmp_path: Path) -> None:
    # Writing is slow, so that later steps change weights, moments and the list of skipped steps meanwhile.
    run(token(tmp_path / "slow", keep_checkpoints=9), slow_writing=0.2, poison=4)
    run(token(tmp_path / "quick", keep_checkpoints=9), poison=4)
    for step in (2, 4, 6):
        assert same_bits(tensors(tmp_path / "slow", step), tensors(tmp_path / "quick", step)), step
    state = json.loads((tmp_path / "slow" / "checkpoints" / "step-0000004" / "state.json").read_text())
    assert state["guard"]["skipped"] == [], "step 5 was skipped during the writing"


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    results = run(token(tmp_path, steps=10, val_every=1, keep_checkpoints=2, lr=0.3)).results
    store = Checkpoints(tmp_path / "checkpoints")
    assert store.best() == results["best"]
    assert store.steps() == sorted(
        {9, 10, results["best"]["step"]} & {*range(1, 11)} | set(store.steps()[-2:])
    )
    assert len(store.steps()) <= 3


def test_a_checkpoint_that_cannot_be_written_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Writer, plan: Any, planner: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Writer, "write_data", failing)
    with pytest.raises(RunFailure, match=r"cannot write the checkpoint of step 2: .*No space left") as caught:
        run(token(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_failing_run_finishes_its_checkpoint(tmp_path: Path) -> None:
    run_until(token(tmp_path), 2, slow_writing=0.2)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [2]


def test_checkpoints_may_hold_frozen_tensors(tmp_path: Path) -> None:
    run(token(tmp_path, steps=2), save_frozen=True)
    assert {"model.tower.weight", "model.blocks.1.scale", "ema.tower.weight"} <= tensors(tmp_path, 2).keys()


def test_checkpoints_of_unsharded_runs_may_leave_out_frozen_tensors(unsharded: Path) -> None:
    for file in ("model", "ema"):
        saved = load_file(unsharded / "checkpoints" / "step-0000008" / f"{file}.safetensors")
        frozen = {n for n in TokenModel().state_dict() if n.startswith(("tower.", "blocks.1."))}
        assert saved.keys() == TokenModel().state_dict().keys() - frozen


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_checkpoint_with_frozen_tensors_is_not_one_without(tmp_path: Path, sharding: str) -> None:
    config = token(tmp_path, sharding=sharding)
    run_until(config, 3, save_frozen=True)
    line = refusal(replace(config, resume="must"))
    assert "does not fit" in line
    assert "blocks.1.linear.bias" in line


def test_checkpoints_must_hold_trained_tensors(tmp_path: Path) -> None:
    class Forgetful(TokenTask):
        def checkpointed(self, name: str) -> bool:
            return not name.startswith("blocks.0.")

    with pytest.raises(AssertionError, match="scale is trained, but in no checkpoint"):
        run(token(tmp_path), Forgetful)
    assert not (tmp_path / "config.yaml").exists()


def test_trainable_submodules_must_be_sharded() -> None:
    module = TokenModel()
    with pytest.raises(ValueError, match="a trainable submodule cannot be left unsharded"):
        shard(module, [], [module.blocks[0]], mesh=None, compute_dtype=None, reduce_dtype=torch.float32)  # type: ignore[arg-type]


def test_micro_batches_without_labels_count_for_nothing(tmp_path: Path, sharded: Path) -> None:
    # A third of the samples has no labels, so some of the micro-batches of one sample have weight zero.
    run(token(tmp_path, micro_batch=1))
    for field in ("loss", "grad_norm"):
        assert logged(tmp_path, field) == pytest.approx(logged(sharded, field), rel=1e-4), field
    assert max_difference(exported(tmp_path), exported(sharded)) < 1e-5


def test_tokens_per_second_are_logged(tmp_path: Path) -> None:
    run(token(tmp_path, log_every=4), poison=1)
    rates, images = logged(tmp_path, "tokens_per_second"), logged(tmp_path, "images_per_second")
    assert sorted(rates) == [4, 8]
    for step, rate in rates.items():
        assert rate == pytest.approx(images[step] * LENGTH), "including skipped steps"


def test_skipped_batches_keep_all_their_tensors(tmp_path: Path) -> None:
    run(token(tmp_path, sharding="none"), poison=1)
    (file,) = (tmp_path / NONFINITE).iterdir()
    assert load_file(file).keys() == {"input_ids", "labels", "features", "positions", "indices"}


def test_a_task_without_sharding_refuses(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    config = tiny(tmp_path / "run", make_images(folder, 8), sharding="full")
    with pytest.raises(UserError, match="leave --sharding at none"):
        align(config)
    assert not (tmp_path / "run").exists()


def test_devices_without_sharding_refuse() -> None:
    with pytest.raises(UserError, match="not on mps"):
        DistributedContext(0, 1, 0, torch.device("mps")).mesh(per_node=False)


def test_a_meta_copy_takes_no_memory_and_is_complete() -> None:
    module = TokenModel()
    copied = meta_copy(module)
    assert isinstance(copied, TokenModel)
    assert all(p.is_meta for p in copied.parameters())
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in module.parameters()]
    assert copied.gain.is_meta
    assert torch.equal(copied.ramp, module.ramp), "not in the state dict, so copied"
    assert copied.head.weight is copied.embedding.weight
    assert not any(p.is_meta for p in module.parameters())
