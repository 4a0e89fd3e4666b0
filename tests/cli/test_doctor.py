"""`localign` alone, and `localign doctor`."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
import torch

from localign import doctor
from localign.cli import main
from localign.cli.table import split_command


def test_localign_alone_explains_itself_in_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 10
    commands = [line.split()[1:] for line in lines if line.startswith("  localign ")]
    assert len(commands) == 5
    for command in commands:
        split_command(command)


def test_it_says_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["packages"]["timm"] == metadata.version("timm")
    assert "missing" not in found["packages"].values()
    assert metadata.version("pyarrow") in found["extras"]["parquet"]
    assert "dev" not in found["extras"]
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for part in found.values() for name in part)


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "peft" else version(name))
    assert doctor.findings()["extras"]["lora"] == "no: pip install 'localign[lora]'"


def test_what_needs_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = doctor.findings()
    assert found["devices"]["cuda"].startswith("no: ")
    assert found["back-ends"]["attention flex"] == "no: it needs CUDA"
    assert found["back-ends"]["attention eager"] == "yes"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor.findings()["devices"]["cuda"] == "no: this torch was built without CUDA"
