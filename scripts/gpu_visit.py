"""Run the parts of a visit to a GPU one after the other, each with its own time limit; see gpu_visit.sh."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TINY = bool(os.environ.get("TINY"))
OUT = Path(os.environ.get("OUT", "runs/gpu"))
MODELS = Path(os.environ.get("MODELS", "runs/real/models"))
PHOTOGRAPHS = Path(os.environ.get("PHOTOGRAPHS", "../shared/data/coco-things"))
MARK = "PROBE "
SHOWN_LINES = 25
PROBE, SCIENCE = "scripts/gpu_probe.py", "scripts/gpu_science.py"
TESTS = (
    "tests/backbones/test_soft_cap.py tests/vlm/model/test_vlm_packing.py tests/vlm/model/test_vlm_liger.py"
)
DEVICE = "--device cpu" if TINY else "--device cuda"


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    limit: int
    """Seconds until it is ended, so that the next part has its turn."""
    command: str
    """Arguments of Python; ``{json}`` is a file that it writes, ``{work}`` a folder of the visit."""


def align(name: str, backbone: str, batch: int, limit: int, more: str = "") -> Part:
    """Alignment steps beside the published mathematics in plain torch, eager."""
    size = "--backbone vit_tiny_patch16_224 --image-size 32 --batch-size 2 --steps 2"
    size = size if TINY else f"--backbone {backbone} --batch-size {batch} --steps 5"
    return Part(name, limit, f"-m localign bench align {size} {more} {DEVICE} --out {{json}}")


def vlm(name: str, llm: str, limit: int, more: str = "") -> Part:
    """Training steps of a vision-language model."""
    size = f"--llm {'tiny' if TINY else llm} --batch-size 4 --micro-batch 4 --steps 16 --repeats 1"
    return Part(name, limit, f"benchmarks/run.py vlm {size} {more} {DEVICE} --out {{json}}")


def one_run(attention: str, more: str = "") -> str:
    """A run of `localign align` on drawn photographs."""
    size = "--backbone vit_tiny_patch16_224 --image-size 32 --batch-size 2 --steps 6 --workers 0"
    full = "--backbone vit_so400m_patch14_siglip_384 --batch-size 16 --steps 12 --workers 8"
    return (
        f"-m localign align --weights none {size if TINY else full} --data {{work}}/photographs --scale-images 8 "
        f"--log-every 2 --attention {'eager' if TINY else attention} {more} {DEVICE} --out {{work}}/run-{attention}"
    )


VISITS = {
    "a": [
        Part("environment", 60, f"{PROBE} env paths"),
        Part("tests", 120, f"-m pytest -q -p no:cacheprovider {TESTS} -k 'gradients_equal or kernel'"),
        Part("flex", 110, f"{PROBE} flex"),
        align("align-b", "clip-vit-b", 256, 110),
        Part("syncs", 60, f"{PROBE} syncs"),
        Part("photographs", 20, f"{PROBE} photographs {{work}}/photographs"),
        Part("profile", 90, one_run("flex", "--profile 3")),
        align("align-l", "clip-vit-l-336px", 32, 100),
        align("align-so400m", "siglip-vit-so400m-384px", 16, 100),
    ],
    "b": [
        vlm("vlm-1b", "1b", 130),
        Part("fsdp", 60, f"{PROBE} fsdp"),
        align("align-b-compiled", "clip-vit-b", 256, 200, "--compile"),
        vlm("vlm-1b-compiled", "1b", 160, "--compile"),
        vlm("vlm-7b-lora", "7b", 240, "--stage lora --grad-checkpointing"),
        Part("photographs", 20, f"{PROBE} photographs {{work}}/photographs"),
        Part("run-eager", 100, one_run("eager")),
        Part("run-flex", 100, one_run("flex")),
    ],
    "c": [
        Part("vision", 420, f"{SCIENCE} vision {{work}} {MODELS} {PHOTOGRAPHS}"),
        Part("language", 420, f"{SCIENCE} language {{work}} {MODELS} {PHOTOGRAPHS}"),
    ],
}


def run(part: Part, work: Path) -> dict[str, Any]:
    """Run a part to its end or limit, show the end of its output, and return what it found."""
    out = work / f"{part.name}.json"
    command = shlex.split(part.command.format(json=out, work=work))
    print(f"=== {part.name}: python {shlex.join(command)}", flush=True)
    begun = time.monotonic()
    log = work / f"{part.name}.txt"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT)
        try:
            rc: int | str = process.wait(part.limit * (10 if TINY else 1))  # CPUs are shared
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            rc = "time is up"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    print("\n".join(lines[-SHOWN_LINES:]), flush=True)
    facts: dict[str, Any] = {"name": part.name, "command": shlex.join(command), "rc": rc}
    facts["seconds"] = round(time.monotonic() - begun, 1)
    facts["figures"] = [json.loads(line[len(MARK) :]) for line in lines if line.startswith(MARK)]
    if out.is_file():
        facts["figures"].append(json.loads(out.read_text()))
    if rc != 0 or not facts["figures"]:
        facts["output"] = lines[-SHOWN_LINES:]
    print(f"--- {part.name}: rc {rc}, {facts['seconds']} s", flush=True)
    return facts


def main() -> int:
    """Run a visit. The exit code is 1 if a part failed."""
    if sys.argv[1:] not in (["a"], ["b"], ["c"]):
        print("usage: bash scripts/gpu_visit.sh a|b|c", file=sys.stderr)
        return 2
    visit = sys.argv[1]
    OUT.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        for part in VISITS[visit]:
            found.append(run(part, Path(work)))
            content = {"visit": visit, "tiny": TINY, "parts": found}
            temporary = OUT / f"visit-{visit}.json.new"
            temporary.write_text(json.dumps(content, indent=1) + "\n")
            temporary.replace(OUT / f"visit-{visit}.json")
    failed = [part["name"] for part in found if part["rc"] != 0]
    print(
        f"{len(found) - len(failed)} of {len(found)} parts ended well{': not ' if failed else ''}{', '.join(failed)}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
