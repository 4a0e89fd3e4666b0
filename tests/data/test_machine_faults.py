"""A fault of the machine is tried again or ends the run; only a fault of the file makes an image unreadable."""

from __future__ import annotations

import errno
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from localign.data import decoding
from localign.data.decoding import UnreadableImage, decode_image, decode_pixels, open_image, read_bytes
from localign.data.image_source import ImageSource
from localign.data.loader import EvalLoader, TrainLoader
from localign.data.sources import FolderSource, TarSource
from localign.data.transforms import EvalTransform, TrainTransform
from localign.data.untrusted import faults
from localign.datatools.verify import _Verifier
from localign.errors import RunFailure, UserError
from localign.probing.segmentation import FolderSegmentation, labelled_batches


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


MACHINE: dict[str, Exception] = {
    "no memory": MemoryError(),
    "no memory, from NumPy": MemoryError("Unable to allocate 3.00 GiB for an array"),
    "no memory, from Pillow": OSError("out of memory error when reading image file"),
    "no memory, from torch": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    **{
        name: os_error(getattr(errno, name))
        for name in ("EIO", "ESTALE", "EMFILE", "ENFILE", "ENOMEM", "ETIMEDOUT", "EAGAIN", "ENODEV", "ENOTCONN")
    },
}  # fmt: skip
OF_A_FILE: dict[str, Exception] = {
    **{name: os_error(getattr(errno, name)) for name in ("ENOENT", "EACCES", "EISDIR", "ENOTDIR", "ELOOP")},
    "truncated": OSError("image file is truncated (3 bytes not processed)"),
    "a decoder's fault": SyntaxError("broken PNG file"),
    "too deep": RecursionError("maximum recursion depth exceeded"),
}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "RETRY_DELAYS", (0.0, 0.0, 0.0))


class Failing(ImageSource):
    """Twelve images; one of them cannot be read, for a given reason."""

    kind = "failing"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 12

    def name(self, index: int) -> str:
        return f"{index}.png"

    def load(self, index: int) -> Image.Image:
        with decoding.unreadable_on_failure(self.name(index)):
            if index == 7:
                raise self.error
            return Image.new("RGB", (8, 8))

    def fingerprint(self) -> str:
        return "0"


class InTransform(TrainTransform):
    """The transform runs out of memory."""

    def __call__(self, image: Any, seed: int, position: int) -> Any:
        if position == 5:
            raise MemoryError
        return super().__call__(image, seed, position)


def train(source: ImageSource, workers: int = 0, transform: TrainTransform | None = None) -> TrainLoader:
    return TrainLoader(
        source,
        transform or TrainTransform(8),
        seed=0,
        global_batch=4,
        micro_batch=4,
        end_step=3,
        workers=workers,
        max_bad_share=0.5,
    )


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", MACHINE)
def test_a_fault_of_the_machine_ends_training_and_replaces_no_sample(fault: str, workers: int) -> None:
    loader = train(Failing(MACHINE[fault]), workers)
    with pytest.raises(RunFailure, match=r"^7\.png cannot be read: [^\n]+fault of the machine[^\n]*$"):
        list(loader)
    assert len(loader.bad) == 0


@pytest.mark.parametrize("fault", OF_A_FILE)
def test_a_fault_of_a_file_is_a_bad_image(fault: str) -> None:
    loader = train(Failing(OF_A_FILE[fault]))
    assert sum(len(batch.images) for batch in loader) == 12
    assert list(loader.bad.reasons) == ["7.png"]


@pytest.mark.parametrize("fault", MACHINE)
def test_a_fault_of_the_machine_ends_an_evaluation(fault: str) -> None:
    loader = EvalLoader(Failing(MACHINE[fault]), EvalTransform(8), batch=4, max_bad_share=0.5)
    with pytest.raises(RunFailure, match="fault of the machine"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_memory_in_a_transform_is_one_line(workers: int) -> None:
    loader = train(Failing(ValueError()), workers, InTransform(8))
    with pytest.raises(
        RunFailure, match=r"^the sample at position 5 cannot be read: out of memory[^\n]+--workers"
    ):
        list(loader)


def test_a_bug_in_a_transform_stays_a_bug() -> None:
    class Buggy(TrainTransform):
        def __call__(self, image: Any, seed: int, position: int) -> Any:
            raise IndexError("a bug")

    with pytest.raises(IndexError, match="a bug"):
        list(train(Failing(ValueError()), 0, Buggy(8)))


def failing_open(monkeypatch: pytest.MonkeyPatch, number: int, times: int) -> list[str]:
    """Make the first attempts to open x.png fail. Returns a list that grows with each attempt."""
    attempts: list[str] = []
    real = os.open

    def open_(path: Any, *args: Any, **options: Any) -> int:
        if str(path).endswith("x.png"):
            attempts.append(str(path))
            if len(attempts) <= times:
                raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", open_)
    return attempts


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT])
def test_a_passing_fault_of_a_disk_changes_nothing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "x.png")
    attempts = failing_open(monkeypatch, number, 3)
    assert read_bytes(tmp_path / "x.png", "x") == (tmp_path / "x.png").read_bytes()
    assert len(attempts) == 4


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_lasting_fault_of_a_disk_names_the_file(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    attempts = failing_open(monkeypatch, number, 99)
    with pytest.raises(RunFailure, match=rf"x\.png cannot be read: {os.strerror(number)}") as caught:
        FolderSource(tmp_path).load(0)
    assert len(attempts) == 4
    assert ("ulimit -n" in str(caught.value)) == (number == errno.EMFILE)
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES])
def test_a_file_that_is_gone_or_forbidden_is_not_tried_again(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    attempts = failing_open(monkeypatch, number, 99)
    with pytest.raises(UnreadableImage, match=r"^x\.png: "):
        FolderSource(tmp_path).load(0)
    assert len(attempts) == 1


DECODERS: dict[str, Callable[[bytes], object]] = {
    "decode_image": lambda data: decode_image(data, "x.png"),
    "decode_pixels": lambda data: decode_pixels(data, "x.png"),
    "open_image": lambda data: open_image(data, "x.png"),
}


@pytest.mark.parametrize("decoder", DECODERS)
def test_no_memory_while_decoding_is_not_said_of_the_image(
    decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(decoding, "to_rgb", no_memory)
    with pytest.raises(RunFailure, match=r"^x\.png cannot be read: out of memory"):
        DECODERS[decoder]((tmp_path / "x.png").read_bytes())


def test_verification_lists_no_image_for_a_fault_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    failing_open(monkeypatch, errno.EIO, 99)
    with pytest.raises(RunFailure, match=r"x\.png"):
        _Verifier(FolderSource(tmp_path))((0, 1))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("part", ["images", "masks"])
def test_probing_ends_with_a_failed_run(
    part: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / ("x.png" if part == "images" else "x.jpg"))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "masks" / "x.png")
    source = FolderSegmentation(tmp_path / "images", tmp_path / "masks", ["a", "b"])
    failing_open(monkeypatch, errno.EIO, 99)
    with pytest.raises(RunFailure, match=rf"^[^\n]*{part}/x\.png cannot be read: [^\n]+$"):
        list(labelled_batches(source, (8, 8), 1, workers))


def a_shard(folder: Path) -> Path:
    Image.new("RGB", (8, 8)).save(folder / "x.png")
    with tarfile.open(folder / "part.tar", "w") as tar:
        tar.add(folder / "x.png", "x.png")
    return folder / "part.tar"


def test_a_shard_that_is_gone_is_not_a_bad_image(tmp_path: Path) -> None:
    shard = a_shard(tmp_path)
    source = TarSource([shard])
    shard.unlink()
    with pytest.raises(RunFailure, match=r"part\.tar cannot be read any more: No such file"):
        source.load(0)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("times", [2, 99])
def test_a_fault_while_a_shard_is_read_is_tried_again(
    number: int, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = TarSource([a_shard(tmp_path)])
    attempts: list[int] = []
    real = os.pread

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        attempts.append(descriptor)
        if len(attempts) <= times:
            raise os_error(number)
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    if times == 2:
        assert source.load(0).size == (8, 8)
        assert len(attempts) == 3
        return
    with pytest.raises(RunFailure, match=r"^x\.png in .*part\.tar cannot be read: "):
        source.load(0)
    assert len(attempts) == 4


def test_a_user_error_in_a_worker_is_one_line() -> None:
    class Wrong(Failing):
        def load(self, index: int) -> Image.Image:
            raise UserError("the data are wrong")

    with pytest.raises(UserError, match=r"^the data are wrong$"):
        list(train(Wrong(ValueError()), 1))
