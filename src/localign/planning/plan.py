"""The plan of an alignment, from its options."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from localign.alignment.setup import PUBLISHED_BATCH
from localign.engine.schedule import batch_shares, computes_in_bf16, total_steps
from localign.errors import UserError
from localign.gpus import gpu
from localign.options.plan import PlanConfig
from localign.planning.counting import CountedAlignment, Flops, Memory, mask_cost
from localign.planning.pretraining import pretraining_flops

GIB = 2**30
OCCUPIED = 0.9
"""Usable share of a GPU's memory. The rest is left for the CUDA context, libraries and fragmentation."""


@dataclass(frozen=True)
class AlignmentPlan:
    """Size and duration of an alignment."""

    parameters: dict[str, int]
    """Number of parameters of teacher, encoder and decoder."""
    trained: int
    """Number of trained parameters."""
    flops: Flops
    """Operations per image."""
    mask_cost: float | None
    """Operations per image divided by those with one mask; None if the run has one mask per image."""
    memory: Memory
    """Memory of one rank, which holds the whole student."""
    images_per_rank: int
    """Images per rank and optimizer step."""
    largest: int | None
    """Images in the largest micro-batch that fits and divides ``images_per_rank``; None if one image does not fit."""
    images: int
    """Training images over the whole run; repetitions count."""
    steps: int
    """Optimizer steps."""
    images_per_second: float
    """Training speed of all GPUs together, at the assumed share of their peak."""
    decode_cores: float
    """CPU cores needed to decode images, over all nodes."""
    hours: float
    """Duration of the run."""
    gpu_hours: float
    """Duration times the number of GPUs."""
    pretraining_share: float | None
    """Operations of the run divided by those of the backbone's pre-training; None if these are unknown."""


def make_plan(config: PlanConfig) -> AlignmentPlan:
    """Count one step of the run and derive the plan of the whole run.

    Raises:
        UserError: The backbone or the number of images is unknown, options do not fit together, or the batch does not
            divide by the ranks.
    """
    if config.sharding != "none":
        raise UserError("alignment holds the whole model on every rank; leave --sharding at none")
    if config.batch_size == 0:
        config = replace(config, batch_size=PUBLISHED_BATCH)
    steps = total_steps(config, config.images if config.steps is None else 1)
    per_rank, _ = batch_shares(config, config.gpus)
    counted = CountedAlignment(config)
    flops, memory = counted.flops(), counted.memory()
    card = gpu(config.gpu)
    peak = 1e12 * (card.bf16 if computes_in_bf16(config, "cuda") else card.fp32)
    rate = config.gpus * peak * config.mfu / flops.total
    hours = steps * config.batch_size / rate / 3600
    known = pretraining_flops(config.backbone) if config.weights != "none" else None
    divisors = [n for n in range(1, per_rank + 1) if per_rank % n == 0]
    fitting = [n for n in divisors if memory.of(n) <= OCCUPIED * card.gib * GIB]
    return AlignmentPlan(
        parameters=counted.parameters(),
        trained=counted.trained,
        flops=flops,
        mask_cost=mask_cost(config, flops),
        memory=memory,
        images_per_rank=per_rank,
        largest=max(fitting, default=None),
        images=steps * config.batch_size,
        steps=steps,
        images_per_second=rate,
        decode_cores=rate / config.decode_rate,
        hours=hours,
        gpu_hours=hours * config.gpus,
        pretraining_share=None if known is None else steps * config.batch_size * flops.total / known,
    )


def as_facts(plan: AlignmentPlan) -> dict[str, Any]:
    """The plan as JSON content, with the peak bytes for several micro-batches."""
    by_size = {str(n): plan.memory.of(n) for n in micro_batches(plan)}
    return {**asdict(plan), "bytes_by_micro_batch": by_size}


def micro_batches(plan: AlignmentPlan) -> list[int]:
    """Micro-batches to show: powers of two below a rank's images per step, and all of them; the 8 largest."""
    powers = [2**n for n in range(plan.images_per_rank.bit_length()) if 2**n < plan.images_per_rank]
    return [*powers, plan.images_per_rank][-8:]
