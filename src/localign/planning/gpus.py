"""GPUs by name: what they compute at best, and what they hold. Adding one is a line."""

from __future__ import annotations

from dataclasses import dataclass

from localign.errors import UserError, near


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
    "A100": GPU(312, 19.5, 80),
    "A100-40GB": GPU(312, 19.5, 40),
    "H100": GPU(989, 67, 80),
    "H200": GPU(989, 67, 141),
    "B200": GPU(2250, 75, 180),
    "L40S": GPU(362, 91.6, 48),
    "A10": GPU(125, 31.2, 24),
    "RTX4090": GPU(165, 82.6, 24),
}


def gpu(name: str) -> GPU:
    """A GPU by name, however it is capitalised.

    Raises:
        UserError: It is not known.
    """
    known = {n.lower(): n for n in GPUS}
    if name.lower() not in known:
        raise UserError(f"unknown GPU {name!r}; known: {', '.join(GPUS)}{near(name.upper(), GPUS)}")
    return GPUS[known[name.lower()]]
