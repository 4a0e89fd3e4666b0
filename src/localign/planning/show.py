"""`localign plan`: prints plans and writes them to disk."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from localign.engine import run_folder
from localign.files import replace_text
from localign.gpus import gpu
from localign.options.plan import PlanConfig
from localign.options.vlm.plan import VLMPlanConfig
from localign.planning.plan import GIB, OCCUPIED, AlignmentPlan, as_facts, make_plan, micro_batches
from localign.planning.pretraining import pretraining_of
from localign.planning.vlm import plan_vlm, print_vlm_plan
from localign.text.printing import console, printable


def run_plan(config: PlanConfig) -> None:
    """Plan an alignment, print the plan, and write it to a file if ``out`` is given.

    Raises:
        UserError: See :func:`make_plan`.
    """
    plan = make_plan(config)
    for table in (_run_table(plan, config), _memory_table(plan, config)):
        console(110).print(table)
    _write(config, as_facts(plan))


def run_vlm_plan(config: VLMPlanConfig) -> None:
    """Plan a VLM training, print the plan, and write it to a file if ``out`` is given.

    Raises:
        UserError: See :func:`plan_vlm`.
    """
    plan = plan_vlm(replace(config, plan_ranks=config.gpus))[1]
    print_vlm_plan(plan, config.gpus)
    room = gpu(config.gpu).gib
    fits = "fits" if plan.bytes_per_rank / GIB <= OCCUPIED * room else "does not fit: try --sharding full"
    print(f"{config.gpu:<16} {room:>10.1f} GiB: {fits}")
    _write(config, asdict(plan))


def _write(config: PlanConfig | VLMPlanConfig, facts: dict[str, Any]) -> None:
    if not config.out:
        return
    content = {"command": "plan", "config": run_folder.to_dict(config), "versions": run_folder.provenance()}
    path = Path(config.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({**content, **facts}, indent=1) + "\n")
    print(f"plan       {printable(path)}")


def _run_table(plan: AlignmentPlan, config: PlanConfig) -> Table:
    table = Table(
        title=f"{config.backbone}, {config.objective}: {config.gpus} x {config.gpu}", show_header=False
    )
    table.add_column()
    table.add_column(justify="right")
    for name, count in plan.parameters.items():
        table.add_row(f"parameters, {name}", f"{count / 1e6:,.1f} M")
    table.add_row(
        "GFLOP per image, teacher + student",
        f"{plan.flops.teacher / 1e9:,.1f} + {plan.flops.student / 1e9:,.1f}",
    )
    if plan.mask_cost is not None:
        table.add_row("compute, relative to one mask", f"{plan.mask_cost:.2f}")
    table.add_row("training images, steps", f"{plan.images / 1e6:,.1f} M, {plan.steps:,}")
    table.add_row(f"images/s at {config.mfu:.0%} of the peak", f"{plan.images_per_second:,.0f}")
    table.add_row("CPU cores for decoding", f"{plan.decode_cores:,.0f}")
    table.add_row("hours", f"{plan.hours:,.1f}")
    table.add_row("GPU-hours", f"{plan.gpu_hours:,.0f}")
    share = plan.pretraining_share
    table.add_row(
        "share of the backbone's pre-training compute", "unknown" if share is None else f"{share:.2%}"
    )
    known = pretraining_of(config.backbone)
    pretraining = (
        "" if share is None or known is None else f" Pre-training of the image tower: {known.source}."
    )
    table.caption = (
        f"Assumes that a core decodes {config.decode_rate:g} images/s (`localign bench loader` measures it; "
        f"`localign bench align` measures the share of the peak).{pretraining}"
    )
    return table


def _memory_table(plan: AlignmentPlan, config: PlanConfig) -> Table:
    room = gpu(config.gpu).gib
    memory = plan.memory
    table = Table(title=f"GiB on one {config.gpu} ({room:g} GiB), by images per micro-batch")
    for column in ("micro-batch", "weights", "gradients, moments", "activations etc.", "total", ""):
        table.add_column(column, justify="right")
    for count in micro_batches(plan):
        total = memory.of(count) / GIB
        weights, trained = memory.weights / GIB, (memory.gradients + memory.moments) / GIB
        table.add_row(
            str(count),
            f"{weights:.2f}",
            f"{trained:.2f}",
            f"{total - weights - trained:.2f}",
            f"{total:.2f}",
            "" if total <= OCCUPIED * room else "too large",
        )
    table.caption = (
        f"--micro-batch {plan.largest} is the largest that divides a rank's {plan.images_per_rank} images and fits "
        f"into {OCCUPIED:.0%} of the memory."
        if plan.largest is not None
        else "Not even one image fits: use larger GPUs or --grad-checkpointing."
    )
    return table
