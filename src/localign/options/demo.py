"""Options of `localign demo`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from localign.errors import UserError
from localign.options.align import AlignConfig
from localign.options.names import EMBEDDED, MaskKind, TargetName
from localign.options.probe import ProbeConfig

_SHORT = {"steps": 400, "batch_size": 32, "train_scenes": 3000}
"""For a table within five minutes on two slow cores."""
_FULL = {"steps": 1000, "batch_size": 64, "train_scenes": 6000, "probe_steps": 2000}
_MAX_PROBE_STEPS = 2000


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Align the embedded backbone, probe it before and after, and write a report."""

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Size": "full",
        "Alignment": "steps batch_size lr target mask decoder_layer_scale",
        "Heads": "probe_steps probe_batch probe_lr train_scenes test_scenes",
        "Run": "out seeds seed device workers",
    }

    out: str = "runs/demo"
    """Folder of the demo; an interrupted demo is continued."""
    seeds: int = 1
    """Number of repetitions, each with its own seed for alignment and heads; intervals over seeds need two."""
    seed: int = 0
    """The first seed."""
    full: bool = False
    """The longer run: more alignment, heads of a fixed length on more scenes. It gains more and takes about three times
    as long; the figures of RESULTS.md are of this run."""
    steps: int | None = None
    """Alignment steps; default 400, with --full 1000."""
    batch_size: int | None = None
    """Scenes per alignment step; default 32, with --full 64."""
    lr: float = 1e-3
    """Peak learning rate of the alignment."""
    target: TargetName = "last"
    """The teacher's output; in a six-block ViT, the last layer holds the semantics."""
    mask: MaskKind = "block"
    """How patches are hidden; on a 6 x 6 grid, a single patch is a piece of an object and a block is a whole object."""
    decoder_layer_scale: float | None = 0.1
    """Initial LayerScale of the decoder; the published 1e-6 suits runs a hundred times longer."""
    probe_lr: float = 4e-3
    """Peak learning rate of the heads; at the published 1e-3, they do not converge in so few steps."""
    probe_steps: int | None = None
    """Steps of the heads' training; default until they have converged, at most 2,000 steps; with --full 2000."""
    probe_batch: int = 32
    """Scenes per step of the heads."""
    train_scenes: int | None = None
    """Scenes to train heads on; default 3000, with --full 6000."""
    test_scenes: int = 4000
    """Scenes to measure recall on."""
    workers: int = 1
    """Image loading processes of the alignment."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"--seeds must be at least 1, not {self.seeds}")
        for name, value in (_FULL if self.full else _SHORT).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def align_config(self, seed: int) -> AlignConfig:
        """Options of the alignment of one repetition."""
        assert self.batch_size is not None
        return AlignConfig(
            backbone=EMBEDDED,
            data="scenes:pretrain",
            val="scenes:val",
            val_images=512 if self.full else 128,
            out=str(Path(self.out) / f"align-seed{seed}"),
            seed=seed,
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            target=self.target,
            mask=self.mask,
            decoder_layer_scale=self.decoder_layer_scale,
            workers=self.workers,
            device=self.device,
            checkpoint_every=100,
            log_every=20,
            resume="auto",
        )

    def probe_config(self, seed: int) -> ProbeConfig:
        """Options of the heads of one repetition, the same for both backbones."""
        return ProbeConfig(
            heads=("transformer", "linear"),
            tasks=("local", "global"),
            seed=seed,
            steps=self.probe_steps,
            until_converged=self.probe_steps is None,
            max_steps=_MAX_PROBE_STEPS,
            batch=self.probe_batch,
            lr=self.probe_lr,
            final_lr=self.probe_lr / 10,
        )
