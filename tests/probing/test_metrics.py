"""Metrics equal hand-counted cases and the published code's figures; sums merge."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from localign.probing.metrics import MajorityCounts, MultiLabelCounts

SCORES = Path(__file__).resolve().parents[3] / "shared" / "golden" / "scores"
needs_goldens = pytest.mark.skipif(
    not SCORES.is_dir(), reason="the reference figures beside the repository are missing"
)


def signs(rows: list[list[int]]) -> torch.Tensor:
    """Logits that predict exactly the ones."""
    return torch.tensor(rows).float() * 4 - 2


def figures_of(counts: MajorityCounts | MultiLabelCounts) -> Any:
    return counts.compute()


@needs_goldens
def test_equal_to_the_published_figures() -> None:
    from safetensors.torch import load_file

    golden = load_file(str(SCORES / "probing.safetensors"))
    expected = json.loads((SCORES / "probing.json").read_text())
    logits, targets = golden["metric.logits"], golden["metric.targets"].flatten(1, 2)
    local = MultiLabelCounts(12)
    local.update(logits[:4], targets[:4])
    local.update(logits[4:], targets[4:])
    figures = figures_of(local)
    for name, value in expected["union"].items():
        assert figures[name] == pytest.approx(value, abs=1e-6), name
    assert figures["size_recall"] == pytest.approx(expected["size10_recall"], abs=1e-6)
    whole = MultiLabelCounts(12)
    whole.update(golden["metric.global_logits"][:, 0], golden["metric.global_targets"])
    assert whole.compute()["macro_recall"] == pytest.approx(expected["global_union"]["macro_recall"])
    majority = MajorityCounts(12)
    majority.update(golden["metric.majority_logits"], golden["metric.majority_targets"].flatten(1).long())
    for name, value in expected["majority"].items():
        assert figures_of(majority)[name] == pytest.approx(value, abs=1e-6), name


def test_counts_by_hand() -> None:
    # class 0: two of two found, one false alarm; class 1: none of one found; class 2: never there
    targets = torch.tensor([[[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]])
    logits = signs([[1, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 0]])[None]
    counts = MultiLabelCounts(3)
    counts.update(logits, targets)
    figures = counts.compute()
    assert figures["class_recall"] == [1.0, 0.0, None]
    assert figures["macro_recall"] == 0.5
    assert figures["class_precision"] == [pytest.approx(2 / 3), 0.0, None]
    assert figures["class_f1"] == [pytest.approx(0.8), 0.0, None]
    assert figures["accuracy"] == pytest.approx(9 / 12)
    assert figures["macro_accuracy"] == pytest.approx(3 / 4)
    assert figures["class_positives"] == [2, 1, 0]


def test_a_share_on_a_bins_edge_belongs_below_it() -> None:
    targets = torch.zeros(1, 10, 3, dtype=torch.bool)
    targets[0, :2, 0] = True  # 2/10: bin 1
    targets[0, :3, 1] = True  # 3/10: bin 2
    targets[0, :, 2] = True  # all: bin 9
    counts = MultiLabelCounts(3)
    logits = torch.full((1, 10, 3), -1.0)
    logits[0, 0, 0] = 1
    counts.update(logits, targets)
    figures = counts.compute()
    assert figures["size_positives"] == [0, 2, 3, 0, 0, 0, 0, 0, 0, 10]
    assert figures["size_recall"] == [None, 0.5, 0.0, None, None, None, None, None, None, 0.0]


def test_image_predictions_take_sizes_from_the_patches() -> None:
    patches = torch.zeros(2, 10, 2, dtype=torch.bool)
    patches[0, :1, 1] = True
    patches[1, :9, 1] = True
    image = torch.tensor([[True, True], [False, True]])  # class 0 without a patch that counts as it
    counts = MultiLabelCounts(2)
    counts.update(signs([[1, 0], [0, 1]]), image, patches)
    figures = counts.compute()
    assert figures["size_recall"][0] == 0.0
    assert figures["size_recall"][8] == 1.0
    assert sum(figures["size_positives"]) == 2
    assert figures["class_recall"] == [1.0, 0.5]


def test_merging_ranks_equals_one_pass() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, 5, generator=generator)
    targets = torch.rand(6, 9, 5, generator=generator) < 0.3
    whole, first, second = (MultiLabelCounts(5) for _ in range(3))
    whole.update(logits, targets)
    first.update(logits[:2], targets[:2])
    second.update(logits[2:], targets[2:])
    for name, value in first.state().items():
        value += second.state()[name]
    assert first.compute() == whole.compute()
    tp = whole.state()["tp"] + whole.state()["fn"]
    assert torch.equal(tp, targets.sum((0, 1)))


def test_majority_by_hand() -> None:
    counts = MajorityCounts(3)
    hits, positives = counts.update(
        torch.eye(3)[torch.tensor([[0, 0], [1, 1]])], torch.tensor([[0, 1], [1, 1]])
    )
    assert hits.tolist() == [[1, 0, 0], [0, 2, 0]]
    assert positives.tolist() == [[1, 1, 0], [0, 2, 0]]
    figures = counts.compute()
    assert figures["accuracy"] == 0.75
    assert figures["class_recall"] == [1.0, pytest.approx(2 / 3), None]
    assert figures["macro_recall"] == pytest.approx(5 / 6)
    assert figures["macro_precision"] == pytest.approx(0.75)


def test_equal_to_torchmetrics_where_every_class_occurs() -> None:
    # Where one does not, theirs counts a class that is only predicted, and the published mean does not.
    from torchmetrics.functional import classification as theirs

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, 5, generator=generator)
    targets = torch.rand(6, 9, 5, generator=generator) < 0.4
    ours = MultiLabelCounts(5)
    ours.update(logits, targets)
    flat = logits.flatten(0, 1).sigmoid(), targets.flatten(0, 1).long()
    expected = {
        "macro_recall": theirs.multilabel_recall(*flat, num_labels=5),
        "macro_precision": theirs.multilabel_precision(*flat, num_labels=5),
        "macro_f1": theirs.multilabel_f1_score(*flat, num_labels=5),
        "macro_accuracy": theirs.multilabel_accuracy(*flat, num_labels=5),
        "class_recall": theirs.multilabel_recall(*flat, num_labels=5, average=None),
    }
    for name, value in expected.items():
        assert figures_of(ours)[name] == pytest.approx(value.tolist(), abs=1e-6), name
    majority = MajorityCounts(5)
    majority.update(logits, logits.flip(-1).argmax(-1))
    flat = logits.flatten(0, 1), logits.flip(-1).argmax(-1).flatten()
    assert majority.compute()["macro_recall"] == pytest.approx(
        float(theirs.multiclass_recall(*flat, num_classes=5, average="macro")), abs=1e-6
    )


def test_per_image_counts_add_up_to_the_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, 5, generator=generator)
    targets = torch.rand(6, 9, 5, generator=generator) < 0.3
    counts = MultiLabelCounts(5)
    hits, positives = counts.update(logits, targets)
    assert hits.shape == positives.shape == (6, 5)
    assert torch.equal(positives, targets.sum(1))
    assert torch.equal(hits.sum(0), counts.state()["tp"])
    images = MultiLabelCounts(5)
    hits, positives = images.update(logits[:, 0], targets.any(1))
    assert torch.equal(positives, targets.any(1).long())
    assert torch.equal(hits, ((logits[:, 0] > 0) & targets.any(1)).long())


def test_nothing_counted_is_no_figure_and_valid_json() -> None:
    figures = MultiLabelCounts(2).compute()
    assert figures["macro_recall"] is None
    assert "NaN" not in json.dumps(figures)
    assert not any(isinstance(v, float) and math.isnan(v) for v in figures.values())
