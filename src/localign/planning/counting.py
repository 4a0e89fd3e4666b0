"""Counts the operations and memory of a training step: runs the real modules on tensors without data.

The figures therefore follow the code, for every objective, target and decoder. Unless ``attention`` is eager, attention
is counted as fused, as on GPUs. Soft-capped attention is then FlexAttention, counted as plain attention without the
operations of the cap.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from localign.alignment.objectives import Objective
from localign.alignment.objectives.base import MaskedObjective
from localign.alignment.setup import build_objective, fresh_student, starting_backbone
from localign.alignment.teacher import Teacher
from localign.engine.optim.build import hidden_matrices
from localign.engine.schedule import computes_in_bf16
from localign.errors import UserError
from localign.options.align import AlignConfig

_COUNTED = 2
"""Images in the step whose operations are counted. Operations are proportional to the number of images."""
_SMALL, _LARGE = 32, 64
"""Images in the two steps whose memory is counted. Memory is linear in the number of images."""
ADAMW_BYTES, MUON_BYTES = 8, 4
"""Bytes per trained parameter of AdamW's two moments and of Muon's single moment."""


@dataclass(frozen=True)
class Flops:
    """Operations per image; a multiply-add counts as two."""

    teacher: float
    """Forward pass of the frozen teacher, over all views."""
    student: float
    """Forward and backward pass of encoder and decoder."""

    @property
    def total(self) -> float:
        return self.teacher + self.student


@dataclass(frozen=True)
class Memory:
    """Memory of one rank, in bytes."""

    weights: int
    """float32 weights of student and teacher and, with ``ema_decay``, of the student's average."""
    gradients: int
    """float32 gradients of trained parameters. Ranks exchange gradients in place."""
    moments: int
    """Optimizer state."""
    fixed: float
    """Working memory that does not depend on the number of images, such as copies of weights in lower precision."""
    per_image: float
    """Memory per image of a micro-batch: activations kept for the backward pass, and working memory."""

    def of(self, micro_batch: int) -> float:
        """Bytes at the peak of a step with ``micro_batch`` images per micro-batch."""
        return self.weights + self.gradients + self.moments + self.fixed + micro_batch * self.per_image


class CountedAlignment:
    """Teacher, objective and student of a run, with tensors that hold no data.

    Args:
        config: Options of the run. No weights, images or folders are read.

    Raises:
        UserError: The backbone is unknown or does not fit the options, or the objective draws no masks.
    """

    def __init__(self, config: AlignConfig) -> None:
        self.config = config
        fused = config.attention != "eager"
        with torch.device("meta"):
            backbone = starting_backbone(config, weights="none")
            self.student = fresh_student(replace(config, soft_cap="none") if fused else config, backbone)
        assert config.target is not None  # AlignConfig filled it in
        self.teacher = Teacher(backbone, config.target)
        self.objective: Objective = build_objective(config, self.teacher)
        if not isinstance(self.objective, MaskedObjective):
            raise UserError(f"--objective {config.objective} cannot be planned: its views depend on data")
        self.mode = FakeTensorMode()
        with self.mode:
            for module in (self.student, self.teacher):
                module._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))  # type: ignore[no-untyped-call]
        if config.grad_checkpointing:
            self.student.set_grad_checkpointing(True)

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.student.parameters() if p.requires_grad)

    def parameters(self) -> dict[str, int]:
        """Number of parameters of teacher, encoder and decoder."""
        parts: dict[str, nn.Module | None] = {
            "teacher": self.teacher,
            "encoder": self.student.encoder,
            "decoder": self.student.decoder,
        }
        return {name: _count(part) for name, part in parts.items() if part is not None}

    def flops(self) -> Flops:
        """Operations per image, including recomputation if gradients are checkpointed."""
        images, views = self._inputs(_COUNTED)
        # The counter does not support fused attention on the CPU, but counts the matrix products of the math backend.
        with self._on_fakes(), sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as teacher:
                target = self._target(images, views)
            with FlopCounterMode(display=False) as student:
                self._student_step(images, views, target)
        return Flops(teacher.get_total_flops() / _COUNTED, student.get_total_flops() / _COUNTED)

    def memory(self) -> Memory:
        """Memory of a rank that holds the whole student."""
        peaks = {images: self._peak(images) for images in (_SMALL, _LARGE)}
        slope = (peaks[_LARGE] - peaks[_SMALL]) / (_LARGE - _SMALL)
        weights = 4 * (_count(self.student) + _count(self.teacher))
        gradients = 4 * self.trained
        fixed = peaks[_SMALL] - _SMALL * slope - weights - gradients
        average = 4 * _count(self.student) if self.config.ema_decay is not None else 0
        return Memory(weights + average, gradients, self._moments(), max(0.0, fixed), slope)

    def _moments(self) -> int:
        """Bytes of the optimizer's state."""
        matrices = hidden_matrices(self.student) if self.config.optimizer == "muon" else frozenset()
        trained = [(n, p.numel()) for n, p in self.student.named_parameters() if p.requires_grad]
        return sum(size * (MUON_BYTES if name in matrices else ADAMW_BYTES) for name, size in trained)

    def _peak(self, count: int) -> float:
        """Peak bytes of weights, gradients, activations and working memory during a step."""
        images, views = self._inputs(count)
        with self._on_fakes(), _LiveBytes() as live:
            for tensor in (*self.student.parameters(), *self.teacher.parameters(), images, views):
                live.see(tensor)
            for parameter in self.student.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)  # as after the first step
            self._student_step(images, views, self._target(images, views))
        return float(live.peak)

    def _inputs(self, count: int) -> tuple[Tensor, Tensor]:
        views = self.objective.draw(0, torch.arange(count))
        height, width = self.teacher.backbone.image_size
        with self.mode:
            return torch.empty(count, 3, height, width), self.mode.from_tensor(views)

    def _target(self, images: Tensor, views: Tensor) -> Tensor:
        with torch.no_grad():
            return self.objective.target(images, views)

    def _student_step(self, images: Tensor, views: Tensor, target: Tensor) -> None:
        prediction = self.objective.predict(self.student, images, views)
        loss, _ = self.objective.loss(prediction, target, views)
        with torch.autocast("cpu", enabled=False):
            loss.backward()

    @contextmanager
    def _on_fakes(self) -> Iterator[None]:
        bf16 = computes_in_bf16(self.config, "cuda")
        with self.mode, torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            yield


class _LiveBytes(TorchDispatchMode):
    """Tracks the bytes of tensors that operations create, until their storage is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return made

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage once."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = True
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.now -= size


def mask_cost(config: AlignConfig, flops: Flops) -> float | None:
    """Operations of the run divided by those with one mask per image; None if the run has one mask per image."""
    if not (config.complement or config.all_visible):
        return None
    single = CountedAlignment(replace(config, complement=False, all_visible=False))
    return flops.total / single.flops().total


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
