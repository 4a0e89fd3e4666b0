"""The content of the files in a run folder: ``results.json``, ``config.yaml``, ``log.jsonl`` and ``pictures.npz``.

Code that writes one of these files builds the types below, and code that reads it annotates with them. Shares and
recalls are fractions in 0..1. A key of a ``total=False`` type may be missing: some commands do not write it, and files
of earlier versions lack it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from numpy.typing import NDArray

PICTURES_FILE = "pictures.npz"

# -- results.json: probing -------------------------------------------------------------------------------


class Metrics(TypedDict, total=False):
    """One head on one task of one source. A mean over classes is over the classes with positives.

    None stands for a number that is not defined, such as the recall of a class without positives.
    """

    macro_recall: float | None
    macro_recall_interval: list[float] | None
    """``[low, high]``, 95 %, from the bootstrap over images."""
    macro_precision: float | None
    macro_f1: float | None
    macro_accuracy: float | None
    accuracy: float | None
    class_recall: list[float | None]
    class_precision: list[float | None]
    class_f1: list[float | None]
    class_positives: list[int]
    """Patches (local, majority) or images (global) with the class."""
    size_recall: list[float | None]
    """By object size: bin b of n holds objects that cover (b/n, (b+1)/n] of an image's patches."""
    size_positives: list[int]
    best_epoch: int
    """Published protocol: the epoch that is reported."""


class HeadLoss(TypedDict, total=False):
    """Mean loss of one head on one task."""

    train: float
    validation: float


CurvePoint = Mapping[str, int | Mapping[str, HeadLoss]]
"""One point of the heads' loss curves: ``step`` to the step, and each head's label to its losses by task."""


class HeadConvergence(TypedDict):
    """How far one head's training came on one task."""

    converged: bool | None
    """Whether the head's loss on held-out images had stopped falling; None where no images were held out."""
    steps: int
    """Optimizer steps that the head was trained for."""
    reported_step: int
    """The step whose weights are reported; with the published protocol, ``best_epoch`` says it instead."""


class HeadTraining(TypedDict, total=False):
    """The heads' training."""

    images: int
    """Training images, with those held out."""
    held_out: int
    """Images that say whether heads have converged: training images that no head was trained on, or in a training of
    a fixed length, the first reported images."""
    convergence: dict[str, dict[str, HeadConvergence]]
    """By head and task."""
    curve: Sequence[CurvePoint]


class SourceFacts(TypedDict):
    """A labelled source that heads were trained or judged on."""

    kind: str
    images: int
    fingerprint: str


class ProbeOutcome(TypedDict, total=False):
    """Heads of one seed on one backbone."""

    seed: int
    config: dict[str, Any]
    protocol: str
    """fixed or published."""
    backbone: str
    backbone_sha256: str
    classes: list[str]
    class_kinds: list[str] | None
    """thing, stuff or other, by class id; None where the source does not tell."""
    sources: dict[str, SourceFacts]
    seconds: dict[str, float]
    """By stage; shared by all seeds of a run."""
    train: HeadTraining
    results: dict[str, dict[str, dict[str, Metrics]]]
    """By source, head and task."""


def all_converged(outcomes: Sequence[ProbeOutcome], head: str, task: str) -> bool | None:
    """Whether a head has converged in every outcome: False if one has not, None if that is not known of one."""
    found = []
    for outcome in outcomes:
        verdict = outcome.get("train", {}).get("convergence", {}).get(head, {}).get(task)
        found.append(None if verdict is None else verdict["converged"])
    if False in found:
        return False
    return True if found and None not in found else None


class RecallDifference(TypedDict, total=False):
    """The gain of one backbone over another, with a paired bootstrap over images."""

    name: str
    against: str
    """The backbone it is compared with."""
    head: str
    task: str
    source: str
    difference: float | None
    """Macro recall of ``name`` minus that of ``against``, mean over seeds."""
    interval: list[float] | None
    """``[low, high]``, 95 %."""
    converged: bool | None
    """Whether the heads of both backbones had converged, for all seeds; None where that is not known."""


class RunFolders(TypedDict):
    """The folders behind one probing."""

    probing: str
    alignment: str | None
    """None for a backbone without alignment."""


class ProbeResults(TypedDict, total=False):
    """The part of ``results.json`` that commands with probing write: probe, demo and reproduce."""

    classes: list[str]
    class_kinds: list[str] | None
    protocol: str
    timings: dict[str, float]
    """Seconds by stage."""
    probe: dict[str, list[ProbeOutcome]]
    """By backbone (demo: ``baseline`` and ``aligned``), one outcome per seed."""
    differences: list[RecallDifference]
    pairs: list[list[str]]
    """``[label, before, after]`` of each aligned backbone, if the names do not say so."""
    notes: list[str]
    seeds: list[int]
    world: dict[str, Any]
    """Demo: the config of its scenes."""
    runs: dict[str, list[RunFolders]]
    """Reproduce: by backbone, one per seed."""


# -- results.json: training ------------------------------------------------------------------------------


class Versions(TypedDict):
    """The versions that wrote a file, and the time."""

    localign: str
    commit: str | None
    """Commit of a source checkout; None for an installed package."""
    torch: str
    timm: str
    python: str
    time: str
    """ISO 8601, UTC."""


class SkippedImages(TypedDict):
    """The unreadable images of a run."""

    count: int
    share: float
    """Share of the images in an epoch."""
    images: dict[str, str]
    """Name -> reason."""


class BestCheckpoint(TypedDict):
    """The checkpoint with the lowest validation loss so far; also the content of ``best.json``."""

    step: int
    val_loss: float


class TrainingResults(TypedDict, total=False):
    """The part of ``results.json`` that the training loop writes."""

    command: str
    config: dict[str, Any]
    """Every option with its value."""
    versions: Versions
    steps: int
    images: int
    """Samples seen."""
    seconds: float
    """Training time, without validation and saving."""
    images_per_second: float | None
    world_size: int
    micro_batch: int
    """Images per rank and forward pass."""
    samples_digest: str
    """Digest of all (position, index) pairs: 16 hexadecimal digits."""
    skipped_images: SkippedImages
    skipped_steps: list[int]
    """Steps whose loss or gradient was not finite, counted from 1."""
    final: dict[str, float]
    """Metrics of the last validation."""
    best: BestCheckpoint | None


class TaskSummary(TypedDict, total=False):
    """The part of ``results.json`` that a task adds; the keys here are those of an alignment."""

    backbone: str
    soft_cap: float | None
    """Bound of the attention logits; None for none."""
    target_scale: float
    parameters: int
    trainable_parameters: int
    teacher_sha256: str


class Results(TrainingResults, TaskSummary, ProbeResults, total=False):
    """``results.json`` of any command that trains or probes."""


class _Revised(TypedDict, total=False):
    revision: int
    """:data:`localign.deprecated.REVISION`; 1 if missing."""


class SavedConfig(_Revised):
    """The content of ``config.yaml``."""

    command: str
    config: dict[str, Any]
    versions: Versions


# -- log.jsonl -------------------------------------------------------------------------------------------


class _Step(TypedDict):
    step: int


class LogEntry(_Step, total=False):
    """One line of ``log.jsonl``. Training values are means since the last line; tasks add their own metrics."""

    loss: float
    grad_norm: float
    """Before clipping."""
    lr: float
    images_per_second: float
    data_wait: float
    """Share of the time that went into waiting for data."""
    samples: str
    """Digest of all samples so far."""
    attention_logit_max: float
    val_loss: float
    micro_batch: int
    skipped_image: str
    """Name of an unreadable image; its line has only ``reason`` beside it."""
    reason: str


# -- pictures.npz ----------------------------------------------------------------------------------------

Pictures = Mapping[str, NDArray[Any]]
"""Arrays by name; k images, n patches, C classes. Every part but ``images`` and ``grid`` may be missing.

=========================== ======================= ==========================================================
name                        type                    content
=========================== ======================= ==========================================================
images                      uint8 (k, 3, H, W)
grid                        int (2,)                rows and columns of patches
patch_size                  int (2,)                height and width of a patch, pixels
mean_colour                 float (3,)              the colour of hidden patches, 0..1
class_names                 str (C,)
truth                       bool (k, n, C)          the classes of each patch
majority                    int64 (k, n)            the class with most pixels of each patch; -1: all ignored
probability_<backbone>      float16 (k, n, C)       predictions of a local-task head
grid_<backbone>             as ``grid``             of a backbone with another grid; so are ``truth_<backbone>``
                                                    and ``majority_<backbone>``
pca_<side>                  float32 (k, n, 3)       patch tokens of the last layer in three principal components
pca_<side>_share            float64 (3,)            share of the variance of each component
joint_<side>                float32 (k, n, 3)       the same tokens in a basis that both sides share, each centred and
                                                    scaled to the same total variance
joint_<side>_share          float64 (3,)            share of the side's variance along each direction
keep_masks                  bool (k, masks, n)      True = visible to the teacher
target                      float32 (k, masks, n, 3) or, with the class token as target, (k, masks, width)
reconstruction              as ``target``           the student's prediction of the target
target_share                float64 (3,)            as ``pca_<side>_share``, of the targets
view_error                  float32 (k, masks)      squared error over the variance of the targets
=========================== ======================= ==========================================================

``<side>`` is ``baseline`` or ``aligned``; so is ``<backbone>`` in files of alignments and demos.
"""
