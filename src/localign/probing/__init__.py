"""The probing benchmark: how well small heads read the classes of patches and images from frozen tokens."""

from localign.options.names import INTERVENTIONS, TASKS
from localign.options.probe import HeadSpec, ProbeConfig
from localign.probing.evaluation import evaluate_heads
from localign.probing.features import LiveFeatures, MemoryFeatures, PackedLabels
from localign.probing.heads import HEADS, Geometry, build_head
from localign.probing.labels import PatchLabels, reduce_labels
from localign.probing.metrics import MajorityCounts, MultiLabelCounts
from localign.probing.segmentation import AttributeLabels, FolderSegmentation, LabelledSource
from localign.probing.suite import Probed, probe, probe_heads
from localign.probing.training import TrainedHeads, train_heads

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
    "TrainedHeads",
    "build_head",
    "evaluate_heads",
    "probe",
    "probe_heads",
    "reduce_labels",
    "train_heads",
]
