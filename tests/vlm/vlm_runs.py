"""Small training runs of vision-language models, shared by several test files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_vlm import tiny_llm, tiny_tokenizer
from vlm_models import picture

from localign.cli import main

STEPS = 6


def write_conversations(folder: Path) -> Path:
    """Write records with and without images, of one to three turns, and two language models; returns the folder."""
    records = []
    for number in range(30):
        record: dict[str, Any] = {"id": f"r{number}", "conversations": []}
        if number % 4:
            picture(number, (20 + number, 24)).save(folder / f"{number}.png")
            record["image"] = f"{number}.png"
        for turn in range(1 + number % 3):
            mark = "<image>\n" if not turn and number % 4 else ""
            record["conversations"] += [
                {"from": "human", "value": f"{mark}What is {number}{'?' * (number % 7 * 4)}"},
                {"from": "gpt", "value": f"It is {number + turn}."},
            ]
        records.append(record)
    (folder / "train.json").write_text(json.dumps(records))
    (folder / "val.json").write_text(json.dumps(records[:7]))
    for kind in ("llama", "qwen"):
        tiny_llm(kind).save_pretrained(folder / kind)
        tiny_tokenizer(bos=kind == "llama").save_pretrained(folder / kind)
    return folder


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    # With an eps above the rounding errors of gradients, Adam does not amplify them.
    return [
        "vlm", "train", "--data", str(data / "train.json"), "--val", str(data / "val.json"), "--llm",
        str(data / "llama"), "--batch-size", "8", "--steps", str(STEPS), "--max-length", "128", "--lr", "1e-3",
        "--eps", "1e-5", "--workers", "0", "--log-every", "1", "--device", "cpu", "--out", str(out), *more,
    ]  # fmt: skip


def trained(data: Path, out: Path, *more: str) -> dict[str, torch.Tensor]:
    assert main(arguments(data, out, *more)) == 0
    return load_file(out / "export" / "model.safetensors")


def forget_the_end(out: Path, steps: Iterable[int]) -> None:
    """Delete the results and the checkpoints of some steps of a run."""
    for step in steps:
        for path in out.glob(f"checkpoints/step-*{step}"):
            shutil.rmtree(path)
    (out / "results.json").unlink()


def logged(out: Path, field: str) -> dict[int, Any]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {e["step"]: e[field] for e in entries if field in e}


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")  # noqa: B023


def without_llm(command: list[str]) -> list[str]:
    at = command.index("--llm")
    return command[:at] + command[at + 2 :]
