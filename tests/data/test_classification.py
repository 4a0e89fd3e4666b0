"""Labels of whole images come from folders, lists and scenes, and follow the source's indices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from localign.data.classification import (
    ClassLabels,
    SpreadSource,
    check_same_classes,
    labels_of,
)
from localign.data.scenes import SceneConfig, SceneSource
from localign.data.sources import ImageSource, open_source
from localign.errors import UserError


def images(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)
    return root


def test_class_folders_are_classes_as_torchvision_has_them(tmp_path: Path) -> None:
    # "a-b/" sorts before "a/" as a path but after it as a name; images may be nested deeper.
    root = images(tmp_path, "b/1.png", "a-b/1.png", "a/x/2.png", "a/1.png", "B/1.png")
    (root / ".cache").mkdir()
    source = open_source(str(root))
    labels = labels_of(source, str(root))
    assert labels.classes == ("B", "a", "a-b", "b")
    assert not labels.multi_label
    targets = labels.targets(torch.arange(len(source)))
    ours = {source.name(i): labels.classes[int(row.argmax())] for i, row in enumerate(targets)}
    assert torch.equal(targets.sum(1), torch.ones(5))
    (root / ".cache").rmdir()
    reference = ImageFolder(str(root))
    assert list(labels.classes) == reference.classes
    assert ours == {
        str(Path(p).relative_to(root)): reference.classes[number] for p, number in reference.samples
    }


def test_targets_follow_the_order_of_the_indices() -> None:
    labels = ClassLabels(("x", "y", "z"), np.array([2, 0, 1]))
    assert torch.equal(labels.targets(torch.tensor([1, 0, 0])), torch.eye(3)[[0, 2, 2]])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("1.png", "2.png"), "has no class folders"),
        (("a/1.png", "b/1.png", "stray.png"), "stray.png is not in a class folder"),
        (("a/1.png", "a/2.png"), "has a single class, 'a'"),
    ],
)
def test_folders_without_classes_are_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    source = open_source(str(images(tmp_path, *names)))
    with pytest.raises(UserError, match=message):
        labels_of(source, str(tmp_path))


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    source = open_source(str(images(tmp_path, "a/1.png", "b/1.png")))
    (tmp_path / "c" / "deeper").mkdir(parents=True)
    with pytest.raises(UserError, match=r"class folder .*/c holds no images"):
        labels_of(source, str(tmp_path))
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match=r"/c \(and 1 others\) holds no images"):
        labels_of(source, str(tmp_path))


@pytest.mark.parametrize(
    "lines",
    [
        ["1.png, ox", "# a remark,ox", "2.png,cat", "1.png,ox"],
        ["file,size,Label", "1.png,8,ox", "2.png,8,cat", "1.png,8,ox"],
    ],
)
def test_a_list_gives_labels_in_a_column(tmp_path: Path, lines: list[str]) -> None:
    images(tmp_path, "1.png", "2.png")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    source = open_source(str(tmp_path / "list.csv"))
    labels = labels_of(source, "list.csv")
    assert [source.name(i) for i in range(len(source))] == ["1.png", "2.png", "1.png"]
    assert labels.classes == ("cat", "ox")
    assert labels.targets(torch.arange(3)).argmax(1).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("file", "lines", "message"),
    [
        ("list.txt", ["1.png", "2.png"], "has no labels; use a .csv file"),
        ("list.csv", ["1.png", "2.png"], "has no labels"),
        ("list.csv", ["path,size", "1.png,3", "2.png,4"], "has no labels"),
        ("list.csv", ["1.png,a", "2.png"], "gives no label for 2.png"),
        ("list.csv", ["path,label", "1.png,a", "2.png, "], "gives no label for 2.png"),
        ("list.csv", ["1.png,a", "2.png,a"], "has a single class, 'a'"),
    ],
)
def test_lists_without_labels_are_refused(tmp_path: Path, file: str, lines: list[str], message: str) -> None:
    images(tmp_path, "1.png", "2.png")
    (tmp_path / file).write_text("\n".join(lines) + "\n")
    source = open_source(str(tmp_path / file))
    with pytest.raises(UserError, match=message):
        labels_of(source, str(tmp_path / file))


def test_scenes_show_their_objects() -> None:
    source = SceneSource(SceneConfig(), "val", 6)
    labels = labels_of(source, "scenes:val")
    assert labels.multi_label
    indices = torch.tensor([4, 1, 4])
    for _ in range(2):  # drawn, then cached
        for index, row in zip(indices.tolist(), labels.targets(indices), strict=True):
            shown = {labels.classes[i] for i in row.nonzero()[:, 0].tolist()}
            assert shown == {o.name for o in source.scene(index).objects}


def test_fingerprints_tell_labels_apart() -> None:
    prints = {
        ClassLabels(classes, np.array(codes)).fingerprint()
        for classes, codes in ((("a", "b"), [0, 1]), (("a", "b"), [1, 0]), (("a", "c"), [0, 1]))
    }
    assert len(prints) == 3
    assert ClassLabels(("a", "b"), np.array([0, 1])).fingerprint() in prints


def test_differing_classes_are_named() -> None:
    def labels(classes: str) -> ClassLabels:
        return ClassLabels(tuple(classes), np.zeros(1, np.int64))

    check_same_classes(labels("abc"), labels("abc"), "val")
    with pytest.raises(
        UserError, match=r"^val and the training data have different classes: val lacks a and adds d$"
    ):
        check_same_classes(labels("abc"), labels("bcd"), "val")
    with pytest.raises(UserError, match=r"val lacks a, b, c and 2 others$"):
        check_same_classes(labels("abcdefg"), labels("fg"), "val")


def test_a_spread_reaches_over_all_classes(tmp_path: Path) -> None:
    root = images(tmp_path, *(f"{folder}/{i}.png" for folder in "abcd" for i in range(5)))
    source = open_source(str(root))
    spread = SpreadSource(source, 4)
    assert isinstance(spread, ImageSource)
    assert [spread.name(i) for i in range(len(spread))] == ["a/0.png", "b/0.png", "c/0.png", "d/0.png"]
    assert spread.load(3).size == (8, 8)
    assert len({source.fingerprint(), spread.fingerprint(), SpreadSource(source, 5).fingerprint()}) == 3
