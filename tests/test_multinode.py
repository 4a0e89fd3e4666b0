"""The commands in the documentation of multi-node runs exist, and its SLURM script works."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

import localign
from localign.cli import parse, split_command

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SCRIPT = DOCS / "slurm.sh"

SRUN = """#!/bin/bash
# Stands in for SLURM: starts the tasks and forwards USR1 to them, but not to their children.
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$((i % SLURM_NTASKS_PER_NODE)) "$@" & tasks[i]=$!
done
trap 'kill -USR1 "${tasks[@]}"' USR1
worst=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2> /dev/null; do wait "$task"; code=$?; done
    ((code > worst)) && worst=$code
done
exit $worst
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo localhost; else echo "$@" >> "$LOGS/requeued"; fi
"""
NAMED = """#!/bin/bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> "$LOGS/ranks"
[[ -z $WRITES ]] || touch "$OUT/results.json"
exit ${CODE:-0}
"""


def tools(folder: Path, command: str) -> dict[str, str]:
    """Stand-ins for SLURM's programs and for localign, and the environment of a job of four tasks on two nodes."""
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL), ("localign", command)):
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    return {
        **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "LOGS": str(folder), "SLURM_JOB_ID": "30007",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "OUT": str(folder),
        "DATA": "/data/images", "WRITES": "",
    }  # fmt: skip


def test_the_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_the_script_starts_ranks_whose_options_exist(tmp_path: Path) -> None:
    subprocess.run(["bash", str(SCRIPT)], env=tools(tmp_path, NAMED), check=True)
    started = sorted(line.split(" ", 6) for line in (tmp_path / "ranks").read_text().splitlines())
    assert [line[:4] for line in started] == [
        ["0", "0", "4", "2"], ["1", "1", "4", "2"], ["2", "0", "4", "2"], ["3", "1", "4", "2"],
    ]  # fmt: skip
    assert {(line[4], line[5]) for line in started} == {("localhost", "30007")}
    (command,) = {line[6] for line in started}
    config = parse(*split_command(shlex.split(command)))
    assert (config.resume, config.out, config.data) == ("auto", str(tmp_path), "/data/images")


@pytest.mark.parametrize(
    ("writes", "code", "requeued"),
    [("", "0", True), ("yes", "0", False), ("", "1", False), ("", "138", True)],
)
def test_the_job_goes_back_into_the_queue_until_there_are_results(
    tmp_path: Path, writes: str, code: str, requeued: bool
) -> None:
    environment = {**tools(tmp_path, NAMED), "WRITES": writes, "CODE": code}
    job = subprocess.run(["bash", str(SCRIPT)], env=environment, check=False)
    assert job.returncode == int(code)
    log = tmp_path / "requeued"
    assert log.exists() == requeued
    if requeued:
        assert log.read_text() == "requeue 30007\n"


def test_the_documented_commands_exist() -> None:
    text = (DOCS / "multinode.md").read_text().replace("\\\n", " ")
    found = re.findall(r"^    .*?(?:-m |\s)localign (.*)$", text, flags=re.MULTILINE)
    assert len(found) == 2
    for line in found:
        parse(*split_command(shlex.split(line.partition(" # ")[0])))
    for option in re.findall(r"`(--[a-z-]+)[ `]", text):
        known = {f"--{name.replace('_', '-')}" for name in vars(parse("align", ["--steps", "1"]))}
        assert option in known | LAUNCHERS, option


LAUNCHERS = {
    "--standalone",
    "--signals-to-handle",
    "--shutdown-timeout",
    "--gpus-per-task",
    "--nproc-per-node",
}
"""Options of torchrun and SLURM that the text names."""


@pytest.mark.slow
def test_a_job_is_stopped_put_back_and_finished(tmp_path: Path) -> None:
    """The real script with real ranks: signal, checkpoint, requeue, resume."""
    tiny = (
        f"exec {shlex.quote(sys.executable)} -m localign align --data scenes --steps 200 --batch-size 4 "
        "--scale-images 8 --checkpoint-every 1000 --log-every 1 --workers 0 --device cpu --timeout 120 --resume auto "
        '--out "$OUT/run"'
    )
    environment = {
        **tools(tmp_path, f"#!/bin/bash\n{tiny}\n"), "SLURM_NTASKS": "2", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(localign.__file__).parents[1]), "OUT": str(tmp_path),
    }  # fmt: skip
    log = tmp_path / "run" / "log.jsonl"
    job = subprocess.Popen(["bash", str(SCRIPT)], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (log.is_file() and log.read_text().count('"loss"') > 2):
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    srun = int(Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()[0])
    os.kill(srun, 10)  # SIGUSR1
    errors = job.communicate(timeout=120)[1].decode()
    assert job.returncode == 0, errors
    assert errors.count("SIGUSR1: stopped after step") == 1, errors
    assert (tmp_path / "requeued").read_text() == "requeue 30007\n"
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert json.loads((checkpoint / "state.json").read_text())["step"] > 2
    subprocess.run(["bash", str(SCRIPT)], env=environment, check=True, timeout=400)
    assert (tmp_path / "run" / "results.json").exists()
