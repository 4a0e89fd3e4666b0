"""Writes measurements to a JSON file and prints them as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from localign.engine import run_folder
from localign.files import replace_text
from localign.options.bench import MeasurementConfig
from localign.text.printing import console, printable


def write_measurements(config: MeasurementConfig, measured: dict[str, Any]) -> dict[str, Any]:
    """Write measurements to the config's JSON file; returns the content of the file."""
    content = {
        "command": "bench",
        "config": {"what": config.benchmark, **run_folder.to_dict(config)},
        "versions": run_folder.provenance(),
        **measured,
    }
    path = Path(config.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(content, indent=1) + "\n")
    return content


def show(tables: Sequence[Table], config: MeasurementConfig) -> None:
    """Print the tables and the path of the JSON file."""
    for table in tables:
        console(110).print(table)
    print(f"results    {printable(config.file)}")


def timing_table(title: str, content: dict[str, Any], texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table with columns of text, then columns of numbers; its caption names the hardware."""
    hardware = content["hardware"]
    threads = f"{hardware['threads']} thread{'s' if hardware['threads'] > 1 else ''}"
    table = Table(title=title, caption=f"{hardware['processor']}, {hardware['device']}, {threads}")
    for name in texts:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def both_times(value: dict[str, float], form: str, wall_only: bool) -> str:
    """A figure by wall time, with the figure by CPU time in brackets unless ``wall_only``."""
    return f"{value['wall']:{form}}" + ("" if wall_only else f" (CPU {value['cpu']:{form}})")
