"""Options of `localign demo`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from localign.errors import UserError
from localign.options.align import AlignConfig
from localign.options.names import EMBEDDED, MaskKind, TargetName
from localign.options.probe import ProbeConfig


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Align the embedded backbone, probe it before and after, and write a report."""

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Alignment": "steps batch_size lr target mask decoder_layer_scale",
        "Heads": "probe_steps probe_batch probe_lr train_scenes test_scenes",
        "Run": "out seeds seed device workers",
    }

    out: str = "runs/demo"
    """Folder of the demo; an interrupted demo is continued."""
    seeds: int = 1
    """Number of repetitions, each with its own seed for alignment and heads; intervals need at least two."""
    seed: int = 0
    """The first seed."""
    steps: int = 1000
    """Alignment steps."""
    batch_size: int = 64
    """Scenes per alignment step."""
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
    probe_steps: int = 2000
    """Steps of the heads' training."""
    probe_batch: int = 32
    """Scenes per step of the heads."""
    train_scenes: int = 6000
    """Scenes to train heads on."""
    test_scenes: int = 4000
    """Scenes to measure recall on."""
    workers: int = 1
    """Image loading processes of the alignment."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"--seeds must be at least 1, not {self.seeds}")

    def align_config(self, seed: int) -> AlignConfig:
        """Options of the alignment of one repetition."""
        return AlignConfig(
            backbone=EMBEDDED,
            data="scenes:pretrain",
            val="scenes:val",
            val_images=512,
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
            batch=self.probe_batch,
            lr=self.probe_lr,
            final_lr=self.probe_lr / 10,
        )
