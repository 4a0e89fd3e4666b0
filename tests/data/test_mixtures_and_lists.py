"""Mixtures, manifests and exclusions; and that every kind of source is the same stream after any restart."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from restarts import BATCH, samples

from localign.data.classification import labels_of
from localign.data.images import ImageData
from localign.data.sources import ExcludingSource, ImageSource, MixtureSource, UnreadableImage, open_source
from localign.data.sources.mixture import apportion
from localign.data.stream import sample_stream
from localign.errors import UserError
from localign.options.data import DataConfig

STEPS = 12
Specs = dict[str, tuple[str, str | None]]
"""Kind of source -> (spec, exclusion list)."""


@pytest.fixture(scope="module")
def specs(
    pictures: Path, shards: Path, rows: Path, mixture: Path, tmp_path_factory: pytest.TempPathFactory
) -> Specs:
    folder = tmp_path_factory.mktemp("lists")
    files = sorted(pictures.rglob("*.jpg"))
    lines = [json.dumps({"path": str(file), "label": file.parent.name}) for file in files]
    (folder / "all.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "bad.txt").write_text("cat/01.jpg\ndog/12.jpg\n")
    (folder / "bad-rows.txt").write_text("train-0.parquet:3\ntrain-1.parquet:0\n")
    return {
        "folder": (str(pictures), None),
        "list": (str(folder / "all.jsonl"), None),
        "tar": (str(shards), str(folder / "bad.txt")),
        "parquet": (str(rows), str(folder / "bad-rows.txt")),
        "mixture": (str(mixture), None),
    }


@pytest.mark.parametrize("kind", ["folder", "list", "tar", "parquet", "mixture"])
def test_three_restarts_on_other_ranks_and_workers_change_nothing(specs: Specs, kind: str) -> None:
    def opened() -> ImageSource:
        return open_source(specs[kind][0], image_size=(8, 8), exclude=specs[kind][1], allow_outside=True)

    whole = samples(opened, 0, STEPS, 1, 0)  # more than two epochs
    assert sorted(whole) == list(range(STEPS * BATCH))
    parts: dict[int, tuple[int, bytes]] = {}
    for start, end, world, workers in ((0, 3, 2, 0), (3, 5, 1, 2), (5, 9, 3, 1), (9, STEPS, 6, 0)):
        parts |= samples(opened, start, end, world, workers)
    assert parts == whole


def test_every_kind_holds_the_same_images(specs: Specs) -> None:
    reference = open_source(specs["folder"][0])
    for kind in ("list", "tar", "parquet"):
        source = open_source(specs[kind][0], allow_outside=True)
        assert [source.load(i).tobytes() for i in range(23)] == [
            reference.load(i).tobytes() for i in range(23)
        ]


def test_a_mixture_draws_by_weight_and_passes_whole_sources(specs: Specs) -> None:
    source = open_source(specs["mixture"][0])
    assert isinstance(source, MixtureSource)
    assert source.sizes == [21, 23, 23]
    stream = sample_stream(source, 1)
    assert stream.length == 67
    epochs = [[source.locate(i) for i in stream.indices(67 * e, 67 * e + 67)] for e in range(6)]
    for epoch in epochs:
        counts = np.bincount([number for number, _ in epoch], minlength=3)
        assert counts.tolist() == apportion(67, [1 / 8, 2 / 8, 5 / 8])
    for number, size in enumerate(source.sizes):
        within = [index for epoch in epochs for n, index in epoch if n == number]
        for first in range(
            0, len(within) - size + 1, size
        ):  # all images are used before the source is reshuffled
            assert sorted(within[first : first + size]) == list(range(size))
    assert epochs[0] != epochs[1]
    assert [number for number, _ in epochs[0]] != sorted(number for number, _ in epochs[0])
    ordered = sample_stream(source, 1, shuffle=False).indices(0, 67)
    assert [source.locate(i)[0] for i in ordered[:8]].count(2) == 5


def test_a_mixture_without_weights_takes_every_image_equally_often(
    pictures: Path, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "m.yaml").write_text(f"mixture: [{{data: {pictures}}}, {{data: {shards}}}]\n")
    source = open_source(str(tmp_path / "m.yaml"))
    assert sorted(sample_stream(source, 0).indices(0, 46).tolist()) == list(range(46))
    assert source.name(0) == f"{pictures}: cat/00.jpg"
    assert source.name(45) == f"{shards}: dog/22.jpg"
    travelled = pickle.loads(pickle.dumps(source))
    assert travelled.load(30).tobytes() == source.load(30).tobytes()
    (tmp_path / "w.yaml").write_text(
        f"mixture: [{{data: {pictures}, weight: 1}}, {{data: {shards}, weight: 2}}]\n"
    )
    assert open_source(str(tmp_path / "w.yaml")).fingerprint() != source.fingerprint()


def test_scenes_mix_with_photographs(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(
        f"mixture: [{{data: scenes, weight: 1}}, {{data: {pictures}, weight: 1}}]"
    )
    source = open_source(str(tmp_path / "m.yaml"), image_size=(48, 48))
    assert isinstance(source, MixtureSource)
    drawn = {source.locate(int(i))[0] for i in sample_stream(source, 0).indices(0, 20)}
    assert drawn == {0, 1}


def test_an_unreadable_image_of_a_mixture_is_named_with_its_source(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{pictures}/cat/00.jpg\n{tmp_path}/gone.jpg\n")
    (tmp_path / "m.yaml").write_text(f"mixture: [{{data: {pictures}}}, {{data: list.txt}}]\n")
    source = open_source(str(tmp_path / "m.yaml"), allow_outside=True)
    name = f"{tmp_path}/gone.jpg"
    with pytest.raises(UnreadableImage, match=r"list\.txt: .*gone\.jpg: no such file"):
        source.load(24)
    assert source.unreadable == ((f"list.txt: {name}", "no such file"),)


def test_apportioning_gives_all_and_rounds_the_largest_remainders_up() -> None:
    assert apportion(10, [1 / 3, 1 / 3, 1 / 3]) == [4, 3, 3]
    assert apportion(7, [0.5, 0.25, 0.25]) == [3, 2, 2]
    for total in range(1, 40):
        assert sum(apportion(total, [0.123, 0.456, 0.421])) == total


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("mixture: []", "is not a mixture"),
        ("mixture: {data: x}", "is not a mixture"),
        ("- x", "is not a mixture"),
        ("mixture: [{data: PHOTOS}]", "two sources or more, not 1"),
        ("mixture: [{data: PHOTOS, weight: 1}, {data: PHOTOS}]", "gives a weight to some"),
        ("mixture: [{data: PHOTOS, weight: 0}, {data: PHOTOS, weight: 1}]", "must be above 0"),
        ("mixture: [{data: PHOTOS, weight: .nan}, {data: PHOTOS, weight: 1}]", "must be above 0"),
        ("mixture: [{data: PHOTOS, weight: yes}, {data: PHOTOS, weight: 1}]", "not weight: True"),
        ("mixture: [{data: PHOTOS, wieght: 1}, {data: PHOTOS}]", "not wieght: 1"),
        ("mixture: [{data: m.yaml}, {data: PHOTOS}]", "mixture of mixtures"),
        ("mixture: [{data: !!python/name:os.system x}]", "is not YAML"),
        ("mixture: [{data: gone}, {data: PHOTOS}]", "there is no folder .*gone"),
    ],
)
def test_files_that_are_no_mixture_are_refused(pictures: Path, tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "m.yaml").write_text(text.replace("PHOTOS", str(pictures)))
    with pytest.raises(UserError, match=line):
        open_source(str(tmp_path / "m.yaml"))


def test_a_manifest_of_objects_gives_paths_and_labels(specs: Specs, pictures: Path, tmp_path: Path) -> None:
    source = open_source(specs["list"][0], allow_outside=True)
    labels = labels_of(source, "all.jsonl")
    assert labels.classes == ("cat", "dog")
    assert torch.equal(labels.targets(torch.tensor([0, 22])), torch.eye(2))
    for text, line in (
        ('{"path": 3}', "line 1, names no image"),
        ('["a.jpg"]', "line 1, is not a JSON object"),
        ('{"path": "a.jpg"', "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ('{"label": "cat"}', "names no image"),
    ):
        (tmp_path / "x.jsonl").write_text(text + "\n")
        with pytest.raises(UserError, match=line):
            open_source(str(tmp_path / "x.jsonl"))
    (tmp_path / "y.jsonl").write_text(f'# comment\n\n{{"image": "{pictures}/cat/00.jpg"}}\n')
    plain = open_source(str(tmp_path / "y.jsonl"), allow_outside=True)
    assert plain.load(0).size == (40, 30)
    with pytest.raises(UserError, match="no labels"):
        labels_of(plain, "y.jsonl")


def test_excluded_images_never_come_and_the_rest_keep_their_labels(specs: Specs, shards: Path) -> None:
    source = open_source(specs["tar"][0], exclude=specs["tar"][1])
    assert isinstance(source, ExcludingSource)
    assert (len(source), source.excluded) == (21, 2)
    names = {source.name(i) for i in range(21)}
    assert not names & {"cat/01.jpg", "dog/12.jpg"}
    labels = labels_of(source, "tar")
    for i in range(21):
        assert labels.classes[int(labels.targets(torch.tensor([i])).argmax())] == source.name(i).split("/")[0]
    assert source.fingerprint() != open_source(str(shards)).fingerprint()


def test_exclusion_keeps_row_groups_together(specs: Specs) -> None:
    source = open_source(specs["parquet"][0], exclude=specs["parquet"][1])
    assert source.blocks is not None
    assert source.blocks.tolist() == [4, 5, 2, 4, 5, 1]
    assert sorted(sample_stream(source, 0).indices(0, 21).tolist()) == list(range(21))


def test_an_exclusion_list_of_other_data_is_refused(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("n0144/x.jpg\n")
    with pytest.raises(UserError, match=r"names no image of the data: 'n0144/x.jpg' against 'cat/00.jpg'"):
        ImageData(DataConfig(data=str(pictures), exclude=str(tmp_path / "bad.txt")), (8, 8))
    (tmp_path / "all.txt").write_text(
        "\n".join(str(p.relative_to(pictures)) for p in pictures.rglob("*.jpg"))
    )
    with pytest.raises(UserError, match="excludes every image"):
        open_source(str(pictures), exclude=str(tmp_path / "all.txt"))
    with pytest.raises(UserError, match="there is no file"):
        open_source(str(pictures), exclude=str(tmp_path / "gone.txt"))
