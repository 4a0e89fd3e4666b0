"""GPUs by name: peak compute and memory. To add a GPU, add one line."""

from __future__ import annotations

from dataclasses import dataclass

from localign.errors import UserError, did_you_mean


@dataclass(frozen=True)
class GPU:
    """Figures from the manufacturer's data sheet."""

    bf16: float
    """Dense bfloat16 peak on tensor cores, in 10^12 operations per second."""
    fp32: float
    """float32 peak without tensor cores, in 10^12 operations per second."""
    gib: float
    """Memory in GiB."""


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
"""GPUs by the names that users give. With spaces instead of hyphens, a key is part of CUDA's device name; the first
match counts, so more specific names come first."""


def gpu_of_device(name: str) -> GPU | None:
    """The GPU with CUDA's device name ``name``, such as "NVIDIA H100 PCIe"; None if it is unknown."""
    words = name.replace("-", " ")
    return next((card for known, card in GPUS.items() if f"{known.replace('-', ' ')} " in f"{words} "), None)


def gpu(name: str) -> GPU:
    """The GPU of this name; upper and lower case are the same.

    Raises:
        UserError: The name is unknown.
    """
    known = {n.lower(): n for n in GPUS}
    if name.lower() not in known:
        raise UserError(f"unknown GPU {name!r}; known: {', '.join(GPUS)}{did_you_mean(name.upper(), GPUS)}")
    return GPUS[known[name.lower()]]
