"""Options that all training commands share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from localign.errors import UserError
from localign.options.names import Precision, Resume, ShardingMode, check_limit


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of the training loop."""

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Optimisation": "steps epochs batch_size micro_batch lr min_lr_ratio warmup_steps warmup_epochs warmup_ratio "
        "warmup_init_ratio weight_decay optimizer betas eps clip_grad ema_decay",
        "Run": "out resume accept_changed_data device precision seed workers checkpoint_every keep_checkpoints compile "
        "grad_checkpointing "
        "sharding reduce_dtype reshard_after_forward ddp_bucket_mb timeout",
        "Logging": "log_every val_every profile tensorboard wandb",
    }

    out: str = "runs/run"
    """Run folder, for config, log, results, checkpoints and export."""
    seed: int = 0
    """Seed of all random draws."""
    steps: int | None = None
    """Optimizer steps; give this or epochs."""
    epochs: float | None = None
    """Passes over the training images; give this or steps."""
    batch_size: int = 0
    """Images per optimizer step, over all ranks and micro-batches. 0: 1024 on a GPU, 8 (a trial run) on a CPU."""
    micro_batch: int | Literal["auto"] | None = None
    """Images per rank and forward pass; default all images of the rank. Gradients accumulate. auto: the largest number
    that fits in memory, re-measured at start and on resume. Results differ by rounding only."""
    lr: float | None = None
    """Peak learning rate; default the published one of the backbone, else 3e-4."""
    min_lr_ratio: float = 0.1
    """Learning rate of the last step, as a share of the peak."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    warmup_epochs: float | None = None
    """Warm-up in epochs, instead of warmup_steps."""
    warmup_ratio: float | None = None
    """Warm-up as a share of all steps (rounded down), instead of warmup_steps."""
    warmup_init_ratio: float = 0.1
    """Learning rate of the first warm-up step, as a share of the peak."""
    weight_decay: float = 0.01
    """Weight decay of matrices. Norms, biases, position embeddings and tokens are not decayed."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the weights of linear layers in blocks, AdamW with the same learning rate for other parameters. It
    needs fewer but costlier steps, which pays off for small models trained from scratch."""
    clip_grad: float | None = 1.0
    """Largest gradient norm; null: no clipping."""
    precision: Precision = "auto"
    """fp32, bf16 (autocast), or auto: bf16 on CUDA and fp32 elsewhere."""
    sharding: ShardingMode = "none"
    """Sharding of parameters, gradients and optimizer state. none: every rank holds everything. full: split over all
    ranks (FSDP2). hybrid: split over the ranks of each node; nodes are replicas."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which a sharded run sums gradients over ranks."""
    reshard_after_forward: bool = True
    """In a sharded run, free each block's gathered weights after its forward pass and gather them again for the
    backward pass. false keeps them: a third less network traffic, more memory."""
    ddp_bucket_mb: float | None = None
    """In an unsharded run, MiB of gradients that ranks exchange at once during the backward pass; default 25."""
    compile: bool = False
    """Compile the model with torch.compile."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    ema_decay: float | None = None
    """Decay per step of an exponential moving average of the weights; the average is exported. Default: no average."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    workers: int = 2
    """Image loading processes per rank; 0 loads in the main process."""
    log_every: int = 10
    """Steps between log lines."""
    checkpoint_every: int = 500
    """Steps between checkpoints. The last step always gets one."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep, besides the best one."""
    val_every: int | None = None
    """Steps between validations; default: only at the end."""
    timeout: float = 1800.0
    """Seconds that a rank waits for other ranks, or for a batch of its loader processes, before the run fails."""
    resume: Resume = "never"
    """must (or --resume alone): resume the run in --out. auto: resume it if there is one, else start. never: refuse if
    there is one."""
    accept_changed_data: bool = False
    """Resume although files of the data changed since the run started."""
    profile: int | None = None
    """Profile this many steps, after the first three: a trace and the ten largest kernels, in the run folder."""
    tensorboard: bool = False
    """Also log to TensorBoard (needs the extra localign[tensorboard])."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (needs the extra localign[wandb])."""

    @property
    def published_optimizer(self) -> bool:
        """Whether weight decay applies to all parameters and the cosine begins at step 0, under the warm-up."""
        return False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_limit(name, value)
        if self.steps is not None and self.epochs is not None:
            raise UserError("--steps and --epochs contradict each other; give one")
        warmups = {"--warmup-steps": self.warmup_steps or None, "--warmup-epochs": self.warmup_epochs,
                   "--warmup-ratio": self.warmup_ratio}  # fmt: skip
        given = [option for option, value in warmups.items() if value is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} contradict each other; give one")
        positive = ("steps", "epochs", "warmup_epochs", "warmup_ratio", "micro_batch", "lr", "clip_grad", "eps",
                    "log_every", "checkpoint_every", "keep_checkpoints", "val_every", "timeout",
                    "ddp_bucket_mb", "profile")  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value not in (None, "auto") and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")
        if self.accept_changed_data and self.resume == "never":
            raise UserError("--accept-changed-data applies to --resume only")
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
            raise UserError(
                f"--reduce-dtype {self.reduce_dtype} applies to sharded runs only; give --sharding too"
            )
        if self.sharding == "none" and not self.reshard_after_forward:
            raise UserError("--reshard-after-forward applies to sharded runs only; give --sharding too")
        if self.sharding != "none" and self.ddp_bucket_mb is not None:
            raise UserError("--ddp-bucket-mb applies to unsharded runs only; leave --sharding at none")
        if self.sharding != "none" and self.optimizer == "muon":
            raise UserError("--optimizer muon needs full matrices on every rank; leave --sharding at none")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"--ema-decay must lie between 0 and 1, not {self.ema_decay}")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise UserError(f"--warmup-steps {self.warmup_steps} must be below --steps {self.steps}")
