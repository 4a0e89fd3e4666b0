"""`localign doctor`: its option and its output. What it finds is in :mod:`localign.doctor`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from localign.text.printing import printable


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Show what this machine and this installation can do, and why not the rest."""

    json: bool = False
    """Print JSON instead of lines."""


def run_doctor(config: DoctorConfig) -> None:
    """Print the findings as lines, or as JSON."""
    from localign.doctor import findings  # here, because the help needs no torch

    found = findings()
    if config.json:
        print(json.dumps(found, indent=1))
        return
    for title, entries in found.items():
        print(title)
        width = max(map(len, entries)) + 2
        for name, value in entries.items():
            print(f"  {name:<{width}}{printable(value)}")
