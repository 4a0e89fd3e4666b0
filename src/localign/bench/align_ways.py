"""The two implementations of alignment steps that `localign bench align` compares, each in its own process.

`python -m localign.bench.align_ways '{"way": ..., "config": ...}'` runs one of them. It takes a step for each line on
standard input, and replies with a line of JSON that holds the cost of the step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import normalize

from localign import rng
from localign.alignment import AlignConfig, AlignTask
from localign.alignment.masks import MaskSampler
from localign.alignment.setup import fresh_student, starting_backbone
from localign.alignment.student import Student
from localign.backbones import Backbone
from localign.backbones.attention import SoftCapAttention
from localign.data.loader import Batch
from localign.data.sources import FolderSource
from localign.data.stream import SampleStream
from localign.data.transforms import TrainTransform
from localign.engine import StepResult, train
from localign.engine.distributed import choose_device
from localign.engine.optim.build import decayed_names
from localign.engine.schedule import computes_in_bf16
from localign.engine.task import BatchPlan
from localign.options.align import saved_align_config

OURS, COMPILED, PLAIN = "ours", "ours, compiled", "plain"
OUT_OF_MEMORY = "out of memory"


class StepServer:
    """Waits for a line on standard input before each step, and writes the step's cost as a line of JSON."""

    def __init__(self, device: torch.device, replies: TextIO) -> None:
        self.device, self.replies = device, replies
        self.data_wait = 0.0
        self._begun: tuple[float, float] | None = None

    def reply(self, **facts: Any) -> None:
        """Write a line of JSON."""
        self.replies.write(json.dumps(facts) + "\n")
        self.replies.flush()

    def begin(self) -> None:
        """Wait for the request of a step, then start the clock.

        Raises:
            SystemExit: There are no more requests.
        """
        if not sys.stdin.readline():
            raise SystemExit
        self._synchronise()
        self._begun = time.perf_counter(), time.process_time()

    def load(self, batches: Iterator[Any]) -> Any:
        """The next batch. The time to get it counts as waiting for data."""
        begun = time.perf_counter()
        batch = next(batches)
        self.data_wait = time.perf_counter() - begun
        return batch

    def end(self, loss: float) -> None:
        """Stop the clock and reply with the step's cost; does nothing if no step has begun."""
        if self._begun is None:
            return
        self._synchronise()
        wall, cpu = self._begun
        self.reply(
            wall=time.perf_counter() - wall,
            cpu=time.process_time() - cpu,
            data_wait=self.data_wait,
            loss=loss,
            peak_bytes=self._peak_bytes(),
        )
        self._begun = None

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _peak_bytes(self) -> int:
        """Peak memory since the start: of the allocator on CUDA, else of the process; 0 on Windows."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if sys.platform == "win32":
            return 0
        import resource  # missing on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class ServedTask(AlignTask):
    """The task of `localign align`, which takes steps on request."""

    def __init__(self, config: AlignConfig, server: StepServer) -> None:
        super().__init__(config)
        self.server = server
        self.result: StepResult | None = None

    def batches(self, plan: BatchPlan) -> Iterator[Batch]:
        batches = super().batches(plan)
        while True:
            self.server.begin()
            yield self.server.load(batches)
            # The loop asks for the next batch after it has finished the step.
            assert self.result is not None
            self.server.end(float(self.result.loss_sum.detach() / self.result.weight))

    def step(self, model: nn.Module, batch: Batch) -> StepResult:
        self.result = super().step(model, batch)
        return self.result


def ours(config: AlignConfig, server: StepServer) -> None:
    """Take steps through the training loop of `localign align`."""
    task = ServedTask(config, server)
    server.reply(ready=True)
    train(task, config, "align")


# -- the plain implementation -----------------------------------------------------------------------


class PlainImages(Dataset[Tensor]):
    """Maps a stream position to its image: decoded by Pillow, cropped as published, normalised, float32."""

    def __init__(self, config: AlignConfig, backbone: Backbone) -> None:
        self.source = FolderSource(config.data)
        self.order = SampleStream(config.seed, len(self.source))
        self.crop = TrainTransform(backbone.image_size, "published", decode="full")
        self.seed, self.mean, self.std = config.seed, list(backbone.mean), list(backbone.std)

    def __getitem__(self, position: int) -> Tensor:
        _, index = self.order(position)
        with Image.open(self.source.path(index)) as image:
            pixels = self.crop(image.convert("RGB"), self.seed, position)
        normalised: Tensor = normalize(pixels.float() / 255, self.mean, self.std, inplace=True)
        return normalised


class PlainAttention(nn.Module):
    """Soft-capped attention written out: logits, cap, softmax, sum. Uses the weights of the given module."""

    def __init__(self, given: SoftCapAttention) -> None:
        super().__init__()
        self.given = given

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        given = self.given
        batch, tokens, width = x.shape
        qkv = given.qkv(x).reshape(batch, tokens, 3, given.num_heads, given.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = given.q_norm(query), given.k_norm(key)
        logits = (query * given.head_dim**-0.5) @ key.transpose(-2, -1)
        logits = given.cap * torch.tanh(logits / given.cap)
        out = logits.softmax(dim=-1) @ value
        projected: Tensor = given.proj(given.norm(out.transpose(1, 2).reshape(batch, tokens, width)))
        return projected


def plain_tokens(backbone: Backbone, images: Tensor, layer: int) -> Tensor:
    """Tokens ``(batch, tokens, width)`` after a block and the final norm; runs all blocks."""
    vit, prefix = backbone.vit, backbone.num_prefix_tokens
    features = vit.forward_intermediates(
        images,
        indices=[backbone.block_index(layer)],
        return_prefix_tokens=prefix > 0,
        output_fmt="NLC",
        intermediates_only=True,
    )[0]
    tokens = torch.cat([features[1], features[0]], dim=1) if prefix else features
    normed: Tensor = getattr(vit, backbone.final_norm)(tokens)
    return normed


def plain_student(config: AlignConfig, backbone: Backbone) -> Student:
    """The student at the start of training, with soft-capped attention written out."""
    student = fresh_student(config, backbone)
    for block in student.encoder.backbone.vit.blocks:
        if isinstance(block.attn, SoftCapAttention):
            block.attn = PlainAttention(block.attn)
    return student


def plain_loss(
    student: Student, teacher: Backbone, images: Tensor, keep_masks: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, computed mask by mask, and the scale of the targets.

    Args:
        student: Built by :func:`plain_student`.
        teacher: The frozen teacher.
        images: Normalised images ``(batch, 3, height, width)``.
        keep_masks: bool ``(batch, masks, patches)``, True = visible.
        scale: Scale of the targets; None uses their standard deviation.
    """
    masks = [mask.view(-1, 1, *teacher.grid).to(images.dtype) for mask in keep_masks.unbind(1)]
    with torch.no_grad():
        targets = []
        for mask in masks:
            pixels = F.interpolate(mask, scale_factor=tuple(map(float, teacher.patch_size)))
            bottom, right = (
                full - covered for full, covered in zip(images.shape[2:], pixels.shape[2:], strict=True)
            )
            pixels = F.pad(pixels, (0, right, 0, bottom))
            targets.append(plain_tokens(teacher, images * pixels, -2))
        if scale is None:
            scale = torch.cat(targets).float().std(correction=0)
    encoder, decoder = student.encoder, student.decoder
    assert decoder is not None
    embeddings = encoder.head(plain_tokens(encoder.backbone, images, -1))
    losses = []
    for mask, target in zip(keep_masks.unbind(1), targets, strict=True):
        keep = F.pad(mask, (teacher.num_prefix_tokens, 0), value=False).unsqueeze(-1)
        x = decoder.blocks(embeddings * keep + decoder.pos_embed)
        losses.append(F.mse_loss(decoder.head(decoder.norm(x)).float(), target.float() / scale))
    return torch.stack(losses).mean(), scale


def plain(config: AlignConfig, server: StepServer) -> None:
    """Take the same steps in a plain training script."""
    device = server.device
    backbone = starting_backbone(config)
    student = plain_student(config, backbone).to(device).train()
    teacher = backbone.to(device).eval().requires_grad_(False)
    decayed = decayed_names(student)
    named = dict(student.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named.items() if (n in decayed) == is_decayed], "weight_decay": decay}
        for is_decayed, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=config.betas, eps=config.eps)
    loader = iter(
        DataLoader(
            PlainImages(config, backbone),
            batch_size=config.batch_size,
            sampler=range(config.batch_size * (config.steps or 0)),
            num_workers=config.workers,
            pin_memory=device.type == "cuda",
        )
    )
    sampler, scale = MaskSampler.of(config.masks()), None
    bf16 = computes_in_bf16(config, device.type)
    server.reply(ready=True)
    for step in range(config.steps or 0):
        server.begin()
        images = server.load(loader).to(device, non_blocking=True)
        positions = torch.arange(step * config.batch_size, (step + 1) * config.batch_size)
        keep_masks = sampler(config.seed, positions, teacher.grid).to(device)
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            loss, scale = plain_loss(student, teacher, images, keep_masks, scale)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), config.clip_grad or float("inf"))
        optimizer.step()
        server.end(loss.item())


def _main(argument: str) -> None:
    # Standard output carries replies only; everything that is printed goes to standard error.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    values = json.loads(argument)
    config = saved_align_config(values["config"])
    server = StepServer(choose_device(config.device), replies)
    try:
        with rng.seeded_globals(config.seed, "bench"):
            (plain if values["way"] == PLAIN else ours)(config, server)
    except torch.OutOfMemoryError:
        server.reply(error=OUT_OF_MEMORY)


if __name__ == "__main__":
    _main(sys.argv[1])
