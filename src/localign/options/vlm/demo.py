"""Options of `localign vlm demo`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from localign.errors import UserError, did_you_mean
from localign.options.names import EMBEDDED, AdapterName, QuestionKind
from localign.options.vlm.train import VLMConfig

MODELS: dict[str, tuple[bool, AdapterName]] = {
    "baseline-mlp": (False, "mlp"),
    "aligned-decoder": (True, "decoder"),
    "baseline-transformer": (False, "transformer"),
    "baseline-truncated": (False, "truncated"),
    "aligned-mlp": (True, "mlp"),
    "aligned-transformer": (True, "transformer"),
    "aligned-truncated": (True, "truncated"),
}
"""Model name -> (whether its backbone is aligned, its adapter)."""


@dataclass(frozen=True, kw_only=True)
class VLMDemoConfig:
    """Compare vision-language models with and without locality alignment, on questions about drawn scenes."""

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Models": "models",
        "Data": "kinds scenes questions test_scenes",
        "Optimisation": "steps batch_size lr adapter_lr optimizer llm_steps",
        "Run": "out seeds seed device workers at_once",
    }

    out: str = "runs/vlm-demo"
    """Folder of the demo; an interrupted demo resumes."""
    models: tuple[str, ...] = ("baseline-mlp", "aligned-decoder")
    """Models to compare with the first: baseline-mlp, aligned-decoder, baseline-transformer, baseline-truncated,
    aligned-mlp, aligned-transformer, aligned-truncated."""
    kinds: tuple[str, ...] = ("referring", "position", "count", "relation", "presence")
    """Kinds of questions: referring, position, count, relation, presence, attribute, choice, caption."""
    seeds: int = 1
    """Number of trainings per model, each with its own seed; confidence intervals need several."""
    seed: int = 0
    """First training seed, also used for the alignment."""
    scenes: int = 40_000
    """Number of training scenes."""
    questions: int = 8
    """Maximum number of questions per scene."""
    test_scenes: int = 600
    """Number of test scenes."""
    llm_steps: int = 300
    """Training steps of the language model."""
    steps: int = 1000
    """Training steps of a vision-language model. The default takes 25 minutes on two slow cores; with 3000 the models
    learn most kinds of questions. Skills appear suddenly, so compare models over several --seeds."""
    batch_size: int = 32
    """Scenes per training step."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """Optimizer of the vision-language models; with adamw most kinds of questions take over twice as many steps."""
    lr: float = 3e-3
    """Peak learning rate of the vision-language models."""
    adapter_lr: float | None = None
    """Peak learning rate of an adapter's pretrained layers (decoder, truncated); default --lr. With adamw, 1e-4 is
    better."""
    workers: int = 0
    """Image loading processes; 0 loads in the main process."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    at_once: int | None = None
    """Number of models trained at the same time; default one per core on a CPU, else 1."""

    def __post_init__(self) -> None:
        for name, given, known in (
            ("model", self.models, MODELS),
            ("kind", self.kinds, get_args(QuestionKind)),
        ):
            unknown = [g for g in given if g not in known]
            if unknown:
                listed = ", ".join(known)
                raise UserError(
                    f"unknown {name} {unknown[0]!r}; known: {listed}{did_you_mean(unknown[0], known)}"
                )
            if not given or len(set(given)) != len(given):
                raise UserError(f"--{name}s needs at least one name, and each name only once")
        if self.at_once is not None and self.at_once < 1:
            raise UserError(f"--at-once must be at least 1, not {self.at_once}")
        for field in ("seeds", "scenes", "questions", "test_scenes", "llm_steps", "steps", "batch_size"):
            if getattr(self, field) < 1:
                raise UserError(f"--{field.replace('_', '-')} must be at least 1, not {getattr(self, field)}")

    def vlm_config(self, name: str, seed: int, **options: Any) -> VLMConfig:
        """The training options of one model; ``options`` are added to the demo's."""
        aligned, adapter = MODELS[name]
        folder = Path(self.out)
        return VLMConfig(
            data=(str(folder / "train" / "questions.json"),),
            backbone=(str(folder / "align") if aligned else EMBEDDED,),
            adapter=adapter,
            llm=str(folder / "llm" / "export"),
            out=str(folder / f"{name}-seed{seed}"),
            seed=seed,
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer=self.optimizer,
            adapter_lr=self.adapter_lr if adapter in ("decoder", "truncated") else None,
            min_lr_ratio=0.02,
            weight_decay=0.05,
            betas=(0.9, 0.98),
            max_length=512,
            turns="independent",
            workers=self.workers,
            device=self.device,
            checkpoint_every=200,
            log_every=20,
            resume="auto",
            **options,
        )
