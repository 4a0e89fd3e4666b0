"""CPU settings hold during a run, do not change results, and are undone afterwards."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import pytest
import torch
from engine_runs import tiny, weights
from torch import Tensor

from localign.alignment import AlignTask
from localign.engine import train
from localign.engine.hardware import cpu
from localign.engine.hardware.cpu import fast_float32_matmul, keep_freed_memory

CPU = torch.device("cpu")
STEPS = 8
glibc = pytest.mark.skipif(cpu._glibc() is None, reason="needs glibc")


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@glibc
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads memory from /proc")
def test_freed_memory_stays_with_the_process_until_the_end() -> None:
    size = 256 << 20
    with keep_freed_memory(CPU):
        block = torch.ones(size // 4)
        before = resident()
        del block
        assert before - resident() < size // 8
    assert before - resident() > size // 2


class FakeLibc:
    """A C library that records calls."""

    def __init__(self, works: bool) -> None:
        self.works, self.calls = works, list[tuple[str, int]]()

    def mallopt(self, parameter: int, value: int) -> int:
        self.calls.append((f"mallopt {parameter}", value))
        return int(self.works)

    def malloc_trim(self, pad: int) -> int:
        self.calls.append(("trim", pad))
        return 1


def test_only_a_cpu_with_glibc_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibc(works=True)
    monkeypatch.setattr(cpu, "_glibc", lambda: library)
    with keep_freed_memory(torch.device("cuda")):
        assert library.calls == []
    with keep_freed_memory(CPU):
        assert [value for _, value in library.calls] == [1 << 30, 1 << 30]
    assert library.calls[-1] == ("trim", 0)
    monkeypatch.setattr(cpu, "_glibc", lambda: None)
    with keep_freed_memory(CPU):
        pass


def test_a_library_that_refuses_is_not_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibc(works=False)
    monkeypatch.setattr(cpu, "_glibc", lambda: library)
    with keep_freed_memory(CPU):
        pass
    assert len(library.calls) == 1


def test_other_c_libraries_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("loaded"))
    assert cpu._glibc() is None


# -- products ---------------------------------------------------------------------------------------


def precision() -> str:
    return str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]


def gradients(scale: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(2, 48, 48, generator=generator) * scale for _ in range(2))
    leaves = [x.requires_grad_(), w.requires_grad_()]
    out = torch.bmm(leaves[0], leaves[1]) @ leaves[1][0]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def test_products_are_exact_and_the_setting_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = precision()
    exact = gradients(1.0)
    monkeypatch.setattr(cpu, "_mkl_is_slow", lambda: True)
    with fast_float32_matmul(CPU):
        for ours, expected in zip(gradients(1.0), exact, strict=True):
            assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert precision() == before


def test_a_processor_that_rounds_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = precision()
    monkeypatch.setattr(cpu, "_mkl_is_slow", lambda: True)
    monkeypatch.setattr(cpu, "_rounds", lambda: True)
    with fast_float32_matmul(CPU):
        assert precision() == before


def test_rounding_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not cpu._rounds()
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: bmm(a.bfloat16(), b.bfloat16()).float())
    assert cpu._rounds()


@pytest.mark.parametrize(
    ("vendor", "capability", "slow"),
    [("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False)],
)
def test_the_vendor_decides(
    vendor: str, capability: str, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"vendor_id : {vendor}\n")
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert cpu._mkl_is_slow() is slow
    with fast_float32_matmul(torch.device("cuda")):
        assert precision() != "bf16"


def test_a_run_without_both_settings_is_the_same(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_mkl_is_slow", lambda: True)
    fast = tiny(tmp_path / "fast", images, eps=1e-5)
    train(AlignTask(fast), fast, "align")
    monkeypatch.setattr(cpu, "_mkl_is_slow", lambda: False)
    monkeypatch.setattr(cpu, "_glibc", lambda: None)
    slow = tiny(tmp_path / "slow", images, eps=1e-5)
    train(AlignTask(slow), slow, "align")
    a, b = weights(tmp_path / "fast", STEPS), weights(tmp_path / "slow", STEPS)
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
