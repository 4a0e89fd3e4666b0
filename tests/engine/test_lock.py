"""Only one process at a time can write to a run folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from engine_runs import run, run_until, tiny

from localign.engine import lock as lock_module
from localign.errors import UserError

pytest.importorskip("fcntl")
HOLD = """
import sys
from pathlib import Path
from localign.engine.lock import lock
file = lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the lock of ``tmp_path``."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_folder_in_use_is_refused_until_its_process_dies(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, holder: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setattr(lock_module, "PATIENCE", 0.2)
    config = tiny(tmp_path, images, steps=4)
    with pytest.raises(UserError, match=f"another process is writing to .*process {holder.pid} on"):
        run(config)
    assert not (tmp_path / "config.yaml").exists()
    holder.kill()  # kill -9
    holder.wait()
    assert run(config).results["steps"] == 4


def test_a_stopped_run_releases_the_lock(tmp_path: Path, images: Path) -> None:
    config = tiny(tmp_path, images, steps=4)
    run_until(config, 3)
    with lock_module.lock(tmp_path) or pytest.fail("no lock"):
        pass
    assert run(replace(config, resume="must")).results["steps"] == 4
