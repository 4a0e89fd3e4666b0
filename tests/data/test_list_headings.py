"""Lists of images: a heading is never an image and a class, whatever its words, separator and quotes."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from localign.data.classification import ClassLabels, labels_of
from localign.data.sources import open_source
from localign.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images, and a third whose name has a comma."""
    root = tmp_path_factory.mktemp("lists")
    (root / "image").mkdir()  # a folder of the name of a heading
    for name in ("a.png", "b.png", "c,d.png"):
        Image.new("RGB", (4, 4)).save(root / name)
    return root


def opened(folder: Path, content: str | bytes, suffix: str = ".csv") -> tuple[list[str], list[str] | str]:
    """The names of a list, and the label of each image or the error of its labels."""
    file = folder / f"list{suffix}"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    source = open_source(str(file))
    names = [source.name(i) for i in range(len(source))]
    try:
        labels = labels_of(source, file.name)
    except UserError as error:
        return names, str(error)
    assert isinstance(labels, ClassLabels)
    return names, [labels.classes[code] for code in labels.codes]


BOTH, CAT_DOG = ["a.png", "b.png"], ["cat", "dog"]


@pytest.mark.parametrize(
    "heading",
    [
        "path", "filepath", "FilePath", "file_path", "image_path", "Image Path", "img_path", "img", "IMG", "image",
        "image_id", "filename", "file-name", " name ", '"image"', "photo", "where it is", "Unnamed: 0",
    ],
)  # fmt: skip
def test_a_heading_of_any_word_is_no_image(folder: Path, heading: str) -> None:
    assert opened(folder, f"{heading},label\na.png,cat\nb.png,dog\n") == (BOTH, CAT_DOG)


@pytest.mark.parametrize(
    "heading", ["label", "Class", "category", "target", "class_name", "LABEL", '"class"', "class name"]
)
def test_the_column_of_labels_is_found_by_its_heading(folder: Path, heading: str) -> None:
    assert opened(folder, f"path,size,{heading}\na.png,8,cat\nb.png,9,dog\n") == (BOTH, CAT_DOG)


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        ("filepath\tlabel\na.png\tcat\nb.png\tdog\n", ".csv"),
        ("filepath\tlabel\na.png\tcat\nb.png\tdog\n", ".tsv"),
        ("a.png\tcat\nb.png\tdog\n", ".csv"),
        ("path;label\na.png;cat\nb.png;dog\n", ".csv"),
        ("a.png;cat\nb.png;dog\n", ".csv"),
        ("path|label\r\na.png|cat\r\nb.png|dog\r\n", ".csv"),
        (b"\xef\xbb\xbfpath,label\na.png,cat\nb.png,dog\n", ".csv"),
        (b'\xef\xbb\xbf"path","label"\n"a.png", "cat"\n"b.png", "dog"\n', ".csv"),
        (",filepath,label\n0,a.png,cat\n1,b.png,dog\n", ".csv"),  # with the row numbers that pandas writes
        ("label,path\ncat,a.png\ndog,b.png\n", ".csv"),
        ("name,image_path,label\nx,a.png,cat\ny,b.png,dog\n", ".csv"),
        ("\n# remark\npath,label\n\na.png,cat\n,\nb.png,dog\n", ".csv"),
        ("path,label\ra.png,cat\rb.png,dog\r", ".csv"),
        ('{"filepath": "a.png", "Label": "cat"}\n\n{"image_path": "b.png", "class": "dog"}\n', ".jsonl"),
        (b'\xef\xbb\xbf{"img": "a.png", "label": "cat"}\r\n{"img": "b.png", "label": "dog"}\r\n', ".jsonl"),
    ],
)
def test_every_dialect_gives_the_same_images_and_labels(
    folder: Path, content: str | bytes, suffix: str
) -> None:
    assert opened(folder, content, suffix) == (BOTH, CAT_DOG)


def test_a_name_with_the_separator_is_one_name(folder: Path) -> None:
    assert opened(folder, 'path,label\n"c,d.png",cat\nb.png,dog\n') == (["c,d.png", "b.png"], CAT_DOG)
    assert opened(folder, "c,d.png;cat\nb.png;dog\n") == (["c,d.png", "b.png"], CAT_DOG)


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        ("filepath\na.png\nb.png\n", ".txt"),
        ("filepath\na.png\nb.png\n", ".csv"),
        ("filepath,title\na.png,a cat sits\nb.png,a dog\n", ".csv"),  # captions are no classes
        ("a.png\nb.png", ".txt"),
    ],
)
def test_lists_without_labels_have_none(folder: Path, content: str, suffix: str) -> None:
    names, labels = opened(folder, content, suffix)
    assert names == BOTH
    assert "has no labels" in labels


@pytest.mark.parametrize(
    ("content", "suffix", "line"),
    [
        ("colour,label\nred,cat\n", ".csv", "first row of .* names no file: 'colour'"),
        ("0,a.png,cat\n1,b.png,dog\n", ".csv", "first row of .* names no file: '0'"),
        ("title\na.png\n", ".txt", "first row of .* names no file: 'title'"),
        ("a.png 0\nb.png 1\n", ".txt", "names no file: 'a.png 0'.*labels need a .csv list"),
        ("path,label\n,cat\n", ".csv", "line 2, names no image"),
        ("path,label\n", ".csv", "names no images"),
        ("path\nx.png\ny.png\n", ".csv", "none of the 2 files .* the first is 'x.png'"),
        (b"path,label\n\xe4.png,cat\n", ".csv", "not a UTF-8 list"),
        (b"\xff\xfep\x00a\x00", ".csv", "not a UTF-8 list .*UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ".csv", "Git LFS pointer"),
    ],
)
def test_what_is_no_list_is_one_line(folder: Path, content: str | bytes, suffix: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        opened(folder, content, suffix)


@pytest.mark.parametrize("missing", ["", "nan", "NaN", "null", "<NA>", " "])
def test_a_missing_label_is_no_class(folder: Path, missing: str) -> None:
    names, error = opened(folder, f"path,label\na.png,cat\nb.png,{missing}\n")
    assert names == BOTH
    assert error == f"{folder / 'list.csv'} gives no label for b.png"


@pytest.mark.parametrize("label", ["null", "NaN", '""'])
def test_a_missing_label_of_an_object_is_no_class(folder: Path, label: str) -> None:
    names, error = opened(
        folder, f'{{"path": "a.png", "label": 1}}\n{{"path": "b.png", "label": {label}}}\n', ".jsonl"
    )
    assert names == BOTH
    assert "gives no label for b.png" in error


@pytest.mark.parametrize(("label", "kind"), [("[1, 2]", "list"), ('{"id": 1}', "JSON object")])
def test_labels_of_several_values_are_an_error_of_commands_that_need_labels(
    folder: Path, label: str, kind: str
) -> None:
    names, error = opened(folder, f'{{"path": "a.png", "label": {label}}}\n', ".jsonl")
    assert names == ["a.png"]
    assert f"its label is a {kind}; a label is a word or a number" in error


def test_names_that_are_not_utf_8_are_read_from_a_list(tmp_path: Path) -> None:
    name = b"\xe4.png".decode("utf-8", "surrogateescape")
    Image.new("RGB", (4, 4)).save(tmp_path / name)
    assert opened(tmp_path, b"\xe4.png\n", ".txt")[0] == [name]
