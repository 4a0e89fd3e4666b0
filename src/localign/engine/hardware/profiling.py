"""`--profile STEPS`: where the time of a few steps goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from localign.engine.distributed import DistributedContext
from localign.engine.log import say
from localign.files import replace_text, replacing

FOLDER = "profile"
TRACE, SUMMARY = "trace.json.gz", "summary.txt"
WARMUP_STEPS = 3
"""Steps before those that are profiled: they compile kernels and fill caches. Runs of fewer steps skip less."""
LARGEST = 10
"""Kernels in the summary."""


@contextmanager
def profiled(
    folder: Path,
    steps: int | None,
    left: int,
    context: DistributedContext,
    writing: Callable[[], AbstractContextManager[None]],
) -> Iterator[Callable[[], None]]:
    """Profile steps that are taken inside the block, and write a trace and a summary of the largest kernels.

    Args:
        folder: The run folder.
        steps: Steps to profile; None for none.
        left: Steps that the run has left; at most these are profiled.
        context: This rank. Only the main rank is profiled.
        writing: Makes the context in which files are written.

    Yields:
        A function to call after every step.
    """
    if steps is None or not context.is_main or left < 1:
        yield lambda: None
        return
    skipped = min(WARMUP_STEPS, left - 1)
    active = min(steps, left - skipped)
    cuda = context.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]

    def write(found: Any) -> None:
        with writing():
            (folder / FOLDER).mkdir(exist_ok=True)
            with replacing(folder / FOLDER / TRACE) as temporary:
                _export(found, temporary)
            text = summary(found.key_averages(), active, cuda)
            replace_text(folder / FOLDER / SUMMARY, text)
        for line in (f"profile of {active} steps: {folder / FOLDER / SUMMARY}", *text.splitlines()):
            say(line)

    plan = schedule(wait=max(0, skipped - 1), warmup=min(1, skipped), active=active, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step


def _export(found: Any, path: Path) -> None:
    """Write a trace. torch packs it if the name ends in `.gz`, which names of temporary files need not."""
    packed = path.with_name(f"{path.name}.json.gz")
    found.export_chrome_trace(str(packed))
    os.replace(packed, path)


def summary(averages: Any, steps: int, cuda: bool) -> str:
    """The largest kernels (operations on a CPU) as text: share of the time, milliseconds and calls per step, name."""
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    kernels = [e for e in averages if not cuda or str(e.device_type).endswith("CUDA")]
    kernels = [e for e in kernels if not e.key.startswith("ProfilerStep")]
    total = sum(getattr(e, key) for e in kernels) or 1.0
    rows = [f"{'share':>7} {'ms/step':>9} {'calls/step':>10}  {'kernel' if cuda else 'operation'}"]
    for event in sorted(kernels, key=lambda e: -getattr(e, key))[:LARGEST]:
        time = getattr(event, key)
        rows.append(
            f"{time / total:>7.1%} {time / steps / 1e3:>9.3f} {event.count / steps:>10.1f}  {event.key[:100]}"
        )
    rows.append(f"{'all':>7} {total / steps / 1e3:>9.3f}  ms per step on the {'GPU' if cuda else 'CPU'}")
    return "\n".join(rows) + "\n"
