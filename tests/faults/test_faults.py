"""Runs with one fault after another, each resumed until the end. The faults must leave no trace.

Afterwards every step is in the log once, with the samples, losses and weights of a run without faults, and no file is
half-written.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from engine_runs import logged, make_images, same_bits, tiny
from fault_kinds import ON_THE_DISK, Fault
from fault_runs import KILLED, do_part
from rank_forks import RanksEnd
from safetensors.torch import load_file
from sharded_runs import token

from localign.alignment import AlignConfig
from localign.engine import TrainConfig
from localign.engine.checkpoints.replicated import Checkpoints

STEPS = 30
TIMEOUT = 15.0
"""Seconds that ranks wait for one another; longer than a busy machine delays one of them."""
POISON = [7, 20]
"""Steps with a NaN loss in every run of this file, counted from 0."""

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="looks at processes through /proc"
)

ENDS_BY_KILL = (
    "kill -9 in a step", "kill -9 while saving", "kill -9 before a rename", "kill -9 before old checkpoints go",
    "kill -9 while logging",
)  # fmt: skip
STOPS = ("SIGTERM in a step", "SIGUSR1 in a step", "SIGTERM while saving")
GOES_ON = ("SIGSTOP, SIGCONT", "slow disk")
DISKS = ("disk full", "disk read-only", "run folder gone")
DAMAGE = ("byte flipped", "file truncated", "file missing")
MOVES = ("other host, clock, path",)
RANKS = ("a rank dies", "a rank hangs")
NAN = "loss not a number"


@dataclass
class Tally:
    """Counts of faults by kind."""

    tried: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def table(self) -> str:
        """The counts as a Markdown table."""
        rows = [f"| {kind} | {count} | {self.survived[kind]} |" for kind, count in sorted(self.tried.items())]
        total = f"| **all** | **{self.tried.total()}** | **{self.survived.total()}** |"
        return "\n".join(["| fault | tried | survived |", "|---|---:|---:|", *rows, total])

    def add(self, campaign: Campaign, kinds: list[str]) -> None:
        """Run a campaign. If its run is wrong, none of its faults counts as survived."""
        try:
            campaign.run(kinds)
            self.survived.update(campaign.tried)
        except AssertionError as error:
            self.problems.append(str(error))
        self.tried.update(campaign.tried)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of images for training and for validation."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("train", "val"):
        (folder / name).mkdir()
    return make_images(folder / "train", 20), make_images(folder / "val", 4, seed=1)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB, or an ordinary folder if none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True
        ).returncode
    )
    yield folder
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def alignment(out: Path, pictures: tuple[Path, Path]) -> AlignConfig:
    return tiny(
        out, pictures[0], val=str(pictures[1]), val_every=7, ema_decay=0.9, steps=STEPS, keep_checkpoints=3,
        resume="auto", timeout=TIMEOUT,
    )  # fmt: skip


def tokens(out: Path) -> TrainConfig:
    """A sharded run, which writes its checkpoints in a thread."""
    return token(out, steps=STEPS, val_every=7, keep_checkpoints=3, resume="auto", timeout=TIMEOUT)


class Campaign:
    """One run with faults, and the run without faults that it must equal.

    Args:
        config: Options of the run.
        ranks: Number of processes of each part.
        seed: Seed of the steps at which faults strike.
    """

    def __init__(self, config: Any, ranks: int, seed: int) -> None:
        self.config, self.ranks = config, ranks
        self.draw = random.Random(seed)
        self.out = Path(config.out)
        self.tried: list[str] = []
        self.is_align = isinstance(config, AlignConfig)
        self.disturbances: dict[str, Any] = {"poison": POISON if self.is_align else POISON[0]}

    def part(self, config: Any, *faults: Fault, **options: Any) -> RanksEnd:
        return do_part(config, *faults, ranks=self.ranks, **options, **self.disturbances)

    def run(self, kinds: list[str]) -> None:
        """Let faults strike in order at random steps, finish the run, and compare it."""
        self.tried = [NAN] * (len(POISON) if self.is_align else 1)
        steps = sorted(self.draw.sample(range(3, STEPS - 1), len(kinds)))
        for kind, step in zip(kinds, steps, strict=True):
            self.tried.append(kind)
            if kind in DAMAGE:
                self.damage(kind)
            elif kind in MOVES:
                self.move()
            else:
                self.strike(Fault(kind, step, self.ranks - 1 if kind in RANKS else 0))
            self.check_files()
        self.finish()
        self.compare(self.uninterrupted())

    def strike(self, fault: Fault) -> None:
        """Do one part of the run, which ends by the fault, or by SIGTERM in the next step."""
        config = replace(self.config, workers=1) if "worker" in fault.kind else self.config
        faults = [fault]
        if fault.kind in GOES_ON:
            faults.append(Fault("SIGTERM in a step", fault.step + 1))
        outcome = self.part(config, *faults)
        report = f"{fault}: {outcome.codes}\n{outcome.output}"
        assert "Traceback" not in outcome.output, report
        if fault.kind in ENDS_BY_KILL:
            assert KILLED in outcome.codes, report
        elif fault.kind in STOPS + GOES_ON:
            assert outcome.codes == [0] * self.ranks, report
            assert "stopped after step" in outcome.output, report
        elif fault.kind in RANKS:
            assert sorted(outcome.codes) == [KILLED, 1], report
            assert outcome.seconds < TIMEOUT + 60, report
            (line,) = outcome.lines
            assert "lost another rank" in line, report
        else:
            assert outcome.codes == [1] * self.ranks, report
            assert len(set(outcome.lines)) == 1, report
            cause = "a loader worker died" if "worker" in fault.kind else "cannot write"
            assert cause in outcome.lines[0], report
            self.mend(fault)

    def mend(self, fault: Fault) -> None:
        """Repair the disk."""
        if fault.kind == "disk read-only":
            subprocess.run(["umount", self.out], check=True)
        elif fault.kind == "run folder gone":
            assert not self.out.exists(), "a run folder that was moved away was created again"
            self.out.with_name("moved-away").rename(self.out)
        elif fault.kind in ON_THE_DISK:
            (self.out.parent / "ballast").unlink()

    def damage(self, kind: str) -> None:
        """Damage the newest checkpoint. A resume must report it and use the previous one."""
        store = Checkpoints(self.out / "checkpoints")
        before, newest = store.steps()[-2:]
        file = self.draw.choice(sorted(p for p in store.path(newest).iterdir()))
        content = bytearray(file.read_bytes())
        if kind == "byte flipped":
            content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
        elif kind == "file truncated":
            del content[self.draw.randrange(len(content)) :]
        file.unlink()
        if kind != "file missing":
            file.write_bytes(content)
        outcome = self.part(self.config, Fault("SIGTERM in a step", newest))
        assert f"resuming from the previous checkpoint: step {before}" in outcome.output, outcome.output
        assert f"{store.path(newest)} is damaged: " in outcome.output, outcome.output
        assert str(file.name) in outcome.output, outcome.output

    def move(self) -> None:
        """Move the run folder and its images, and resume on another host in another year."""
        new = self.out.with_name(f"{self.out.name}-moved")
        self.out.rename(new)
        self.out, self.config = new, replace(self.config, out=str(new))
        if self.is_align:
            folder = Path(self.config.data)
            copy = new.parent / f"copy-{len(self.tried)}" / folder.name
            shutil.copytree(folder, copy)
            self.config = replace(self.config, data=str(copy))
        last = Checkpoints(self.out / "checkpoints").steps()[-1]
        outcome = self.part(self.config, Fault("SIGTERM in a step", last), other_host=True)
        assert outcome.codes == [0] * self.ranks, outcome.output

    def finish(self) -> None:
        outcome = self.part(self.config)
        assert outcome.codes == [0] * self.ranks, outcome.output

    def uninterrupted(self) -> Path:
        config = replace(self.config, out=str(self.out.with_name("uninterrupted")))
        outcome = self.part(config)
        assert outcome.codes == [0] * self.ranks, outcome.output
        return Path(config.out)

    def check_files(self) -> None:
        store = Checkpoints(self.out / "checkpoints")
        for step in store.all_steps():
            assert store.verify(step), "a checkpoint has no checksums"
        for name in ("results.json", "checkpoints/best.json"):
            if (self.out / name).exists():
                json.loads((self.out / name).read_text())

    def compare(self, expected: Path) -> None:
        """Compare with the run without faults."""
        self.check_files()
        assert not list(self.out.rglob(".*.tmp"))
        assert not list(self.out.rglob("*.damaged"))
        assert sorted(logged(self.out, "samples")) == list(range(1, STEPS + 1))
        for name in ("samples", "loss", "val_loss", "grad_norm", "lr"):
            assert logged(self.out, name) == logged(expected, name), name
        last = f"step-{STEPS:07d}"
        for theirs in sorted((expected / "checkpoints" / last).glob("*.safetensors")):
            ours = self.out / "checkpoints" / last / theirs.name
            assert same_bits(load_file(ours), load_file(theirs)), theirs.name
        exported = [load_file(p / "export" / "model.safetensors") for p in (self.out, expected)]
        assert same_bits(*exported)
        results = [json.loads((p / "results.json").read_text()) for p in (self.out, expected)]
        for name in ("samples_digest", "skipped_steps", "best", "final", "steps"):
            assert results[0][name] == results[1][name], name


def disk_kinds(disk: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Disk faults; simulated if no file system can be mounted."""
    if os.path.ismount(disk):
        return list(DISKS)
    with capsys.disabled():
        print("\nno file system can be mounted: full and read-only disks are simulated")
    return ["disk full, simulated", "disk read-only, simulated", "run folder gone"]


@pytest.mark.slow
def test_a_few_faults(disk: Path, pictures: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    campaign = Campaign(alignment(disk / "run", pictures), 1, seed=0)
    full, _, _ = disk_kinds(disk, capsys)
    kinds = ["SIGTERM in a step", "kill -9 while saving", full, "byte flipped", "SIGUSR1 in a step"]
    campaign.run(kinds)


def shuffled(kinds: list[str], draw: random.Random) -> list[str]:
    """Shuffle kinds of faults. Those that need a checkpoint come last."""
    return sorted(draw.sample(kinds, len(kinds)), key=lambda kind: kind in DAMAGE + MOVES)


@pytest.mark.slow
@pytest.mark.thorough
def test_fifty_faults_and_more(
    disk: Path, pictures: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tally, draw = Tally(), random.Random(7)
    always = [*ENDS_BY_KILL, *STOPS, *GOES_ON, *disk_kinds(disk, capsys), *DAMAGE]
    plain = [*always, "kill -9 of a loader worker", *MOVES]
    pairs = [*RANKS, *STOPS, "kill -9 in a step", "byte flipped"]
    campaigns = [
        *(
            (alignment(disk / f"plain-{seed}" / "run", pictures), 1, shuffled(plain, draw))
            for seed in range(2)
        ),
        *((tokens(disk / f"sharded-{seed}" / "run"), 1, shuffled(always, draw)) for seed in range(2)),
        (alignment(disk / "ranks" / "run", pictures), 2, shuffled(pairs, draw)),
        (tokens(disk / "sharded-ranks" / "run"), 2, shuffled(pairs, draw)),
    ]
    for seed, (config, ranks, kinds) in enumerate(campaigns):
        Path(config.out).parent.mkdir()
        tally.add(Campaign(config, ranks, seed), kinds)
        shutil.rmtree(Path(config.out).parent)
    with capsys.disabled():
        print(f"\n{tally.table()}")
    assert not tally.problems, "\n\n".join(tally.problems)
    assert tally.tried.total() >= 50
