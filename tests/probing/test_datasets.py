"""Data sets in their official layouts: what their pixels mean, and what is refused on one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from localign.errors import UserError
from localign.probing.classes import ade20k, coco_stuff
from localign.probing.datasets import COCO_MAPS, open_labelled
from localign.probing.labels import reduce_labels
from localign.probing.segmentation import AttributeLabels, FolderSegmentation, labelled_batches

SHARED = Path(__file__).resolve().parents[3] / "shared"
SAMPLE = SHARED / "data" / "coco-sample"
SCORES = SHARED / "golden" / "scores"


def write_pair(images: Path, masks: Path, stem: str, values: NDArray[np.uint8]) -> None:
    """A grey photograph and a label map of its size."""
    for folder in (images, masks):
        folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", values.shape[::-1], (90, 90, 90)).save(images / f"{stem}.jpg")
    Image.fromarray(values).save(masks / f"{stem}.png")


def write_coco(root: Path, maps: str = "stuffthingmaps/{part}", images: str = "images/{part}") -> Path:
    """Two photographs in either part; their pixels are a person, a hair brush, a banner, wood, nothing."""
    values = np.array([[0, 90, 91, 181, 255]], dtype=np.uint8).repeat(4, axis=0)
    for part in ("train2017", "val2017"):
        for stem in ("000000000009", "000000000025"):
            write_pair(root / images.format(part=part), root / maps.format(part=part), stem, values)
    return root


def write_ade20k(root: Path) -> Path:
    values = np.array([[0, 1, 13, 150]], dtype=np.uint8).repeat(4, axis=0)
    for part, short in (("training", "train"), ("validation", "val")):
        write_pair(root / "images" / part, root / "annotations" / part, f"ADE_{short}_00000001", values)
    return root


def write_folder(root: Path) -> Path:
    for part in ("train", "val"):
        write_pair(root / "images" / part, root / "masks" / part, "a", np.ones((4, 4), dtype=np.uint8))
    (root / "classes.json").write_text(json.dumps({"0": "unlabeled", "1": "cat"}))
    return root


def test_coco_stuff_has_91_things_91_stuff_and_unlabeled() -> None:
    table = coco_stuff()
    assert len(table.names) == len(set(table.names)) == 183
    known = {0: "unlabeled", 1: "person", 12: "street sign", 91: "hair brush", 92: "banner", 182: "wood"}
    assert {i: table.names[i] for i in known} == known
    assert table.kinds == ("other",) + ("thing",) * 91 + ("stuff",) * 91
    # The eleven things that were never annotated.
    removed = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91]
    named = "street sign,hat,shoe,eye glasses,plate,mirror,window,desk,door,blender,hair brush"
    assert [table.names[i] for i in removed] == named.split(",")


def test_coco_stuff_values_are_the_class_minus_one_modulo_256() -> None:
    ids = coco_stuff().ids.tolist()
    assert all(ids[v] == (v + 1) % 256 for v in (*range(182), 255))
    assert set(ids[182:255]) == {-1}


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the sample data beside the repository is missing")
def test_coco_stuff_calls_its_classes_as_coco_does() -> None:
    table = json.loads((SAMPLE / "classes.json").read_text())
    common = {int(i): name for i, name in table.items() if int(i) <= 182}
    assert len(common) > 100
    assert {i: coco_stuff().names[i] for i in common} == common


def test_ade20k_has_150_classes_and_other() -> None:
    table = ade20k()
    assert len(table.names) == len(set(table.names)) == 151
    known = {0: "other", 1: "wall", 2: "building", 13: "person", 21: "car", 137: "traffic light", 150: "flag"}
    assert {i: table.names[i] for i in known} == known
    assert table.kinds is not None
    assert (table.kinds.count("thing"), table.kinds.count("stuff"), table.kinds[0]) == (115, 35, "other")


@pytest.mark.parametrize("maps", COCO_MAPS)
@pytest.mark.parametrize("images", ["images/{part}", "{part}"])
def test_coco_is_recognised_in_its_official_layouts(tmp_path: Path, images: str, maps: str) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text("{}")
    source = open_labelled(str(write_coco(tmp_path, maps, images)), "val")
    assert isinstance(source, FolderSegmentation)
    assert (source.kind, len(source), len(source.classes)) == ("coco-stuff", 2, 183)
    assert source.name(0) == "000000000009.jpg"
    assert source.class_kinds == coco_stuff().kinds
    assert source.load_labelled(1)[1][0].tolist() == [1, 91, 92, 182, 0]


def test_coco_splits_and_things_only(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    (root / "images" / "train2017" / "000000000009.jpg").unlink()
    train, val, test = (open_labelled(f"coco:{root}", split) for split in ("train", "val", "test"))
    assert (len(train), len(val)) == (1, 2)
    assert test.fingerprint() == val.fingerprint() != train.fingerprint()
    things = open_labelled(str(root), "val", things_only=True)
    assert things.classes == val.classes[:92]
    assert things.class_kinds == ("other",) + ("thing",) * 91
    assert things.load_labelled(0)[1][0].tolist() == [1, 91, 0, 0, 0]
    assert things.fingerprint() != val.fingerprint()


def test_ade20k_is_recognised_and_named_by_its_own_file(tmp_path: Path) -> None:
    root = write_ade20k(tmp_path)
    source = open_labelled(str(root), "test")
    assert (source.kind, len(source), source.name(0)) == ("ade20k", 1, "ADE_val_00000001.jpg")
    assert source.load_labelled(0)[1][0].tolist() == [0, 1, 13, 150]
    names = ["Idx\tRatio\tTrain\tVal\tName"]
    names += [f"{i} \t0.1\t1\t1\t{name} , synonym" for i, name in enumerate(ade20k().names) if i]
    (root / "objectInfo150.txt").write_text("\n".join(names))
    again = open_labelled(str(root), "test")
    assert again.fingerprint() == source.fingerprint()
    assert again.class_kinds == ade20k().kinds
    (root / "objectInfo150.txt").write_text("\n".join(names).replace("wall ", "partition "))
    other = open_labelled(str(root), "test")
    assert other.classes[1] == "partition"
    assert other.class_kinds is None
    (root / "objectInfo150.txt").write_text("\n".join(names[:-1]))
    with pytest.raises(UserError, match=r"objectInfo150\.txt is not a table of 150 classes"):
        open_labelled(str(root), "test")


def test_a_folder_reports_on_its_val(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    assert open_labelled(str(root), "train").classes == ("unlabeled", "cat")
    val, test = open_labelled(str(root), "val"), open_labelled(f"folder:{root}", "test")
    assert val.fingerprint() == test.fingerprint()
    (root / "images" / "val2014").mkdir()
    with pytest.raises(UserError, match="several folders for val: val, val2014"):
        open_labelled(str(root), "val")


def test_scenes_have_three_splits_with_attribute_labels() -> None:
    splits = [open_labelled("scenes", split, scenes=2) for split in ("train", "val", "test")]
    assert len({source.fingerprint() for source in splits}) == 3
    assert all(isinstance(source, AttributeLabels) and len(source) == 2 for source in splits)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*/none; --data takes scenes or a folder$"):
        open_labelled(str(tmp_path / "none"), "val")
    with pytest.raises(UserError, match=r"there is no folder scene; .* did you mean 'scenes'"):
        open_labelled("scene", "val")
    with pytest.raises(
        UserError, match=r"no known layout of labelled data; it needs images/.* images/validation$"
    ):
        open_labelled(str(tmp_path), "val")
    write_ade20k(tmp_path / "inside")
    with pytest.raises(UserError, match=r"did you mean .*/inside\?"):
        open_labelled(str(tmp_path), "val")
    with pytest.raises(UserError, match="unknown split 'validation'"):
        open_labelled("scenes", "validation")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--things-only applies to COCO-Stuff only, not to scenes"):
        open_labelled("scenes", "val", things_only=True)


def test_missing_parts_of_a_layout_are_named(tmp_path: Path) -> None:
    photographs = write_coco(tmp_path / "coco", maps="elsewhere/{part}", images="{part}")
    with pytest.raises(UserError, match=r"no COCO-Stuff pixel maps in .*: .* stuffthingmaps/val2017 or "):
        open_labelled(str(photographs), "val")
    with pytest.raises(UserError, match=r"no ADE20k images in .*: there is no folder images/validation"):
        open_labelled(f"ade20k:{photographs}", "val")
    folder = write_folder(tmp_path / "folder")
    with pytest.raises(UserError, match=r"no COCO images in .*folder: there is no folder images/val2017 or"):
        open_labelled(f"coco:{folder}", "val")
    (folder / "masks" / "val").rename(folder / "masks" / "other")
    with pytest.raises(UserError, match=r"no label maps in .*: there is no folder masks/val$"):
        open_labelled(str(folder), "val")
    (folder / "images" / "train" / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"no images in the folder .*images/train$"):
        open_labelled(str(folder), "train")
    (folder / "classes.json").unlink()
    with pytest.raises(UserError, match=r"cannot read the class table .*classes\.json: No such file"):
        open_labelled(str(folder), "train")


def test_a_bad_first_pair_shows_when_the_data_are_opened(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    first = root / "stuffthingmaps" / "val2017" / "000000000009.png"
    Image.new("L", (5, 4), 200).save(first)
    with pytest.raises(
        UserError, match=r"0009\.png holds values .*: \[200\]; the table has the values 0\.\.181, .* and 255"
    ):
        open_labelled(str(root), "val")
    Image.new("L", (4, 4)).save(first)
    with pytest.raises(UserError, match=r"0009\.png has 4 x 4 pixels, its image 5 x 4"):
        open_labelled(str(root), "val")
    first.write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot read the label map .*0009\.png: not a PNG image"):
        open_labelled(str(root), "val")
    (root / "images" / "val2017" / "000000000009.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(UserError, match=r"cannot read the image .*val2017/000000000009\.jpg: "):
        open_labelled(str(root), "val")


def test_a_bad_later_map_ends_the_pass_by_name(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    Image.new("L", (5, 4), 182).save(root / "stuffthingmaps" / "val2017" / "000000000025.png")
    source = open_labelled(str(root), "val")
    with pytest.raises(UserError, match=r"^the label map .*0025\.png holds values .*: \[182\]"):
        list(labelled_batches(source, (4, 4), batch=1, workers=1))


def test_opening_decodes_no_more_than_the_first_pair(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    for i in range(300):
        for place, suffix in (("images", ".jpg"), ("stuffthingmaps", ".png")):
            (root / place / "train2017" / f"1{i:011d}{suffix}").touch()  # empty: no image
    assert len(open_labelled(str(root), "train")) == 302


@pytest.mark.skipif(
    not (SCORES.is_dir() and SAMPLE.is_dir()), reason="the sample data beside the repository is missing"
)
@pytest.mark.parametrize(("size", "patch"), [(224, 16), (336, 14), (384, 14)])
def test_pixel_maps_of_coco_give_the_published_labels(tmp_path: Path, size: int, patch: int) -> None:
    """The sample's ids, which COCO-Stuff shares up to 182, written as COCO-Stuff writes them."""
    from safetensors.torch import load_file

    golden = load_file(str(SCORES / "probing.safetensors"))
    files = json.loads((SCORES / "probing.json").read_text())["files"]
    for name in files:
        ids = np.asarray(Image.open(SAMPLE / "masks" / "val2017" / name)).astype(int)
        values = np.where((ids == 0) | (ids > 182), 255, ids - 1).astype(np.uint8)
        write_pair(tmp_path / "images/val2017", tmp_path / "stuffthingmaps/val2017", Path(name).stem, values)
    source = open_labelled(str(tmp_path), "val")
    _, maps = next(labelled_batches(source, (size, size), batch=len(files)))
    order = [[source.name(i) for i in range(len(source))].index(f"{Path(name).stem}.jpg") for name in files]
    labels = reduce_labels(maps[torch.tensor(order)], patch, 183)
    expected = golden[f"labels.{size}.{patch}.union"].flatten(1, 2).bool()[..., :183]
    expected[..., 0] = ~expected[..., 1:].any(dim=-1)
    assert torch.equal(labels.patch, expected)
    image = golden[f"labels.{size}.{patch}.global-union"].bool()
    assert torch.equal(labels.image[:, 1:], image[:, 1:183])
    assert torch.equal(labels.image[:, 0], image[:, 0] | image[:, 183:].any(dim=-1))
