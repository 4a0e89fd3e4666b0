"""The runs a target is made of: alignments and probings, each found again by a hash of all that decides it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from localign.alignment import AlignConfig, AlignTask
from localign.backbones import Backbone, create_backbone, load_backbone
from localign.backbones.export import content_hash
from localign.deprecated import with_old_names
from localign.engine import run_folder, train
from localign.engine.checkpoints.replicated import Checkpoints
from localign.engine.distributed import DistributedContext
from localign.engine.log import progress_bars
from localign.engine.run_folder import RESUMABLE
from localign.files import replace_text, replacing
from localign.options.names import EMBEDDED
from localign.pictures import save_predictions
from localign.probing import HeadSpec, LabelledSource, ProbeConfig, Probed, TrainedHeads, probe_heads
from localign.probing.suite import SourceHead
from localign.report import PICTURES_FILE

_NO_DIFFERENCE = ("workers", "cache", "extract_batch")
"""Options of heads that change neither the samples nor, beyond rounding, the mathematics."""
OUTCOME_FILE = "outcome.json"
_RECALLS_FILE = "recalls.npz"
_ANY = "backbone"


def digest(content: Mapping[str, Any]) -> str:
    """A short hash of JSON-able content."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def backbone_identity(name: str, weights: str) -> str:
    """What a backbone's name stands for; of the embedded one, which may be made anew, its weights."""
    if name == EMBEDDED:
        return content_hash(create_backbone(name).vit.state_dict())
    return f"{name} {weights}"


@dataclass(frozen=True)
class Alignment:
    """One run of `localign align`, in a folder named after what decides it."""

    label: str
    """Of the first row that asks for it."""
    config: AlignConfig
    steps: int
    key: str

    @staticmethod
    def of(label: str, config: AlignConfig, steps: int, data: str, backbone: str, folder: Path) -> Alignment:
        """The run of a config.

        Args:
            label: For the plan.
            config: Its ``out`` is not looked at.
            steps: Optimizer steps.
            data: Fingerprint of the training images.
            backbone: Identity of the starting weights.
            folder: Of all alignments.
        """
        decisive = {k: v for k, v in run_folder.to_dict(config).items() if k not in RESUMABLE}
        key = digest({"config": with_old_names(decisive), "data": data, "backbone": backbone})
        out = folder / f"{config.backbone}-{config.objective}-seed{config.seed}-{key}"
        return Alignment(label, replace(config, out=str(out), resume="auto"), steps, key)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.out)

    def steps_done(self) -> int:
        """Of a finished run all, of one that was cut off those before its last checkpoint."""
        if (self.folder / run_folder.RESULTS_FILE).is_file():
            return self.steps
        return max(Checkpoints(self.folder / "checkpoints").steps(), default=0)

    @property
    def backbone(self) -> str:
        """What is aligned."""
        return self.config.backbone

    @property
    def method(self) -> str:
        """By what."""
        return self.config.objective

    def load(self) -> Backbone:
        """The aligned backbone."""
        return load_backbone(self.folder / "export")

    def run(self) -> None:
        """Align, from the start or from the last checkpoint."""
        train(AlignTask(self.config), self.config, "align")


@dataclass(frozen=True)
class Heads:
    """What heads are trained and judged on, shared by all probings of a target."""

    train: LabelledSource
    judged: dict[str, LabelledSource]

    def identity(self) -> dict[str, str]:
        """Fingerprints of the sources."""
        return {name: s.fingerprint() for name, s in {"train": self.train, **self.judged}.items()}


@dataclass(frozen=True)
class Start:
    """A backbone as it is."""

    backbone: str
    weights: str
    key: str
    """Its identity, see :func:`backbone_identity`."""

    method = "baseline"

    def load(self) -> Backbone:
        """With its weights."""
        return create_backbone(self.backbone, weights=self.weights)


@dataclass(frozen=True)
class Probing:
    """Heads of one seed on one backbone, aligned or as it is."""

    label: str
    """Of the first row that asks for it."""
    source: Alignment | Start
    config: ProbeConfig
    steps: int
    key: str
    folder: Path

    @staticmethod
    def of(label: str, source: Alignment | Start, config: ProbeConfig, heads: Heads, folder: Path) -> Probing:
        """The probing of a backbone; ``folder`` is that of all probings."""
        decisive = {k: v for k, v in asdict(config).items() if k not in _NO_DIFFERENCE}
        key = digest({"config": decisive, "data": heads.identity(), "backbone": source.key})
        own = folder / f"{source.backbone}-{source.method}-seed{config.seed}-{key}"
        return Probing(label, source, config, config.resolved(len(heads.train))[0], key, own)

    @property
    def aligned(self) -> Alignment | None:
        """The alignment that it waits for."""
        return self.source if isinstance(self.source, Alignment) else None

    def steps_done(self) -> int:
        """All or none."""
        return self.steps if (self.folder / OUTCOME_FILE).is_file() else 0

    def run(self, heads: Heads, context: DistributedContext) -> None:
        """Train and judge the heads, and keep what came of it."""
        backbone = self.source.load().to(context.device)
        cache = self.folder / "cache"  # used where features do not fit into memory
        with progress_bars(shown=context.is_main) as progress:
            (probed,) = probe_heads(
                backbone, heads.train, heads.judged, self.config,
                context=context, cache_folder=cache, progress=progress,
            )  # fmt: skip
        context.barrier()
        if not context.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(cache, ignore_errors=True)
        (source,) = heads.judged.values()
        save_predictions(self.folder, {_ANY: backbone}, {_ANY: [probed]}, source)
        recalls = {"/".join((name, *astuple(spec))): v.numpy() for (name, spec), v in probed.recalls.items()}
        with replacing(self.folder / _RECALLS_FILE) as temporary, temporary.open("wb") as file:
            np.savez(file, **recalls)  # type: ignore[arg-type]
        # The last, as it says that all is done.
        replace_text(self.folder / OUTCOME_FILE, json.dumps(probed.outcome))

    def read(self) -> Probed:
        """What came of it, without the heads."""
        outcome = json.loads((self.folder / OUTCOME_FILE).read_text(encoding="utf-8"))
        recalls: dict[SourceHead, torch.Tensor] = {}
        for place, values in _arrays(self.folder / _RECALLS_FILE).items():
            source, *spec = place.split("/")
            recalls[source, HeadSpec(*spec)] = torch.from_numpy(values)
        return Probed(
            outcome, TrainedHeads(seed=outcome["seed"], heads={}, curve=outcome["train"]["curve"]), recalls
        )

    def pictures(self, name: str) -> dict[str, NDArray[Any]]:
        """A few images and what the local head makes of them, under the name that the backbone has in a figure."""
        arrays = _arrays(self.folder / PICTURES_FILE)
        return {k.replace(f"_{_ANY}", f"_{name}"): v for k, v in arrays.items()}


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
