"""The runs of a target: alignments and probings, each in a folder named by a hash of everything it depends on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localign.alignment import AlignConfig
from localign.alignment.native import align_task
from localign.backbones import Backbone, create_backbone, load_backbone
from localign.backbones.export import content_hash
from localign.deprecated import REVISION, with_old_names
from localign.engine import run_folder, train
from localign.engine.checkpoints.replicated import Checkpoints
from localign.engine.distributed import DistributedContext
from localign.engine.progress import progress_bars
from localign.engine.run_folder import RESUMABLE
from localign.options.names import EMBEDDED
from localign.options.probe import MAX_STEPS
from localign.pictures import save_predictions
from localign.probing import LabelledSource, ProbeConfig, Probed, probe_heads
from localign.probing.stored import read_probed, write_probed
from localign.probing.suite import TEST_SOURCE
from localign.results import PICTURES_FILE

_NO_DEFAULT = object()
_ADDED_LATER = {
    "field": None, "until_converged": False, "max_steps": MAX_STEPS, "max_patches": None, "teacher": None,
    "decoder_width": None, "reinit_blocks": 0, "published_quirks": False,
    "readout": "sum", "readout_weight": 0.3, "pooled_weight": 0.3, "preserve_weight": 0.1,
}  # fmt: skip
"""Options that the first runs did not have -> the default. At their default they leave the key of a run as it was."""
_SAME_RESULT = ("workers", "cache", "extract_batch")
"""Options of heads that do not change the result, except for rounding."""
OUTCOME_FILE = "outcome.json"
_RECALLS_FILE = "recalls.npz"
_PLACEHOLDER = "backbone"
"""Name of the backbone in a probing's own files, as rows of several targets share them."""


def digest(content: Mapping[str, Any]) -> str:
    """A short hash of JSON-serialisable content."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def backbone_identity(name: str, weights: str) -> str:
    """A text that changes with the backbone's weights: a hash for the embedded backbone, otherwise name and weights."""
    if name == EMBEDDED:
        return content_hash(create_backbone(name).vit.state_dict())
    return f"{name} {weights}"


@dataclass(frozen=True)
class Alignment:
    """One run of `localign align`."""

    label: str
    """Row and seed of its first use."""
    config: AlignConfig
    steps: int
    key: str

    @staticmethod
    def of(label: str, config: AlignConfig, steps: int, data: str, backbone: str, folder: Path) -> Alignment:
        """The run of a config.

        Args:
            label: Shown in the plan.
            config: The options; ``out`` is ignored.
            steps: Optimizer steps.
            data: Fingerprint of the training images.
            backbone: Identity of the starting weights, see :func:`backbone_identity`.
            folder: Parent folder of all alignments.
        """
        options = {k: v for k, v in run_folder.to_dict(config).items() if k not in RESUMABLE}
        options = {k: v for k, v in options.items() if v != _ADDED_LATER.get(k, _NO_DEFAULT)}
        content = {"config": with_old_names(options), "data": data, "backbone": backbone}
        key = digest({**content, "revision": REVISION} if _means_something_else(config) else content)
        out = folder / f"{config.backbone}-{config.objective}-seed{config.seed}-{key}"
        return Alignment(label, replace(config, out=str(out), resume="auto"), steps, key)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.out)

    def steps_done(self) -> int:
        """All steps of a finished run; the steps up to the last checkpoint of an interrupted run."""
        if (self.folder / run_folder.RESULTS_FILE).is_file():
            return self.steps
        return max(Checkpoints(self.folder / "checkpoints").steps(), default=0)

    @property
    def backbone(self) -> str:
        """Name of the backbone before alignment."""
        return self.config.backbone

    @property
    def method(self) -> str:
        """Name of the objective."""
        return self.config.objective

    def load(self) -> Backbone:
        """The aligned backbone."""
        return load_backbone(self.folder / "export")

    def run(self) -> None:
        """Align, from the beginning or from the last checkpoint."""
        train(align_task(self.config), self.config, "align")


def _means_something_else(config: AlignConfig) -> bool:
    """Whether runs of these options before the last :data:`REVISION` have other results than runs of now.

    Half-visible blocks with their complements are the same masks, whether blocks are hidden or uncovered.
    """
    if not config.is_scenes and config.crop in (None, "published"):
        return True
    return config.mask == "block" and not (config.complement and config.keep_ratio == 0.5)


@dataclass(frozen=True)
class LabelledData:
    """The images that heads are trained and evaluated on, the same for all probings of a target."""

    train: LabelledSource
    test: LabelledSource

    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of both sources."""
        return {"train": self.train.fingerprint(), TEST_SOURCE: self.test.fingerprint()}


@dataclass(frozen=True)
class UnalignedBackbone:
    """A backbone to probe without alignment."""

    backbone: str
    weights: str
    key: str
    """Its identity, see :func:`backbone_identity`."""

    method = "baseline"

    def load(self) -> Backbone:
        """The backbone with its weights."""
        return create_backbone(self.backbone, weights=self.weights)


@dataclass(frozen=True)
class Probing:
    """Heads of one seed on one backbone."""

    label: str
    """Row and seed of its first use."""
    source: Alignment | UnalignedBackbone
    """Where the backbone comes from."""
    config: ProbeConfig
    steps: int
    key: str
    folder: Path

    @staticmethod
    def of(
        label: str,
        source: Alignment | UnalignedBackbone,
        config: ProbeConfig,
        data: LabelledData,
        folder: Path,
    ) -> Probing:
        """The probing of a backbone; ``folder`` is the parent folder of all probings."""
        options = {k: v for k, v in asdict(config).items() if k not in _SAME_RESULT}
        options = {k: v for k, v in options.items() if v != _ADDED_LATER.get(k, _NO_DEFAULT)}
        key = digest({"config": options, "data": data.fingerprints(), "backbone": source.key})
        own = folder / f"{source.backbone}-{source.method}-seed{config.seed}-{key}"
        return Probing(label, source, config, config.resolved(len(data.train))[0], key, own)

    @property
    def alignment(self) -> Alignment | None:
        """The alignment that gives the backbone; None for a backbone without alignment."""
        return self.source if isinstance(self.source, Alignment) else None

    def steps_done(self) -> int:
        """All steps if the probing is finished, otherwise 0."""
        return self.steps if (self.folder / OUTCOME_FILE).is_file() else 0

    def run(self, data: LabelledData, context: DistributedContext) -> None:
        """Train and evaluate the heads, and write the outcome."""
        backbone = self.source.load().to(context.device)
        cache = self.folder / "cache"  # used where features do not fit into memory
        with progress_bars(shown=context.is_main) as progress:
            (probed,) = probe_heads(
                backbone, data.train, {TEST_SOURCE: data.test}, self.config,
                context=context, cache_folder=cache, progress=progress,
            )  # fmt: skip
        context.barrier()
        if not context.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(cache, ignore_errors=True)
        save_predictions(self.folder, {_PLACEHOLDER: backbone}, {_PLACEHOLDER: [probed]}, data.test)
        # Written last: the outcome marks the probing as finished.
        write_probed(probed, self.folder / OUTCOME_FILE, self.folder / _RECALLS_FILE)

    def read(self) -> Probed:
        """The stored outcome, without the heads."""
        return read_probed(self.folder / OUTCOME_FILE, self.folder / _RECALLS_FILE)

    def pictures(self, name: str) -> dict[str, NDArray[Any]]:
        """The stored images and predictions, renamed to the backbone's name in a figure."""
        arrays = _read_arrays(self.folder / PICTURES_FILE)
        return {k.replace(f"_{_PLACEHOLDER}", f"_{name}"): v for k, v in arrays.items()}


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
