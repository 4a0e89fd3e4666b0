"""Distributed functions with one process, and the choice of a device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from localign.engine.distributed import DistributedContext, choose_device, distributed_context
from localign.errors import RunFailure, UserError


def test_a_single_process() -> None:
    with distributed_context("cpu") as context:
        assert context == DistributedContext(0, 1, 0, torch.device("cpu"))
        assert context.is_main
        context.barrier()
        values = torch.tensor([1.0, 2.0])
        assert torch.equal(context.all_reduce(values), values)
        assert context.all_gather_object({"a": 1}) == [{"a": 1}]
        assert context.any_rank(True)
        assert not context.any_rank(False)
        module = nn.Linear(2, 2)
        assert context.wrap_ddp(module) is module
        with context.without_sync(module, skip=True):
            module(torch.ones(1, 2)).sum().backward()
        assert module.weight.grad is not None
    assert not torch.distributed.is_initialized()


def test_ranks_other_than_the_first_are_not_main() -> None:
    assert not DistributedContext(1, 2, 1, torch.device("cpu")).is_main


def test_torchrun_with_one_process_makes_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with distributed_context("cpu") as context:
        assert context.size == 1
    assert not torch.distributed.is_initialized()


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")


def test_a_single_sharded_process_has_a_group() -> None:
    with distributed_context("cpu", sharded=True) as context:
        assert torch.distributed.is_initialized()
        assert context.size == 1
        assert context.mesh(per_node=False).shape == (1,)
        assert context.mesh(per_node=True).shape == (1, 1)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "meta", "xpu"])
def test_unknown_device_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="give auto, cpu, cuda, cuda:N or mps") as caught:
        choose_device(name)
    assert "\n" not in str(caught.value)


def test_missing_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="no device cuda:1: torch finds no CUDA GPU"):
        choose_device("cuda:1")
    with pytest.raises(UserError, match="no device mps"):
        choose_device("mps")


def test_one_gpu_per_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_device("auto", 2) == torch.device("cuda", 2)
    assert choose_device("cuda", 3) == torch.device("cuda", 3)
    assert choose_device("cuda:1", 3) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="no device cuda:4: torch finds 4 CUDA GPUs"):
        choose_device("cuda:4")


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match=r"^there is no device cuda:1: torch finds one CUDA GPU, cuda:0$"):
        choose_device("cuda:1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(UserError, match=r"CUDA_VISIBLE_DEVICES is 1, and its GPUs are counted from 0"):
        choose_device("cuda:1")
    for name in ("auto", "cuda"):
        with pytest.raises(
            UserError, match="rank 3 of this node has no GPU; start at most one process per GPU"
        ):
            choose_device(name, 3)


def test_several_processes_on_one_named_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UserError, match="--device cuda:1 is one GPU for 2 processes; give --device cuda"),
        distributed_context("cuda:1"),
    ):
        pass


NCCL = """NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote process exited, NCCL version 2.21.5
ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.
Last error:
socketProgress: Connection closed by remote peer node-2<40123>"""
TWICE = """NCCL error in: x.cpp:1, invalid usage
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1a000"""
GLOO = "[x.cc:1] Connection closed by peer [::1]:5. This is typically caused by"


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        (NCCL, "socketProgress: Connection closed by remote peer node-2<40123>"),
        (TWICE, "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1a000"),
        (GLOO, "[x.cc:1] Connection closed by peer [::1]:5."),
    ],
)
def test_a_lost_rank_is_one_line_that_says_why(
    message: str, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)  # no group is made
    with (
        pytest.raises(RunFailure, match=r"rank 0 lost another rank.*for 7 s \(--timeout\): ") as caught,
        distributed_context("cpu", timeout=7),
    ):
        raise RuntimeError(message)
    assert str(caught.value).endswith(cause)
    assert "\n" not in str(caught.value)
