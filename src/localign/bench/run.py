"""From options to a table on the screen and a JSON file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from localign.bench.config import BenchConfig
from localign.bench.labels import bench_labels
from localign.bench.probe import PLAIN, SEPARATE, bench_probe
from localign.engine import run_folder
from localign.files import replace_text


def run_bench(config: BenchConfig) -> dict[str, Any]:
    """Measure, show and write; returns what the JSON file holds."""
    measure, tables = _MEASUREMENTS[config.what]
    measured = measure(config)
    content = {
        "command": "bench",
        "config": run_folder.to_dict(config),
        "versions": run_folder.provenance(),
        **measured,
    }
    console = Console(width=None if sys.stdout.isatty() else 110)
    for table in tables(content):
        console.print(table)
    path = Path(config.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(content, indent=1) + "\n")
    print(f"results    {path}")
    return content


def labels_tables(content: dict[str, Any]) -> list[Table]:
    """How many label maps a second each way reduces."""
    title = "{maps} label maps of {size} pixels, patches of {patch}, {classes} classes".format(**content)
    table = _table(title, content, ("way",), ("images/s", "times slower", "in CPU time"))
    for row in content["ways"]:
        table.add_row(
            row["way"],
            f"{row['images_per_second']:,.0f}",
            f"{row['times_slower']['wall']:.1f}",
            f"{row['times_slower']['cpu']:.1f}",
        )
    return [table]


def probe_tables(content: dict[str, Any]) -> list[Table]:
    """What each way costs, and that all come to the same recall."""
    images = content["images"]
    title = f"6 heads on {content['backbone']}, {content['steps']} steps on {images['train']} scenes"
    numbers = ("wall, s", "CPU, s", f"times cheaper than {PLAIN}", f"than {SEPARATE}")
    costs = _table(title, content, ("way",), numbers)
    for row in content["ways"]:
        seconds, cheaper = row["seconds"], row["times_cheaper"]
        ratios = [f"{cheaper[way]['wall']:.2f} (CPU {cheaper[way]['cpu']:.2f})" for way in (PLAIN, SEPARATE)]
        costs.add_row(row["way"], f"{seconds['wall']:.1f}", f"{seconds['cpu']:.1f}", *ratios)
    ways = [name for name in content["recalls"][0] if name not in ("head", "task", "scatter")]
    recalls = Table(
        title=f"Macro recall, %, on {images['test']} scenes",
        caption="scatter: standard deviation over seeds, in points",
    )
    for i, name in enumerate(("head", "task", *ways, "largest difference", "scatter")):
        recalls.add_column(name, justify="left" if i < 2 else "right")
    for row in content["recalls"]:
        values = [row[way] for way in ways]
        known = None not in values
        recalls.add_row(
            row["head"],
            row["task"],
            *(_percent(v) for v in values),
            _percent(max(values) - min(values) if known else None),
            _percent(row["scatter"]),
        )
    return [costs, recalls]


def vlm_tables(content: dict[str, Any]) -> list[Table]:
    """What each way trains on in a second, and where the difference comes from."""
    title = (
        "Training with the language model {llm}, {image_tokens} tokens an image\n"
        "{conversations} conversations ({text_only} of text alone), {micro_batch} to a micro-batch"
    ).format(**content)
    cuda = content["hardware"]["device"].startswith("cuda")
    others = next((list(row["times_faster"]) for row in content["ways"] if row["fits"]), [])
    numbers = ("tokens/s", "padding, %", *(f"times faster than {other}" for other in others))
    table = _table(title, content, ("way",), (*numbers, *(("MFU, %", "peak, GiB") if cuda else ())))
    loading = max(row["loading_seconds"]["wall"] for row in content["ways"])
    table.caption = (
        f"{table.caption}\nwithout loading, which took at most {loading:.1f} s for all conversations"
    )
    for row in content["ways"]:
        if not row["fits"]:
            table.add_row(row["way"], "does not fit")
            continue
        speeds = [(row["tokens_per_second"], ",.0f")]
        speeds += [(row["times_faster"][other], ".2f") for other in others]
        speed, *faster = (_in_both_times(*s, wall_alone=cuda) for s in speeds)
        cells = [speed, f"{100 * row['padding']:.0f}", *faster]
        if cuda:
            mfu = "–" if row["mfu"] is None else f"{100 * row['mfu']:.0f}"
            cells += [mfu, f"{row['peak_bytes'] / 2**30:.1f}"]
        table.add_row(row["way"], *cells)
    return [table]


def answers_tables(content: dict[str, Any]) -> list[Table]:
    """What each way takes to read the files and to score an answer to every question."""
    title = "{questions:,} questions of VQAv2, ten annotators each".format(**content)
    numbers = ("loading, s", "memory at its peak, MB", "scoring, s")
    table = _table(title, content, ("way",), numbers)
    for row in content["ways"]:
        peak = row["peak_bytes"]
        loading, scoring = (
            _in_both_times(row[part], ".1f", wall_alone=False) for part in ("loading", "scoring")
        )
        table.add_row(row["way"], loading, "–" if peak is None else f"{peak / 1e6:,.0f}", scoring)
    return [table]


def loader_tables(content: dict[str, Any]) -> list[Table]:
    """How many crops each way loads in a second of one core."""
    title = "{images} {photographs}, {megapixels:.1f} megapixels and {kilobytes:,.0f} KB each, to {size} pixels".format(
        **content
    )
    numbers = ("images/s and core", "times faster than plain", "images/s")
    table = _table(title, content, ("way", "decode"), numbers)
    table.caption = (
        f"{table.caption}, {content['workers'] or 'no'} workers\n"
        f"scaled crops are {content['mean_difference']:.2f} of 255 levels away from full ones, on average"
    )
    for row in content["ways"]:
        speed, faster = row["images_per_second"], row["times_faster"]
        table.add_row(
            row["way"], row["decode"], f"{speed['cpu']:.1f}", f"{faster['cpu']:.2f}", f"{speed['wall']:.1f}"
        )
    return [table]


def scaling_tables(content: dict[str, Any]) -> list[Table]:
    """What a step costs in each case, and what goes over the network."""
    title = "A step of aligning {backbone}, {parameters:,} trained parameters".format(**content)
    numbers = (
        "ranks",
        "images a step",
        "patches an image",
        "CPU, s, all ranks",
        "wall, s",
        "sent, MB",
        "foreseen",
    )
    table = _table(title, content, (), numbers)
    for row in content["cases"]:
        sent = row["sent_bytes"]
        table.add_row(
            *(str(row[name]) for name in ("ranks", "images", "tokens")),
            f"{row['cpu_seconds']:.2f}",
            f"{row['wall_seconds']:.2f}",
            "–" if sent is None else f"{sent / 1e6:.1f}",
            f"{row['foreseen_bytes'] / 1e6:.1f}",
        )
    return [table]


def align_tables(content: dict[str, Any]) -> list[Table]:
    """What a step of either way costs, and how much of the ceiling it comes to."""
    cuda = content["hardware"]["device"].startswith("cuda")
    tables = []
    for part in content["parts"]:
        title = "Steps of aligning {backbone}, {precision}, {images} of {size} pixels".format(
            **content, images=part["images"]
        )
        ratios = ("times faster", "without loading") if part["agree"] else ()
        numbers = ("images/s", *ratios, "TFLOP/s", "MFU, %", "peak, GiB", "data wait, %", "loss")
        table = _table(title, content, ("way", "batch"), numbers)
        table.caption = (
            f"{table.caption}\nMFU: of {content['ceiling_flops'] / 1e12:.3g} TFLOP/s, the fastest product of matrices"
            + ("" if part["agree"] else "\nthe ways disagree about the loss: nothing is compared")
        )
        for row in part["ways"]:
            if not row["fits"]:
                table.add_row(row["way"], str(row["batch_size"]), "does not fit")
                continue
            named = ("times_faster", "times_faster_without_loading") if part["agree"] else ()
            table.add_row(
                row["way"],
                str(row["batch_size"]),
                _in_both_times(row["images_per_second"], ".2f", wall_alone=cuda),
                *(_in_both_times(row[name], ".2f", wall_alone=cuda) for name in named),
                f"{row['flops_per_second'] / 1e12:.3f}",
                f"{100 * row['mfu']:.0f}",
                f"{row['peak_bytes'] / 2**30:.2f}",
                f"{100 * row['data_wait']:.0f}",
                f"{row['loss']:.5f}",
            )
        tables.append(table)
    return tables


def _in_both_times(value: dict[str, float], form: str, wall_alone: bool) -> str:
    return f"{value['wall']:{form}}" + ("" if wall_alone else f" (CPU {value['cpu']:{form}})")


def _bench_vlm(config: BenchConfig) -> dict[str, Any]:
    from localign.bench.vlm import bench_vlm  # transformers take a while to import

    return bench_vlm(config)


def _bench_answers(config: BenchConfig) -> dict[str, Any]:
    from localign.bench.answers import bench_answers

    return bench_answers(config)


def _bench_loader(config: BenchConfig) -> dict[str, Any]:
    from localign.bench.loader import bench_loader

    return bench_loader(config)


def _bench_scaling(config: BenchConfig) -> dict[str, Any]:
    from localign.bench.scaling import bench_scaling

    return bench_scaling(config)


def _bench_align(config: BenchConfig) -> dict[str, Any]:
    from localign.bench.align import bench_align

    return bench_align(config)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _table(title: str, content: dict[str, Any], texts: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    where = content["hardware"]
    threads = f"{where['threads']} thread{'s' if where['threads'] > 1 else ''}"
    table = Table(title=title, caption=f"{where['processor']}, {where['device']}, {threads}")
    for name in texts:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


_MEASUREMENTS: dict[str, tuple[Callable[[BenchConfig], dict[str, Any]], Callable[..., list[Table]]]] = {
    "labels": (bench_labels, labels_tables),
    "probe": (bench_probe, probe_tables),
    "vlm": (_bench_vlm, vlm_tables),
    "answers": (_bench_answers, answers_tables),
    "loader": (_bench_loader, loader_tables),
    "scaling": (_bench_scaling, scaling_tables),
    "align": (_bench_align, align_tables),
}
"""What measures, and how it is shown."""
