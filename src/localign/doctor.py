"""What `localign doctor` finds: what is installed, which devices and back-ends there are, and why not the others."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from localign._version import __version__
from localign.backbones.building import machine_memory
from localign.vlm.model.attention import VARLEN

_GIB = 2**30
_NOT_FOR_USERS = {"dev", "web-tests"}
"""Extras that developers of localign install."""


def findings() -> dict[str, dict[str, str]]:
    """Title -> name -> what was found, in words."""
    return {
        "machine": dict(_machine()),
        "devices": dict(_devices()),
        "packages": dict(_packages()),
        "extras": dict(_extras()),
        "back-ends": dict(_backends()),
    }


def _machine() -> Iterator[tuple[str, str]]:
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield (
        "processors",
        f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}",
    )
    yield "memory", f"{machine_memory() / _GIB:.1f} GiB"
    for name, folder in (("shared memory", "/dev/shm"), ("disk here", ".")):
        if Path(folder).is_dir():
            yield name, f"{shutil.disk_usage(folder).free / _GIB:.1f} GiB free"


def _devices() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        yield "cuda", f"no: {_why_no_cuda()}"
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index}",
            f"{facts.name}, {facts.total_memory / _GIB:.0f} GiB, capability {facts.major}.{facts.minor}",
        )
    yield "mps", "yes" if torch.backends.mps.is_available() else "no: it is Apple's"


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return f"torch has CUDA {torch.version.cuda}, but the machine has no NVIDIA device"
    return f"torch has CUDA {torch.version.cuda}; the driver does not start (see nvidia-smi)"


def _packages() -> Iterator[tuple[str, str]]:
    yield "localign", __version__
    yield "python", platform.python_version()
    for requirement in _requirements(None):
        yield requirement, _version(requirement) or "missing"


def _extras() -> Iterator[tuple[str, str]]:
    extras = metadata.metadata("localign").get_all("Provides-Extra") or []
    for extra in sorted(set(extras) - _NOT_FOR_USERS):
        missing = [name for name in _requirements(extra) if _version(name) is None]
        installed = ", ".join(
            f"{name} {_version(name)}" for name in _requirements(extra) if name not in missing
        )
        yield extra, f"no: pip install 'localign[{extra}]'" if missing else installed


def _requirements(extra: str | None) -> list[str]:
    """Names of the packages that localign, or one of its extras, requires."""
    names = []
    for line in metadata.requires("localign") or ():
        of = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if (of.group(1) if of else None) == extra:
            names.append(re.split(r"[^\w.-]", line, maxsplit=1)[0])
    return names


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _backends() -> Iterator[tuple[str, str]]:
    cuda = torch.cuda.is_available()
    needs = "" if cuda else "no: it needs CUDA"
    yield "attention eager", "yes"
    yield "attention flex", needs or "yes"
    varlen = "" if VARLEN is not None else "no: this torch has no varlen_attn with window_size"
    yield "packed rows, varlen", varlen or needs or "yes"
    yield "bf16", _bf16(cuda)
    yield "compile", "yes" if shutil.which(os.environ.get("CXX", "c++")) else "no: there is no C++ compiler"
    for name, needed in (("gloo", ""), ("nccl", needs)):
        yield (
            f"ranks over {name}",
            needed or ("yes" if _built_with(name) else "no: torch was built without it"),
        )


def _built_with(backend: str) -> bool:
    distributed: Any = torch.distributed
    return distributed.is_available() and bool(getattr(distributed, f"is_{backend}_available")())


def _bf16(cuda: bool) -> str:
    if cuda:
        return "yes" if torch.cuda.is_bf16_supported(including_emulation=False) else "no: the GPU emulates it"
    fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "yes" if fast else "slow: the processor has no bf16 instructions"
