"""The stream of samples is a pure function of (seed, epoch, position)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from localign.data.loader import BadImages, Batch, EvalLoader, TrainLoader
from localign.data.sources import FileListSource, FolderSource, ImageSource, UnreadableImage, open_source
from localign.data.stream import SampleStream
from localign.data.transforms import EvalTransform, TrainTransform
from localign.errors import RunFailure, UserError

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet-sample" / "train"


Samples = dict[int, tuple[int, bytes]]
"""Position -> (index, pixels)."""


class Numbers(ImageSource):
    """A source whose images show their own index; the images in ``bad`` are unreadable."""

    kind = "numbers"

    def __init__(self, length: int = 37, bad: Iterable[int] = ()) -> None:
        self.length, self.bad = length, frozenset(bad)

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"image-{index}"

    def load(self, index: int) -> Image.Image:
        if index in self.bad:
            raise UnreadableImage(self.name(index), "made so")
        values = np.random.default_rng(index).integers(0, 256, (11, 15, 3), dtype=np.uint8)
        values[0, 0, 0] = index
        return Image.fromarray(values)

    def fingerprint(self) -> str:
        return f"numbers-{self.length}"


class Deadly(Numbers):
    """A source whose fifth image ends the process that reads it."""

    def load(self, index: int) -> Image.Image:
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(index)


class Broken(Numbers):
    """A source with a programming error."""

    def load(self, index: int) -> Image.Image:
        raise KeyError("a bug")


def loader(source: ImageSource | None = None, **options: Any) -> TrainLoader:
    settings: dict[str, Any] = {"seed": 1, "global_batch": 8, "micro_batch": 2, "end_step": 12} | options
    chosen = Numbers() if source is None else source
    return TrainLoader(chosen, settings.pop("transform", TrainTransform((8, 6))), **settings)


def by_position(batches: Iterable[Batch]) -> dict[int, tuple[int, bytes]]:
    found: dict[int, tuple[int, bytes]] = {}
    for batch in batches:
        assert batch.images.dtype == torch.uint8
        for image, position, index in zip(*batch[:3], strict=True):
            assert int(position) not in found
            found[int(position)] = (int(index), bytes(image.numpy()))
    return found


@pytest.fixture(scope="module")
def reference() -> dict[int, tuple[int, bytes]]:
    """96 positions of a source of 37 with three bad images: two and a half epochs."""
    return by_position(loader(Numbers(bad=(3, 20, 36)), max_bad_share=0.1))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("start_step", [0, 1, 7])
def test_ranks_workers_and_restarts_change_nothing(
    reference: Samples, workers: int, world_size: int, start_step: int
) -> None:
    found: dict[int, tuple[int, bytes]] = {}
    for rank in range(world_size):
        part = loader(
            Numbers(bad=(3, 20, 36)),
            rank=rank,
            world_size=world_size,
            workers=workers,
            start_step=start_step,
            max_bad_share=0.1,
        )
        batches = list(part)
        assert len(batches) == len(part)
        positions = torch.cat([b.positions for b in batches]).tolist()
        assert positions == sorted(positions)
        found |= by_position(batches)
    assert found == {p: v for p, v in reference.items() if p >= 8 * start_step}


@pytest.mark.slow
def test_spawned_workers_change_nothing(reference: Samples) -> None:
    part = loader(
        Numbers(bad=(3, 20, 36)), workers=2, start_step=6, max_bad_share=0.1, multiprocessing_context="spawn"
    )
    assert by_position(part) == {p: v for p, v in reference.items() if p >= 48}


def test_micro_batches_split_a_step_and_nothing_else(reference: Samples) -> None:
    for micro_batch in (1, 4, 8):
        part = loader(Numbers(bad=(3, 20, 36)), micro_batch=micro_batch, max_bad_share=0.1)
        assert part.micro_batches_per_step == 8 // micro_batch
        assert by_position(part) == reference


def test_a_second_pass_and_the_global_generators_are_as_before() -> None:
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    part = loader(workers=0)
    assert by_position(part) == by_position(part)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_image_comes_once_per_epoch_in_a_new_order() -> None:
    stream = SampleStream(0, 37)
    epochs = [[stream(37 * e + i) for i in range(37)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert sorted(i for _, i in epoch) == list(range(37))
    assert epochs[0] != [(0, i) for _, i in epochs[1]]
    assert stream.indices(30, 40).tolist() == [stream(p)[1] for p in range(30, 40)]
    assert [SampleStream(0, 37, shuffle=False)(p)[1] for p in (0, 36, 37, 75)] == [0, 36, 0, 1]
    assert SampleStream(1, 37).indices(0, 37).tolist() != stream.indices(0, 37).tolist()
    with pytest.raises(UserError, match="holds no images"):
        SampleStream(0, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_named_and_counted_once(workers: int) -> None:
    source = Numbers(bad=(3, 20))
    part = loader(source, workers=workers, max_bad_share=0.06)
    batches = list(part)
    indices = torch.cat([b.indices for b in batches])
    assert not set(indices.tolist()) & {3, 20}
    plain = SampleStream(1, 37).indices(0, 96)
    untouched = ~np.isin(plain, (3, 20))
    assert (indices.numpy()[untouched] == plain[untouched]).all()
    assert (~untouched).sum() >= 4  # several epochs met them
    assert part.bad.reasons == {"image-3": "made so", "image-20": "made so"}
    assert part.bad.share == 2 / 37
    assert {bad for b in batches for bad in b.bad} == {("image-3", "made so"), ("image-20", "made so")}


def test_too_many_bad_images_stop_the_run_with_names() -> None:
    with pytest.raises(UserError, match=r"1 of 37 images are unreadable \(2\.70%, at most 1\.00% .*made so"):
        list(loader(Numbers(bad=(4,))))
    with pytest.raises(UserError, match=r"image-\d+ \(made so\); .*; \.\.\."):
        list(loader(Numbers(bad=range(37)), micro_batch=8))
    with pytest.raises(UserError, match="no usable image for position 0"):
        list(loader(Numbers(bad=range(37)), max_bad_share=1.0))


def test_a_bad_image_counts_once() -> None:
    bad = BadImages(100, 0.02)
    assert bad.add((("a", "torn"),)) == (("a", "torn"),)
    assert bad.add((("a", "torn"),)) == ()
    bad.add((("a", "torn"), ("b", "empty")))
    assert len(bad) == 2
    assert bad.share == 0.02
    with pytest.raises(UserError, match="3 of 100"):
        bad.add((("c", "gone"),))


def test_files_a_list_misses_count_before_the_first_step(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png\ngone.png\n")
    source = FileListSource(tmp_path / "list.txt")
    with pytest.raises(UserError, match=r"gone\.png \(no such file\)"):
        loader(source)
    part = loader(source, max_bad_share=0.5)
    assert part.bad.reasons == {"gone.png": "no such file"}
    assert {int(i) for b in part for i in b.indices} == {0}


@pytest.mark.slow
def test_a_dead_worker_is_a_failed_run() -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(RunFailure, match="loader worker died"):
        list(loader(Deadly(), workers=2))
    assert signal.getsignal(signal.SIGCHLD) == handler  # nothing is left to strike elsewhere


def test_a_bug_in_the_source_stays_a_bug() -> None:
    for workers in (0, 1):
        with pytest.raises(KeyError, match="a bug"):
            list(loader(Broken(), workers=workers))


def test_contradictions_are_refused_with_the_numbers() -> None:
    cases: dict[str, dict[str, Any]] = {
        "batch of 8 .* 3 processes": {"world_size": 3},
        "batch of 8 .* micro-batches of 3": {"micro_batch": 3},
        "rank 2 .* 2 processes": {"rank": 2, "world_size": 2},
        "steps": {"start_step": 13},
        "loader workers must be at least 0, not -1": {"workers": -1},
        "must lie in 0..1": {"max_bad_share": 2.0},
        "micro-batch 0": {"micro_batch": 0},
    }
    for line, options in cases.items():
        with pytest.raises(UserError, match=line):
            loader(**options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_walks_every_image_once_in_order(workers: int, world_size: int) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        part = EvalLoader(
            Numbers(bad=(0, 8)),
            EvalTransform(8),
            batch=4,
            rank=rank,
            world_size=world_size,
            workers=workers,
            max_bad_share=0.1,
        )
        batches = list(part)
        assert len(batches) == len(part)
        assert part.end - part.begin in (37 // world_size, 37 // world_size + 1)
        assert sum(len(b.images) for b in batches) + len(part.bad) == part.end - part.begin
        seen += [int(i) for b in batches for i in b.indices]
        assert by_position(part) == by_position(batches)
    assert seen == [i for i in range(37) if i not in (0, 8)]


def test_evaluation_of_the_first_images_only() -> None:
    batches = list(EvalLoader(Numbers(), EvalTransform(8), batch=4, limit=6))
    assert [len(b.images) for b in batches] == [4, 2]
    assert torch.equal(batches[1].indices, torch.tensor([4, 5]))


def test_a_folder_with_bad_files_trains_on(tmp_path: Path) -> None:
    for i in range(20):
        Image.new("RGB", (20, 16), (i * 10, 0, 0)).save(tmp_path / f"{i:02}.jpg")
    (tmp_path / "05.jpg").write_bytes((tmp_path / "05.jpg").read_bytes()[:400])
    (tmp_path / "06.jpg").write_bytes(b"")
    part = loader(FolderSource(tmp_path), max_bad_share=0.1)
    assert sum(len(b.images) for b in part) == 96
    assert set(part.bad.reasons) == {"05.jpg", "06.jpg"}


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the sample photographs (shared/data) are not here")
def test_photographs_are_the_same_on_any_number_of_ranks_and_workers() -> None:
    transform = TrainTransform(224, auto_augment="rand-m9-mstd0.5-inc1")
    source = open_source(str(PHOTOS), image_size=(224, 224))
    one = by_position(loader(source, transform=transform, end_step=3))
    two = [loader(source, transform=transform, end_step=3, rank=r, world_size=2, workers=1) for r in (0, 1)]
    assert by_position(two[0]) | by_position(two[1]) == one
