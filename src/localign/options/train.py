"""Options that all training commands share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from localign.errors import UserError
from localign.options.names import Precision, Resume, ShardingMode


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of the training loop."""

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Optimisation": "steps epochs batch_size micro_batch lr min_lr_ratio warmup_steps warmup_epochs warmup_ratio "
        "warmup_init_ratio weight_decay optimizer betas eps clip_grad ema_decay",
        "Run": "out resume device precision seed workers checkpoint_every keep_checkpoints compile grad_checkpointing "
        "sharding reduce_dtype reshard_after_forward ddp_bucket_mb timeout",
        "Logging": "log_every val_every tensorboard wandb",
    }

    out: str = "runs/run"
    """Run folder: config, log, results, checkpoints, export."""
    seed: int = 0
    """Seed of everything random."""
    steps: int | None = None
    """Optimizer steps; give this or epochs."""
    epochs: float | None = None
    """Passes over the training images; give this or steps."""
    batch_size: int = 0
    """Images per optimizer step, over all ranks and micro-batches; 0: 1024, on a CPU alone 8 (for trying)."""
    micro_batch: int | Literal["auto"] | None = None
    """Images per rank and forward pass; default is the rank's whole share. Gradients accumulate. auto: the most that
    memory has room for, looked for before training and at every continuation; it changes results by rounding alone."""
    lr: float | None = None
    """Peak learning rate; default is the backbone's published one, else 3e-4."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end of the cosine, as a share of the peak."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    warmup_epochs: float | None = None
    """The warm-up in epochs, in place of warmup_steps."""
    warmup_ratio: float | None = None
    """The warm-up as a share of all steps (rounded down), in place of warmup_steps."""
    warmup_init_ratio: float = 0.1
    """Learning rate of the warm-up's first step, as a share of the peak."""
    weight_decay: float = 0.01
    """AdamW's, on matrices only: not on norms, biases, position embeddings or tokens."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decay rates."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the matrices of linear layers in blocks, AdamW at the same rate for all else. Fewer
    steps, of more compute each: it matters for small models trained from scratch."""
    clip_grad: float | None = 1.0
    """Largest gradient norm; null for no clipping."""
    precision: Precision = "auto"
    """auto: bf16 autocast on CUDA, fp32 elsewhere."""
    sharding: ShardingMode = "none"
    """What a rank holds of parameters, gradients and moments. none: all; full (FSDP2): its share among all ranks;
    hybrid: its share among the ranks of its node, the nodes repeating one another."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which a sharded run sums gradients over ranks."""
    reshard_after_forward: bool = True
    """Of a sharded run: let each block's gathered weights go after its forward pass and gather them again for the
    backward pass; false keeps them in between: a third fewer bytes over the network, more memory."""
    ddp_bucket_mb: float | None = None
    """Of a run that is not sharded: MiB of gradients that ranks exchange at once, while the backward pass goes on;
    default torch's (25)."""
    compile: bool = False
    """Compile the model with torch.compile."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    ema_decay: float | None = None
    """Decay per step of an exponential moving average of the weights, which is then what is exported."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    workers: int = 2
    """Image loading processes per rank; 0 loads in the main process."""
    log_every: int = 10
    """Steps between log lines."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one more is written at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; the best is kept besides."""
    val_every: int | None = None
    """Steps between validations; default only at the end."""
    timeout: float = 1800.0
    """Seconds that the ranks of a run wait for one of them that no longer answers, before they end it."""
    resume: Resume = "never"
    """must (or --resume alone): continue the run in --out; auto: continue it if there is one; never: refuse
    to write into one."""
    tensorboard: bool = False
    """Also log to TensorBoard (needs the extra localign[tensorboard])."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (needs the extra localign[wandb])."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UserError("--steps and --epochs contradict each other; give one")
        warmups = {"--warmup-steps": self.warmup_steps or None, "--warmup-epochs": self.warmup_epochs,
                   "--warmup-ratio": self.warmup_ratio}  # fmt: skip
        given = [option for option, value in warmups.items() if value is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} contradict each other; give one")
        positive = ("steps", "epochs", "warmup_epochs", "warmup_ratio", "micro_batch", "lr", "clip_grad", "eps",
                    "log_every", "checkpoint_every", "keep_checkpoints", "val_every", "timeout",
                    "ddp_bucket_mb")  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value not in (None, "auto") and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")
        for name in ("batch_size", "warmup_steps", "weight_decay", "workers"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"--{name.replace('_', '-')} cannot be negative, but is {getattr(self, name)}"
                )
        for name in ("min_lr_ratio", "warmup_init_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} must lie in 0..1, not {getattr(self, name)}")
        if self.warmup_ratio is not None and self.warmup_ratio >= 1:
            raise UserError(f"--warmup-ratio must lie below 1, not {self.warmup_ratio}")
        if self.sharding == "none" and self.reduce_dtype != "fp32":
            raise UserError(f"--reduce-dtype {self.reduce_dtype} is of sharded runs; give --sharding too")
        if self.sharding == "none" and not self.reshard_after_forward:
            raise UserError("--reshard-after-forward is of sharded runs; give --sharding too")
        if self.sharding != "none" and self.ddp_bucket_mb is not None:
            raise UserError(
                "--ddp-bucket-mb is of runs whose ranks hold whole models; leave --sharding at none"
            )
        if self.sharding != "none" and self.optimizer == "muon":
            raise UserError("--optimizer muon needs whole matrices on every rank; leave --sharding at none")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"--ema-decay must lie between 0 and 1, not {self.ema_decay}")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise UserError(f"--warmup-steps {self.warmup_steps} leaves nothing of --steps {self.steps}")
