"""The probing benchmark: what a frozen backbone's tokens say about each patch, and about the image."""

from localign.options.names import INTERVENTIONS, TASKS
from localign.options.probe import HeadSpec, ProbeConfig
from localign.probing.features import LiveFeatures, MemoryFeatures, PackedLabels
from localign.probing.heads import HEADS, Geometry, build_head
from localign.probing.judging import judge_heads
from localign.probing.labels import PatchLabels, image_union, patch_majority, patch_union, reduce_labels
from localign.probing.metrics import MajorityCounts, MultiLabelCounts
from localign.probing.segmentation import AttributeLabels, FolderSegmentation, LabelledSource
from localign.probing.suite import Probed, probe, probe_heads
from localign.probing.training import Progress, TrainedHeads, train_heads

__all__ = [
    "HEADS",
    "INTERVENTIONS",
    "TASKS",
    "AttributeLabels",
    "FolderSegmentation",
    "Geometry",
    "HeadSpec",
    "LabelledSource",
    "LiveFeatures",
    "MajorityCounts",
    "MemoryFeatures",
    "MultiLabelCounts",
    "PackedLabels",
    "PatchLabels",
    "ProbeConfig",
    "Probed",
    "Progress",
    "TrainedHeads",
    "build_head",
    "image_union",
    "patch_majority",
    "judge_heads",
    "patch_union",
    "probe",
    "probe_heads",
    "reduce_labels",
    "train_heads",
]
