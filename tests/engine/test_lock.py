"""Only one process at a time can write to a run folder."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.context import ForkProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from engine_runs import run, run_until, tiny

from localign.errors import UserError
from localign.files import lock as lock_module

pytest.importorskip("fcntl")
FORK = multiprocessing.get_context("fork")


def hold(folder: Path, locked: Event) -> None:
    file = lock_module.lock(folder)
    locked.set()
    time.sleep(60)
    assert file is not None


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[ForkProcess]:
    """Another process that holds the lock of ``tmp_path``."""
    locked = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path, locked))
    process.start()
    assert locked.wait(30)
    yield process
    process.kill()
    process.join()


def test_a_folder_in_use_is_refused_until_its_process_dies(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, holder: ForkProcess
) -> None:
    monkeypatch.setattr(lock_module, "PATIENCE", 0.2)
    config = tiny(tmp_path, images, steps=4)
    with pytest.raises(UserError, match=f"another process is writing to .*process {holder.pid} on"):
        run(config)
    assert not (tmp_path / "config.yaml").exists()
    holder.kill()  # kill -9
    holder.join()
    assert run(config).results["steps"] == 4


def test_a_stopped_run_releases_the_lock(tmp_path: Path, images: Path) -> None:
    config = tiny(tmp_path, images, steps=4)
    run_until(config, 3)
    with lock_module.lock(tmp_path) or pytest.fail("no lock"):
        pass
    assert run(replace(config, resume="must")).results["steps"] == 4
