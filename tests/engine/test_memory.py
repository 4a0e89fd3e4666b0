"""Freed memory stays with the process where the C library can be told so."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from localign.engine.memory import keep_freed_memory

FAULTS = """
import resource, sys, torch
from localign.engine.memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()

def step():
    held = [torch.ones(2**18) for _ in range(24)]

step(); step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_asking_twice_is_asking_once() -> None:
    assert keep_freed_memory() == keep_freed_memory()


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_memory_is_not_faulted_in_again_at_every_step() -> None:
    counts = {}
    for how in ("plain", "keep"):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, timeout=120
        )
        counts[how] = int(done.stdout)
    assert counts["keep"] < 0.1 * counts["plain"]
