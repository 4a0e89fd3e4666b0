"""Training of a vision-language model on packed and on padded batches, through the code of `localign vlm train`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from benchmarks.config import VLMBenchConfig
from benchmarks.conversations import MIX
from benchmarks.flops import peak_flops, useful_flops
from benchmarks.vlm_setup import training_options
from localign.bench.show import both_times, show, timing_table, write_measurements
from localign.bench.timing import Timing, hardware, timed
from localign.engine.batch import to_device
from localign.engine.distributed import choose_device
from localign.engine.log import say
from localign.engine.optim.build import build_optimizer, scale_and_clip, set_rates
from localign.engine.task import BatchPlan, StepResult
from localign.errors import RunFailure
from localign.options.names import CrossEntropy
from localign.options.vlm.train import Batching, Sampler
from localign.vlm.data.batching import VLMBatch
from localign.vlm.data.prompts import IGNORE_INDEX
from localign.vlm.model.build import build_vlm
from localign.vlm.model.modeling import LocalignVLM
from localign.vlm.task import VLMTask, batch_loss

REPEATS = 3


@dataclass(frozen=True)
class VLMWay:
    """One way to train."""

    name: str
    batching: Batching
    sampler: Sampler
    whole_logits: bool
    """Compute the logits of all tokens at once and transformers' mean loss, instead of labelled tokens in chunks."""
    cross_entropy: CrossEntropy = "chunked"
    """The loss implementation, if ``whole_logits`` is False."""


PADDED, PLAIN = "padded", "padded, whole logits"
WAYS = (
    VLMWay("packed", "packed", "shuffled", False),
    VLMWay("packed, whole logits", "packed", "shuffled", True),
    VLMWay(PADDED, "padded", "shuffled", False),
    VLMWay(PLAIN, "padded", "shuffled", True),
    VLMWay("padded, grouped", "padded", "grouped", False),
    VLMWay("padded, grouped, whole logits", "padded", "grouped", True),
)
"""The last way is that of the published code."""
LIGER = VLMWay("packed, liger", "packed", "shuffled", False, "liger")


def ways(device: torch.device) -> tuple[VLMWay, ...]:
    """The ways to measure on a device; liger-kernel only on CUDA, if it is installed."""
    return (*WAYS, LIGER) if device.type == "cuda" and find_spec("liger_kernel") else WAYS


@dataclass
class Pass:
    """All steps of a pass over the conversations, and the time to load them."""

    steps: list[list[VLMBatch]]
    loading: Timing
    tokens: int
    """Tokens of conversations and their images, without padding."""
    flops: float
    """Floating-point operations, without operations on padding."""

    @property
    def padding(self) -> float:
        """Share of padding in the computed tokens."""
        computed = sum(batch.input_ids.numel() for step in self.steps for batch in step)
        return 1 - self.tokens / computed

    @property
    def records(self) -> list[int]:
        """The sorted indices of the pass's conversations."""
        return sorted(i for step in self.steps for batch in step for i in batch.indices.tolist())


@dataclass
class VLMTimings:
    """The measurements of one way."""

    timings: dict[tuple[int, int], Timing] = field(default_factory=dict)
    """(repeat, step) -> seconds."""
    sums: dict[int, Tensor] = field(default_factory=dict)
    """Step -> float64 ``(2,)``, summed loss and labelled tokens."""
    peak_bytes: int = 0
    fits: bool = True
    """False if the device ran out of memory."""

    def cost(self) -> Timing:
        """The time of a pass: the sum over steps of the median over repeats."""
        steps = {step for _, step in self.timings}
        return Timing.total(
            Timing.median([t for (_, s), t in self.timings.items() if s == step]) for step in steps
        )

    def repeats(self) -> list[Timing]:
        """The time of each repeat."""
        repeats = sorted({repeat for repeat, _ in self.timings})
        return [Timing.total(t for (r, _), t in self.timings.items() if r == repeat) for repeat in repeats]


def run_bench_vlm(config: VLMBenchConfig) -> None:
    """Run the benchmark, write its JSON file, and print its tables."""
    content = write_measurements(config, bench_vlm(config))
    show(vlm_tables(content), config)


def bench_vlm(config: VLMBenchConfig) -> dict[str, Any]:
    """Time whole optimizer steps of each way on the same synthetic conversations; the ways take turns, step by step.

    The learning rate is 0, so all ways see the same weights and must compute the same loss. Loading is timed
    separately.

    Raises:
        UserError: The language model is not available, or sizes do not match.
        RunFailure: The ways compute different losses.
    """
    device = choose_device(config.device)
    with tempfile.TemporaryDirectory() as folder:
        options = training_options(config, Path(folder))
        model, tokenizer = build_vlm(options)
        task = VLMTask(options, model, tokenizer)
        steps = task.samples() // options.batch_size
        passes = {}
        for way in WAYS:
            kind = way.batching, way.sampler
            if kind not in passes:
                chosen = replace(options, batching=way.batching, sampler=way.sampler)
                passes[kind] = _load(VLMTask(chosen, model, tokenizer), steps)
    task.to(device)
    if options.grad_checkpointing:
        task.set_grad_checkpointing()
    if config.compile:
        task.compile()
    measured = _measure(task, passes, config.repeats or REPEATS)
    _check_equal_losses(measured, passes, tolerance=2e-2 if device.type == "cuda" else 1e-4)
    return {
        "llm": Path(config.llm or "tiny").name,
        "parameters": {
            "llm": sum(p.numel() for p in model.language_model.parameters()),
            "vision": sum(p.numel() for p in model.vision.parameters()),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        "stage": options.stage,
        "image_tokens": model.vision.num_tokens,
        "max_length": options.max_length,
        "batch_size": options.batch_size,
        "micro_batch": options.micro_batch or options.batch_size,
        "conversations": len(task.data),
        "text_only": int((~task.data.has_image).sum()),
        "mix": {name: asdict(part) for name, part in MIX.items()},
        "compiled": config.compile,
        "hardware": hardware(device),
        "ways": _rows(measured, passes, device),
    }


def _load(task: VLMTask, steps: int) -> Pass:
    options = task.config
    micro = options.micro_batch if isinstance(options.micro_batch, int) else options.batch_size
    plan = BatchPlan(options.seed, options.batch_size, micro, 0, 1, 0, 0, steps, False)
    batches, loading = timed(lambda: list(task.batches(plan)), torch.device("cpu"))
    per_step = options.batch_size // micro
    return Pass(
        steps=[batches[i : i + per_step] for i in range(0, len(batches), per_step)],
        loading=loading,
        tokens=sum(task.throughput(batch)["tokens"] for batch in batches),
        flops=sum(_flops(task.model, batch) for batch in batches),
    )


def _flops(model: LocalignVLM, batch: VLMBatch) -> float:
    if batch.cu_seqlens is not None:
        lengths = torch.diff(batch.cu_seqlens)
    else:
        assert batch.attention_mask is not None
        lengths = batch.attention_mask.sum(dim=1)
    labelled = int((batch.labels != IGNORE_INDEX).sum())
    return useful_flops(model, lengths.tolist(), labelled, len(batch.images))


def _measure(
    task: VLMTask, passes: dict[tuple[Batching, Sampler], Pass], repeats: int
) -> dict[VLMWay, VLMTimings]:
    optimizer = build_optimizer(task.model, task.config)
    set_rates(optimizer, 0.0)
    measured = {way: VLMTimings() for way in ways(task.device)}
    for repeat in range(-1, repeats):
        say(f"repeat {repeat + 1} of {repeats}" if repeat >= 0 else "warming up")
        # Repeat -1 is the warm-up: one step of each way.
        for step in range(len(passes["packed", "shuffled"].steps) if repeat >= 0 else 1):
            for way, found in measured.items():
                if not found.fits:
                    continue
                batches = passes[way.batching, way.sampler].steps[step]
                try:
                    sums, timing, peak = _timed_step(task, optimizer, way, batches)
                except torch.OutOfMemoryError:
                    found.fits = False
                    say(f"{way.name}: out of memory")
                    optimizer.zero_grad(set_to_none=True)
                    continue
                found.peak_bytes = max(found.peak_bytes, peak)
                if repeat >= 0:
                    found.timings[repeat, step] = timing
                    found.sums[step] = sums
    return measured


def _timed_step(
    task: VLMTask, optimizer: torch.optim.Optimizer, way: VLMWay, batches: Sequence[VLMBatch]
) -> tuple[Tensor, Timing, int]:
    """One step's float64 sums of loss and labelled tokens, its time, and its peak CUDA memory in bytes."""
    cuda = task.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(task.device)
        torch.cuda.reset_peak_memory_stats(task.device)
    loss = whole_logits_loss if way.whole_logits else partial(batch_loss, cross_entropy=way.cross_entropy)
    sums, timing = timed(lambda: _step(task, optimizer, batches, loss), task.device)
    return sums, timing, torch.cuda.max_memory_allocated(task.device) if cuda else 0


def _step(
    task: VLMTask,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[VLMBatch],
    loss: Callable[[LocalignVLM, VLMBatch], StepResult],
) -> Tensor:
    """Take a step as the training loop does; returns the float64 sums of loss and labelled tokens."""
    model, device = task.model, task.device
    model.train()
    optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(2, device=device)
    for batch in batches:
        batch = to_device(batch, device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            result = loss(model, batch)
        result.loss_sum.backward()
        sums += torch.stack([result.loss_sum.detach(), result.weight.detach()]).to(sums)
    scale_and_clip(model, 1 / sums[1].clamp(min=1), task.config.clip_grad)
    optimizer.step()
    return sums.cpu().double()


def whole_logits_loss(model: LocalignVLM, batch: VLMBatch) -> StepResult:
    """The straightforward loss: the logits of all tokens, and transformers' mean over the labelled tokens.

    In a packed row no sequence predicts the first token of the next sequence, because that token has no label.
    """
    output = model(
        input_ids=batch.input_ids,
        pixel_values=batch.images if len(batch.images) else None,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        cu_seqlens=batch.cu_seqlens,
        use_cache=False,
    )
    mean = ForCausalLMLoss(output.logits, batch.labels, vocab_size=output.logits.shape[-1])
    count = (batch.labels != IGNORE_INDEX).sum()
    return StepResult(mean * count, count)


def _check_equal_losses(
    measured: dict[VLMWay, VLMTimings], passes: dict[tuple[Batching, Sampler], Pass], tolerance: float
) -> None:
    """Compare ways whose passes have the same conversations; some samplers add conversations to fill batches."""
    losses: dict[str, float] = {}
    first = passes["packed", "shuffled"].records
    for way, found in measured.items():
        if found.fits and passes[way.batching, way.sampler].records == first:
            loss, count = torch.stack(list(found.sums.values())).sum(dim=0).tolist()
            losses[way.name] = loss / count
    if losses and max(losses.values()) - min(losses.values()) > tolerance * max(losses.values()):
        values = ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items())
        raise RunFailure(f"the ways disagree about the loss per token: {values}")


def _rows(
    measured: dict[VLMWay, VLMTimings], passes: dict[tuple[Batching, Sampler], Pass], device: torch.device
) -> list[dict[str, Any]]:
    seconds_per_token = {
        way.name: (found.cost(), passes[way.batching, way.sampler].tokens)
        for way, found in measured.items()
        if found.fits
    }
    peak = peak_flops(device)
    rows = []
    for way, found in measured.items():
        done = passes[way.batching, way.sampler]
        row: dict[str, Any] = {"way": way.name, "fits": found.fits, "tokens": done.tokens}
        row |= {"padding": done.padding, "loading_seconds": asdict(done.loading)}
        if found.fits:
            cost = found.cost()
            row["seconds"] = asdict(cost)
            row["seconds_of_repeats"] = [asdict(timing) for timing in found.repeats()]
            row["tokens_per_second"] = {"wall": done.tokens / cost.wall, "cpu": done.tokens / cost.cpu}
            row["times_faster"] = {
                other: _times_faster(seconds_per_token[way.name], seconds_per_token[other])
                for other in (PADDED, PLAIN)
                if other in seconds_per_token
            }
            # The peak rate is for bfloat16, which this benchmark uses on CUDA.
            row["mfu"] = done.flops / cost.wall / peak if peak else None
            row["peak_bytes"] = found.peak_bytes or None
        rows.append(row)
    return rows


def _times_faster(this: tuple[Timing, int], other: tuple[Timing, int]) -> dict[str, float]:
    ratio = other[0].over(this[0])
    per_token = this[1] / other[1]
    return {"wall": ratio.wall * per_token, "cpu": ratio.cpu * per_token}


def vlm_tables(content: dict[str, Any]) -> list[Table]:
    """A table of the speed of each way, with the padding and memory that explain it."""
    title = (
        "Training with the language model {llm}, {image_tokens} tokens per image\n"
        "{conversations} conversations ({text_only} text only), {micro_batch} per micro-batch"
    ).format(**content)
    cuda = content["hardware"]["device"].startswith("cuda")
    others = next((list(row["times_faster"]) for row in content["ways"] if row["fits"]), [])
    numbers = ("tokens/s", "padding, %", *(f"times faster than {other}" for other in others))
    table = timing_table(title, content, ("way",), (*numbers, *(("MFU, %", "peak, GiB") if cuda else ())))
    loading = max(row["loading_seconds"]["wall"] for row in content["ways"])
    table.caption = (
        f"{table.caption}\nloading is not included; it took at most {loading:.1f} s for all conversations"
    )
    for row in content["ways"]:
        if not row["fits"]:
            table.add_row(row["way"], "does not fit")
            continue
        speeds = [(row["tokens_per_second"], ",.0f")]
        speeds += [(row["times_faster"][other], ".2f") for other in others]
        speed, *faster = (both_times(*s, wall_only=cuda) for s in speeds)
        cells = [speed, f"{100 * row['padding']:.0f}", *faster]
        if cuda:
            mfu = "–" if row["mfu"] is None else f"{100 * row['mfu']:.0f}"
            cells += [mfu, f"{row['peak_bytes'] / 2**30:.1f}"]
        table.add_row(row["way"], *cells)
    return [table]
