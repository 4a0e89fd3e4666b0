"""GPUs by name: what they compute at best, and what they hold. Adding one is a line."""

from __future__ import annotations

from dataclasses import dataclass

from localign.errors import UserError, did_you_mean


@dataclass(frozen=True)
class GPU:
    """The maker's figures."""

    bf16: float
    """Dense bfloat16 operations per second on tensor cores, in 10^12."""
    fp32: float
    """float32 operations per second outside of them, in 10^12."""
    gib: float
    """Memory, GiB."""


GPUS: dict[str, GPU] = {
    "A100-40GB": GPU(312, 19.5, 40),
    "A100": GPU(312, 19.5, 80),
    "H100-PCIe": GPU(756, 51, 80),
    "H100-NVL": GPU(835, 60, 94),
    "H100": GPU(989, 67, 80),
    "H200": GPU(989, 67, 141),
    "B200": GPU(2250, 75, 180),
    "L40S": GPU(362, 91.6, 48),
    "A10": GPU(125, 31.2, 24),
    "RTX-4090": GPU(165, 82.6, 24),
}
"""By names that users give; with blanks for hyphens they are parts of what CUDA calls a device, special ones first."""


def gpu_of_device(name: str) -> GPU | None:
    """The GPU that CUDA calls so, as in "NVIDIA H100 PCIe"; None for one that is not known."""
    words = name.replace("-", " ")
    return next((card for known, card in GPUS.items() if f"{known.replace('-', ' ')} " in f"{words} "), None)


def gpu(name: str) -> GPU:
    """A GPU by name, however it is capitalised.

    Raises:
        UserError: It is not known.
    """
    known = {n.lower(): n for n in GPUS}
    if name.lower() not in known:
        raise UserError(f"unknown GPU {name!r}; known: {', '.join(GPUS)}{did_you_mean(name.upper(), GPUS)}")
    return GPUS[known[name.lower()]]
