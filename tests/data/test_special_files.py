"""Pipes, sockets, devices and links in circles are no images: they are skipped and named; nothing waits for them."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localign.data.classification import labels_of
from localign.data.decoding import UnreadableImage, read_image
from localign.data.images import print_notice
from localign.data.sources import FileListSource, FolderSource, open_source
from localign.data.untrusted import walking
from localign.datatools.reading import open_files
from localign.errors import UserError
from localign.options.datatools import ReadConfig
from localign.probing.segmentation import FolderSegmentation
from localign.vlm.data.images import open_image

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """Whatever waits for a pipe is ended."""

    def end(*_: object) -> None:
        raise TimeoutError("the test waits")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_linked_pipe(path: Path) -> None:
    os.mkfifo(path.parent / ".pipe")
    path.symlink_to(".pipe")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def two_links_in_a_circle(path: Path) -> None:
    path.symlink_to(".other")
    (path.parent / ".other").symlink_to(path.name)


SPECIAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pipe": (a_pipe, "a pipe"),
    "a socket": (a_socket, "a socket"),
    "a device": (a_device, "a device"),
    "a linked pipe": (a_linked_pipe, "a pipe"),
    "a link to itself": (a_link_to_itself, "a link that leads to itself"),
    "two links in a circle": (two_links_in_a_circle, "a link that leads to itself"),
}


@pytest.fixture(params=list(SPECIAL))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A folder with two images and, in a sub-folder, something called x.png that is no file; and its kind."""
    make, reason = SPECIAL[request.param]
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    make(tmp_path / "sub" / "x.png")
    return tmp_path, reason


def test_a_folder_is_read_without_it_and_names_it(
    folder: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    root, reason = folder
    source = open_source(str(root))
    assert isinstance(source, FolderSource)
    assert [source.name(i) for i in range(len(source))] == ["a.png", "sub/b.png"]
    assert source.skipped == (("sub/x.png", reason),)
    line = f"data       skipped 1 entry that is no image: sub/x.png ({reason})\n"
    print_notice(source)
    assert capsys.readouterr().err == line
    open_files(ReadConfig(source=str(root)))
    assert capsys.readouterr().err == line


def test_a_list_that_names_it_counts_it_as_unreadable(folder: tuple[Path, str]) -> None:
    root, _ = folder
    (root / "list.txt").write_text("a.png\nsub/x.png\n")
    source = FileListSource(root / "list.txt")
    assert source.load(0).size == (8, 8)
    with pytest.raises(UnreadableImage, match=r"^sub/x\.png: [^/]+$"):
        source.load(1)


def test_an_image_of_a_conversation_is_refused(folder: tuple[Path, str]) -> None:
    root, _ = folder
    with pytest.raises(UnreadableImage):
        read_image(root / "sub" / "x.png", "x", upright=False)
    with pytest.raises(UserError, match=r"^cannot read an image: [^\n]+$"):
        open_image(root / "sub" / "x.png")


def test_a_folder_of_label_maps_is_read_without_it(
    folder: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    root, reason = folder
    Image.fromarray(np.ones((8, 8), np.uint8)).save(root / "b.png")
    source = FolderSegmentation(root / "sub", root, ["nothing", "cat"])
    assert [source.name(i) for i in range(len(source))] == ["b.png"]
    assert source.load_labelled(0)[1].max() == 1
    assert f"skipped 1 entry that is no file: x.png ({reason})" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".tar", ".parquet"])
def test_a_folder_of_shards_is_no_folder_of_pipes(suffix: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"x{suffix}")
    with pytest.raises(UserError, match="no images in the folder"):
        open_source(str(tmp_path))


def test_a_folder_of_nothing_but_pipes_says_so(tmp_path: Path) -> None:
    for number in range(5):
        os.mkfifo(tmp_path / f"{number}.png")
    with pytest.raises(
        UserError, match=r"skipped 5 entries that are no images: .\.png \(a pipe\), .*, \.\.\.$"
    ):
        FolderSource(tmp_path)


def names(source: FolderSource) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def test_links_of_folders_in_a_circle_leave_a_folder_usable(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png")
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "cat" / "..x").symlink_to("nowhere")
    source = FolderSource(tmp_path)
    assert names(source) == ["cat/x.png", "dog/x.png"]
    assert source.skipped == (("itself", "a link that leads to itself"), ("up", "a link that leads back"))
    labels = labels_of(source, str(tmp_path))
    assert list(labels.classes) == ["cat", "dog"]


def test_links_between_all_folders_do_not_multiply_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walking, "MAX_VISITS", 3)
    for number in range(9):
        (tmp_path / str(number)).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / str(number) / "x.png")
        for other in range(9):
            (tmp_path / str(number) / f"to{other}").symlink_to(tmp_path / str(other))
    source = FolderSource(tmp_path)
    assert {f"{number}/x.png" for number in range(9)} <= set(names(source))
    assert len(source) <= 9 + 3 * 81
    assert ("links that multiply" in {reason for _, reason in source.skipped}) is True
    assert names(FolderSource(tmp_path)) == names(source)


def test_a_link_to_nothing_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("gone.png")
    source = FolderSource(tmp_path)
    assert names(source) == ["a.png", "b.png"]
    with pytest.raises(UnreadableImage, match="no such file"):
        source.load(1)


def test_a_name_that_would_move_the_cursor_is_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.mkfifo(os.path.join(os.fsencode(tmp_path), b"\x1b[2J\n\xff.png"))
    print_notice(FolderSource(tmp_path))
    assert r"\x1b[2J\n\xff.png (a pipe)" in capsys.readouterr().err
