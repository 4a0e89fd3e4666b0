"""From the options of an alignment to what it takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from localign.alignment.setup import PUBLISHED_BATCH
from localign.engine.schedule import batch_shares, computes_in_bf16, total_steps
from localign.errors import UserError
from localign.gpus import gpu
from localign.options.plan import PlanConfig
from localign.planning.counting import CountedAlignment, Flops, Memory, mask_cost

GIB = 2**30
OCCUPIED = 0.9
"""Share of a GPU's memory that is planned for: the rest is the context, the libraries and fragments."""


@dataclass(frozen=True)
class AlignmentPlan:
    """What an alignment takes."""

    parameters: dict[str, int]
    """Of teacher, encoder and decoder."""
    trained: int
    """Trained parameters."""
    flops: Flops
    """Per image."""
    mask_cost: float | None
    """Operations per image as a multiple of those with a single mask; None with one alone."""
    memory: Memory
    """Of a rank, which holds a whole student."""
    images_per_rank: int
    """Of an optimizer step."""
    largest: int | None
    """Images of the largest micro-batch that fits and divides a rank's share; None where not even one does."""
    images: int
    """Training images in all, repetitions counted."""
    steps: int
    images_per_second: float
    """On all GPUs, at the assumed share of their peak."""
    decode_cores: float
    """CPU cores that decoding keeps busy, over all nodes."""
    hours: float
    gpu_hours: float


def make_plan(config: PlanConfig) -> AlignmentPlan:
    """Count a step of the run and say what all of it takes.

    Raises:
        UserError: The run could not start so: unknown backbone, options that do not fit one another, a batch that
            does not divide; or the number of images is not known.
    """
    if config.sharding != "none":
        raise UserError("alignments hold their model whole on every rank; leave --sharding at none")
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
    )


def as_facts(plan: AlignmentPlan) -> dict[str, Any]:
    """The plan as JSON holds it, with the memory of a step by the images of its micro-batches."""
    by_size = {str(n): plan.memory.of(n) for n in micro_batches(plan)}
    return {**asdict(plan), "bytes_by_micro_batch": by_size}


def micro_batches(plan: AlignmentPlan) -> list[int]:
    """Powers of two up to a rank's share, and that."""
    powers = [2**n for n in range(plan.images_per_rank.bit_length()) if 2**n < plan.images_per_rank]
    return [*powers, plan.images_per_rank][-8:]
