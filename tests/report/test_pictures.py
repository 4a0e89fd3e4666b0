"""Pictures show what the arrays say, and the arrays what the models make of the images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from localign.alignment.student import Student, build_student
from localign.alignment.teacher import Teacher
from localign.backbones import Backbone
from localign.options.names import TargetName
from localign.pictures import fit_components, gather_pictures, gather_predictions
from localign.report.classmarks import OTHER_FILL, class_marks
from localign.report.curves import heads_figure, series, training_figure
from localign.report.figures.predictions import (
    predicted_by,
    predicted_names,
    predictions_figure,
    wrong_patches,
)
from localign.report.figures.tokens import (
    _token_colours,
    component_colours,
    features_figure,
    reconstructions_figure,
)
from localign.report.picture_file import read_pictures
from localign.report.style import CATEGORICAL, png, svg
from localign.results import LogEntry

IMAGES, CLASSES, PATCHES = 2, 4, 9


class Head(nn.Module):
    """Patch tokens to logits; with dropout, outputs differ in training mode."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, CLASSES)
        self.dropout = nn.Dropout(0.99)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.dropout(tokens[:, 1:]))
        return logits


def tiny(side: int = 12) -> Backbone:
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {"img_size": side, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs)
    return Backbone(vit, name="tiny", architecture="vit_tiny_patch16_224", model_kwargs=kwargs).eval()


@pytest.fixture(scope="module")
def gathered() -> dict[str, Any]:
    return gather()


def gather(target: TargetName = "penultimate", with_heads: bool = True) -> dict[str, Any]:
    backbone = tiny()
    student: Student = build_student(backbone, soft_cap=30.0, attention="eager").train()
    heads_before, heads_after = (Head(8).train() if with_heads else None for _ in range(2))
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (IMAGES, 3, 12, 12), dtype=torch.uint8, generator=draw)
    truth = torch.rand(IMAGES, PATCHES, CLASSES, generator=draw) > 0.5
    keep = torch.rand(IMAGES, 1, PATCHES, generator=draw) > 0.5
    keep = torch.cat([keep, ~keep, torch.ones_like(keep)], dim=1)
    names = ["ground", "red", "circle", "blue square"]
    arrays = gather_pictures(
        backbone, student, Teacher(backbone, target), heads_before, heads_after, images, truth, names, keep
    )
    assert student.training
    return arrays


def test_pictures_survive_a_file_without_pickles(gathered: dict[str, Any]) -> None:
    stream = io.BytesIO()
    np.savez(stream, **gathered)
    stream.seek(0)
    with np.load(stream, allow_pickle=False) as stored:
        assert {n: stored[n].shape for n in stored.files} == {n: a.shape for n, a in gathered.items()}
        assert stored["class_names"].tolist()[3] == "blue square"


def test_models_are_asked_in_eval_mode(gathered: dict[str, Any]) -> None:
    again = gather()
    for name in ("probability_baseline", "pca_aligned", "reconstruction"):
        np.testing.assert_array_equal(gathered[name], again[name])


def test_an_untrained_student_reconstructs_worse_than_the_mean(gathered: dict[str, Any]) -> None:
    assert gathered["view_error"].shape == (IMAGES, 3)
    assert gathered["view_error"].mean() >= 0.9


def test_what_was_not_given_is_not_made_up() -> None:
    without = gather(with_heads=False)
    assert not {"truth", "class_names", "probability_baseline", "probability_aligned"} & set(without)


def test_a_class_token_is_shown_channel_by_channel() -> None:
    arrays = gather(target="cls")
    assert arrays["target"].shape == arrays["reconstruction"].shape == (IMAGES, 3, 8)
    np.testing.assert_allclose(arrays["target"].mean(axis=(0, 1)), 0, atol=1e-5)
    np.testing.assert_allclose(arrays["target"].std(axis=(0, 1)), 1, rtol=1e-4)
    first, second = _token_colours(arrays, (3, 3))
    assert first.shape == second.shape == (IMAGES, 3, 2, 4, 3)
    assert not np.array_equal(first, second)


def test_predictions_of_backbones_with_other_grids_keep_their_own(tmp_path: Path) -> None:
    small, large = tiny(), tiny(side=16)
    names = ["ground", "a", "b", "c"]
    sides = {"small": (small, 12, 9), "same": (small, 12, 9), "large": (large, 16, 16)}
    head = Head(8).train()
    arrays = gather_predictions(
        {name: (backbone, head) for name, (backbone, _, _) in sides.items()},
        {
            name: torch.zeros(IMAGES, 3, pixels, pixels, dtype=torch.uint8)
            for name, (_, pixels, _) in sides.items()
        },
        {name: torch.ones(IMAGES, n, CLASSES, dtype=torch.bool) for name, (_, _, n) in sides.items()},
        names,
        {name: torch.zeros(IMAGES, n, dtype=torch.int64) for name, (_, _, n) in sides.items()},
    )
    assert head.training
    np.testing.assert_array_equal(arrays["probability_small"], arrays["probability_same"])
    assert arrays["probability_large"].shape == (IMAGES, 16, CLASSES)
    assert "grid_same" not in arrays
    assert arrays["grid_large"].tolist() == [4, 4]
    assert predicted_names(arrays) == ["small", "same", "large"]
    np.savez(tmp_path / "pictures.npz", allow_pickle=False, **arrays)
    stored, reason = read_pictures(tmp_path)
    assert reason == ""
    own = predicted_by(stored, "large", 1)
    assert (own.grid, own.truth.shape) == ((4, 4), (1, 16, CLASSES))
    assert own.majority is not None
    assert own.majority.shape == (1, 16)


def test_components_are_those_of_the_covariance() -> None:
    tokens = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [9, 4, 2, 0.1, 0.1, 0.1]
    )
    components = fit_components(tokens)
    scores = components(tokens)
    assert components.share.sum() == pytest.approx(1, abs=0.01)
    np.testing.assert_allclose(scores.mean(0), 0, atol=1e-5)
    assert np.asarray(np.corrcoef(scores.T))[0, 1] == pytest.approx(0, abs=1e-5)
    assert abs(components.basis[0, 0]) > 0.99
    assert (components.basis[np.abs(components.basis).argmax(0), range(3)] > 0).all()


def test_colours_of_a_reconstruction_are_on_the_scale_of_the_target() -> None:
    target = np.linspace(-1, 1, 300).reshape(100, 3)
    assert component_colours(target).min() == 0
    assert component_colours(target).max() == 1
    np.testing.assert_allclose(component_colours(target * 0.0, target), 0.5, atol=0.02)


def test_a_patch_is_wrong_if_any_class_is() -> None:
    truth = np.array([[True, False], [False, True]])
    probability = np.array([[0.9, 0.5], [0.6, 0.7]])  # 0.5 itself does not count as predicted
    assert wrong_patches(probability, truth).tolist() == [False, True]


def test_words_for_colours_and_shapes_say_how_classes_look() -> None:
    marks = class_marks(["ground", "red", "circle", "red circle"], np.array([5.0, 1, 0, 1]))
    assert [(m.fill is not None, m.sign is not None) for m in marks[1:]] == [
        (True, False),
        (False, True),
        (True, True),
    ]
    assert marks[1].fill == marks[3].fill
    assert [m.in_legend for m in marks] == [True, True, False, True]


def test_other_classes_take_the_palette_by_frequency_and_then_grey() -> None:
    names = ["unlabeled", "orange", *(f"thing {i}" for i in range(12))]
    marks = class_marks(names, np.arange(14.0))
    assert marks[13].fill == CATEGORICAL[0]
    assert marks[1].fill == OTHER_FILL  # the fruit: among such names the word means no colour
    assert not marks[1].in_legend
    assert all(m.sign is None for m in marks)


def test_figures_have_pixels_and_leave_matplotlib_alone(gathered: dict[str, Any]) -> None:
    before = dict(matplotlib.rcParams)
    for draw in (predictions_figure, features_figure, reconstructions_figure):
        with Image.open(io.BytesIO(png(draw(gathered), dpi=40))) as picture:
            assert min(picture.size) > 80
            grey = np.asarray(picture.convert("L"))
            assert int(grey.max()) - int(grey.min()) > 100
    assert dict(matplotlib.rcParams) == before


def test_curves_skip_what_is_not_finite() -> None:
    log: list[LogEntry] = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None},  # type: ignore[typeddict-item]
        {"step": 3, "loss": float("nan")},
        {"step": 4},
    ]
    steps, values = series(log, "loss")
    assert (steps.tolist(), values.tolist()) == ([1.0], [2.0])
    assert training_figure([]) is None
    assert heads_figure({"baseline": [[]]}) is None


def test_equal_logs_give_equal_bytes() -> None:
    log: list[LogEntry] = [
        {"step": i, "loss": 1 / i, "grad_norm": 1.0, "attention_logit_max": 3.0 * i} for i in range(1, 9)
    ]
    first, second = (training_figure(log, soft_cap=30.0) for _ in range(2))
    assert first is not None
    assert second is not None
    assert svg(first) == svg(second)
