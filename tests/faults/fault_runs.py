"""Parts of tiny runs with faults, each in new processes."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine_runs import COMMAND, DisturbedAlignment
from fault_kinds import Fault, install
from rank_forks import RanksEnd, on_ranks
from sharded_runs import TokenTask
from torch import nn

from localign.alignment import AlignConfig
from localign.engine import StepResult, TrainConfig, train

KILLED = -signal.SIGKILL


class FaultyAlignment(DisturbedAlignment):
    """An alignment that calls ``at_step``."""

    at_step: Callable[[int], None]

    def step(self, model: nn.Module, batch: Any) -> StepResult:
        self.at_step(int(batch.positions[0]) // self.config.batch_size)
        return super().step(model, batch)


class FaultyTokens(TokenTask):
    """Next-token prediction that calls ``at_step``."""

    at_step: Callable[[int], None]

    def step(self, model: nn.Module, batch: Any) -> StepResult:
        self.at_step(int(batch.positions[0]) // self.config.batch_size)
        return super().step(model, batch)


def do_part(
    config: AlignConfig | TrainConfig,
    *faults: Fault,
    ranks: int = 1,
    other_host: bool = False,
    **disturbances: Any,
) -> RanksEnd:
    """Do a part of a run, from its start or checkpoint to its end or a fault.

    Args:
        config: Options of the run.
        faults: Strike in order of their steps.
        ranks: Number of processes.
        other_host: Pretend to be on another host at another time.
        disturbances: Options of the task.
    """
    return on_ranks(ranks, _run_part, config, list(faults), other_host, disturbances)


def _run_part(
    config: AlignConfig | TrainConfig, faults: list[Fault], other_host: bool, disturbances: dict[str, Any]
) -> None:
    at_step = install(faults, Path(config.out))
    if other_host:
        change_host_and_clock()
    task: FaultyAlignment | FaultyTokens
    if isinstance(config, AlignConfig):
        task = FaultyAlignment(config, **disturbances)
    else:
        task = FaultyTokens(config, **disturbances)
    task.at_step = at_step
    train(task, config, COMMAND if isinstance(config, AlignConfig) else "tokens")


def change_host_and_clock() -> None:
    """Pretend to be on another host, in another time zone, ten years later."""
    if sys.version_info >= (3, 12):
        os.unshare(os.CLONE_NEWUTS)
        with suppress(OSError):
            socket.sethostname("another-host")
    os.environ["TZ"] = "Pacific/Kiritimati"
    time.tzset()
    now = time.time
    time.time = lambda: now() + 10 * 365 * 86400
