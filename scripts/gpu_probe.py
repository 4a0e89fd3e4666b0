"""Questions that only a GPU answers; each line that begins with PROBE is a finding. On a CPU: a rehearsal, tiny.

python scripts/gpu_probe.py env|paths|flex|syncs|fsdp|photographs ...
"""

from __future__ import annotations

import collections
import inspect
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
REPEATS = 10 if CUDA else 1
MATRIX = 8192 if CUDA else 256
SHAPES = {"b16": (128, 12, 197, 64), "l14-336": (32, 16, 577, 64), "so400m-384": (32, 16, 729, 72)}


def report(**figures: Any) -> None:
    """Print a finding."""
    print("PROBE " + json.dumps(figures, default=str), flush=True)


def wait() -> None:
    """Wait until the GPU has finished."""
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], Any]) -> float:
    """The time of a call after two calls that are not counted."""
    call(), call()
    wait()
    begun = time.perf_counter()
    for _ in range(REPEATS):
        call()
    wait()
    return round((time.perf_counter() - begun) / REPEATS * 1e3, 3)


def env() -> None:
    """Versions, the GPU, its matmul ceiling, and the arguments of torch's varlen attention."""
    import timm
    import transformers

    from localign.vlm.model import attention

    square = torch.randn(MATRIX, MATRIX, device=DEVICE).bfloat16()
    speed = 2 * MATRIX**3 / milliseconds(lambda: square @ square) / 1e9
    report(
        torch=torch.__version__, transformers=transformers.__version__, timm=timm.__version__,
        gpu=torch.cuda.get_device_name() if CUDA else None, matmul_tflops=round(speed, 3),
        varlen=None if attention.VARLEN is None else list(inspect.signature(attention.VARLEN).parameters),
    )  # fmt: skip


def flex() -> None:
    """FlexAttention against eager and SDPA: speed, memory, errors, compiled graphs, and padding of head width 72."""
    import torch.nn.functional as F
    from torch.nn.attention.flex_attention import flex_attention

    from localign.backbones import attention

    native = torch.compile(flex_attention, dynamic=False) if CUDA else None
    for name, (batch, heads, tokens, width) in (SHAPES if CUDA else {"tiny": (2, 2, 33, 8)}).items():
        torch.manual_seed(0)
        kind = torch.bfloat16 if CUDA else torch.float32
        inputs = [torch.randn(batch, heads, tokens, width, device=DEVICE, dtype=kind) for _ in range(3)]
        ways: dict[str, Callable[..., Tensor]] = {
            "eager": lambda *x: attention.attention_eager(*x, 30.0),
            "sdpa, no cap": F.scaled_dot_product_attention,
        }
        if CUDA:
            scale = width**-0.5
            ways["flex"] = lambda *x: attention.attention_flex(*x, 30.0)
            ways["flex, width not padded"] = lambda *x, scale=scale: native(
                *x, score_mod=lambda s, *_: attention.soft_cap(s, 30.0), scale=scale
            )
        wanted: list[Tensor] = []
        for way, call in ways.items():
            try:
                x = [t.detach().clone().requires_grad_() for t in inputs]
                begun = time.perf_counter()
                output = call(*x)
                torch.manual_seed(1)
                gradient = torch.randn_like(output)
                output.backward(gradient)
                wait()
                first = time.perf_counter() - begun
                got = [output.detach()[:2].float(), *(t.grad[:2].float() for t in x)]
                if way == "eager":
                    small = [t[:2].detach().float().requires_grad_() for t in inputs]
                    exact = attention.attention_eager(*small, 30.0)
                    exact.backward(gradient[:2].float())
                    wanted = [exact.detach(), *(t.grad for t in small)]
                errors = [float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)]
                if CUDA:
                    torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated() if CUDA else 0

                def both(call: Any = call, x: Any = x, gradient: Any = gradient) -> None:
                    call(*x).backward(gradient)

                report(
                    shape=name, way=way, first_seconds=round(first, 2),
                    forward_ms=milliseconds(lambda call=call, x=x: call(*(t.detach() for t in x))),
                    step_ms=milliseconds(both), relative_errors=[f"{e:.1e}" for e in errors],
                    peak_gib=round((torch.cuda.max_memory_allocated() - held) / 2**30, 2) if CUDA else None,
                )  # fmt: skip
            except Exception as error:
                report(shape=name, way=way, error=f"{type(error).__name__}: {str(error)[:200]}")
    if CUDA:
        torch._dynamo.utils.counters.clear()
        for images in range(2, 22):
            attention.attention_flex(*(torch.randn(images, 4, 64, 64, device=DEVICE) for _ in range(3)), 30.0)
        report(graphs_of_20_numbers_of_images=torch._dynamo.utils.counters["stats"]["unique_graphs"])


def options_of_vlm(folder: Path, **more: Any) -> Any:
    """Options of a tiny vision-language model with drawn conversations."""
    from benchmarks.config import VLMBenchConfig
    from benchmarks.vlm_setup import training_options

    options = training_options(VLMBenchConfig(llm="tiny", batch_size=16, micro_batch=4, steps=16), folder)
    return replace(options, out=str(folder / "run"), device=str(DEVICE), workers=0, **more)


def paths() -> None:
    """Which attention packed rows take in a training step: must be the kernel, in bfloat16, on CUDA."""
    from localign.engine.batch import to_device
    from localign.engine.task import BatchPlan
    from localign.vlm.model import attention
    from localign.vlm.task import VLMTask

    calls: collections.Counter[str] = collections.Counter()
    for name, place in (("_by_kernel", 0), ("_by_sequence", 1)):
        given = getattr(attention, name)

        def spy(*args: Any, name: str = name, place: int = place, given: Any = given, **kwargs: Any) -> Any:
            calls[f"{name} {args[place].dtype}"] += 1
            return given(*args, **kwargs)

        setattr(attention, name, spy)
    with tempfile.TemporaryDirectory() as folder:
        task = VLMTask(options_of_vlm(Path(folder)))
        task.to(DEVICE)
        task.model.train()
        batch = to_device(next(iter(task.batches(BatchPlan(0, 16, 4, 0, 1, 0, 0, 1, False)))), DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            result = task.step(task.model, batch)
        result.loss_sum.backward()
    report(attention_calls=dict(calls), loss=float(result.loss_sum / result.weight))


def syncs() -> None:
    """Host waits of two alignment steps between log lines, by line: must be none on CUDA."""
    from localign.alignment import AlignConfig, AlignTask
    from localign.engine import train

    seen: collections.Counter[str] = collections.Counter()

    class Task(AlignTask):
        def batches(self, plan: Any) -> Any:
            for number, batch in enumerate(super().batches(plan)):
                if CUDA and number in (3, 5):
                    torch.cuda.set_sync_debug_mode("warn" if number == 3 else "default")
                yield batch

    def note(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if "synchroniz" in str(message):
            seen["/".join(Path(filename).parts[-2:]) + f":{lineno}"] += 1

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        images = draw(Path(folder) / "images")
        size: dict[str, Any] = {"backbone": "clip-vit-b", "batch_size": 128, "workers": 8}
        if not CUDA:
            size = {"backbone": "vit_tiny_patch16_224", "image_size": 32, "batch_size": 4, "workers": 0}
        config = AlignConfig(
            **size, weights="none", data=str(images), steps=8, scale_images=8, log_every=100, ema_decay=0.999,
            device=str(DEVICE), out=str(Path(folder) / "run"),
        )  # fmt: skip
        train(Task(config), config, "align")
    report(waits_of_two_steps=dict(seen))


def fsdp() -> None:
    """A sharded run of one rank: steps, an asynchronous checkpoint, and going on from it."""
    from localign.engine import train
    from localign.vlm.task import VLMTask

    with tempfile.TemporaryDirectory() as folder:
        options = options_of_vlm(Path(folder), sharding="full", checkpoint_every=2, log_every=1)
        options = replace(options, steps=4)
        begun = time.perf_counter()
        train(VLMTask(options), options, "vlm train")
        seconds = time.perf_counter() - begun
        log = Path(options.out) / "log.jsonl"
        before = losses(log)
        shutil.rmtree(Path(options.out) / "checkpoints" / "step-0000004")
        (Path(options.out) / "results.json").unlink()
        resumed = replace(options, resume="must")
        train(VLMTask(resumed), resumed, "vlm train")
        report(seconds=round(seconds, 1), losses=before, losses_after_resuming=losses(log))


def losses(log: Path) -> dict[int, float]:
    """Step -> loss."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return {entry["step"]: round(entry["loss"], 5) for entry in entries if "loss" in entry}


def draw(folder: Path) -> Path:
    """Draw photographs, unless the folder has them."""
    from localign.bench.photographs import draw as draw_photographs

    if not folder.is_dir():
        folder.mkdir(parents=True)
        draw_photographs(folder, 16, 0, (500, 375))
    return folder


def photographs() -> None:
    """Draw photographs for the runs of the visit, beside the output of this process."""
    report(photographs=len(list(draw(Path(sys.argv[2])).iterdir())))


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if name.isidentifier()]
    for chosen in names:
        globals()[chosen]()
