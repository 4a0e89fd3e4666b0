"""The ways in which people write conversations: what is read, and what is refused instead of being left out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from vlm_data import record, turn, write_image, write_json

from localign.cli import main
from localign.errors import UserError
from localign.vlm.data.checks import check
from localign.vlm.data.dialects import MalformedRecord, parse_record
from localign.vlm.data.records import Conversations, Finding, ImageRoots

MIX = Path(__file__).resolve().parents[4] / "shared" / "data" / "official" / "llava-mix"

GOOD = [turn("human", "a"), turn("gpt", "b")]
ASKED = [turn("human", "<image>\na"), turn("gpt", "b")]


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("entry", "image", "question"),
    [
        ({"image": ["a.jpg"], "conversations": ASKED}, "a.jpg", "<image>\na"),
        ({"images": ["a.jpg"], "conversations": ASKED}, "a.jpg", "<image>\na"),
        ({"images": "a.jpg", "conversations": ASKED}, "a.jpg", "<image>\na"),
        ({"image": "a.jpg", "images": ["a.jpg"], "conversations": ASKED}, "a.jpg", "<image>\na"),
        ({"images": [{"path": "a.jpg", "bytes": None}], "conversations": ASKED}, "a.jpg", "<image>\na"),
        ({"image": "", "conversations": GOOD}, None, "a"),
        ({"image": " ", "images": [], "conversations": GOOD}, None, "a"),
        ({"image": [], "conversations": GOOD}, None, "a"),
        ({"image": [""], "video": "", "conversations": GOOD}, None, "a"),
        ({"conversations": [turn("Human", "a"), turn("GPT", "b")]}, None, "a"),
        ({"conversations": [turn("USER ", "a"), turn("Assistant", "b")]}, None, "a"),
        ({"messages": [message("user", "a"), message("assistant", "b")]}, None, "a"),
        ({"conversations": [message("user", "a"), message("assistant", "b")]}, None, "a"),
        ({"id": None, "messages": [turn("human", "a"), turn("gpt", "b")]}, None, "a"),
        ({"conversations": [turn("system", "Be brief."), *GOOD]}, None, "Be brief.\n\na"),
        ({"system": "Be brief.", "conversations": GOOD}, None, "Be brief.\n\na"),
        ({"conversations": [turn("System", " "), *GOOD], "system": None}, None, "a"),
        (
            {"image": "a.jpg", "conversations": [turn("system", "Be brief."), *ASKED]},
            "a.jpg",
            "<image>\nBe brief.\n\na",
        ),
        (
            {
                "images": ["a.jpg"],
                "messages": [
                    message("user", [{"type": "image"}, {"type": "text", "text": "a"}]),
                    message("assistant", [{"type": "text", "text": "b"}]),
                ],
            },
            "a.jpg",
            "<image>\na",
        ),
        (
            {
                "messages": [
                    message("user", [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "a"}]),
                    message("assistant", "b"),
                ],
            },
            "a.jpg",
            "<image>\na",
        ),
        ({"conversations": [GOOD[0], {**GOOD[1], "weight": 1}]}, None, "a"),
    ],
)
def test_dialects_that_are_read(entry: dict[str, Any], image: str | None, question: str) -> None:
    found = parse_record(entry).record
    assert (found.id, found.image, found.turns) == ("", image, ((question, "b"),))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"image": ["a.jpg", "b.jpg"], "conversations": ASKED}, "not the path of one file, but of 2"),
        ({"images": ["a.jpg", "b.jpg"], "conversations": GOOD}, "not the path of one file, but of 2"),
        ({"image": "a.jpg", "images": ["b.jpg"], "conversations": ASKED}, "not the path of one file, but of 2"),
        ({"image": [["a.jpg"]], "conversations": ASKED}, "not the path of one file"),
        ({"image": {"bytes": "abc", "path": "a"}, "conversations": ASKED}, "not the path of one file"),
        ({"video": "a.mp4", "conversations": GOOD}, "the key 'video'"),
        ({"videos": ["a.mp4"], "conversations": GOOD}, "the key 'videos'"),
        ({"audio": "a.wav", "conversations": GOOD}, "the key 'audio'"),
        ({"image_path": "a.jpg", "conversations": GOOD}, "the key 'image_path'"),
        ({"conversations": ASKED}, "the mark <image>, but the record has no image"),
        ({"image": "", "conversations": ASKED}, "the mark <image>, but the record has no image"),
        ({"image": "a.jpg", "conversations": [*ASKED, *ASKED]}, "2 <image> marks"),
        ({"image": "a.jpg", "conversations": [turn("human", "<image><image>a"), GOOD[1]]}, "2 <image> marks"),
        ({"conversations": GOOD, "messages": GOOD}, "both 'conversations' and 'messages'"),
        ({"conversations": [GOOD[0], {**GOOD[1], "weight": 0}]}, "turn 2 of its conversation has 'weight': 0"),
        ({"conversations": [GOOD[0], {**GOOD[1], "loss": False}]}, "turn 2 of its conversation has 'loss': False"),
        ({"system": ["a"], "conversations": GOOD}, "its system text is not a string"),
        ({"messages": [message("user", [{"type": "video"}]), message("assistant", "b")]}, "neither a text nor"),
        ({"messages": [message("tool", "a"), message("assistant", "b")]}, "turn 1 of its conversation is by 'tool'"),
        ({"messages": [{"role": "user"}, message("assistant", "b")]}, "turn 1 of its conversation has no 'content'"),
    ],
)  # fmt: skip
def test_what_would_be_left_out_is_refused(entry: dict[str, Any], reason: str) -> None:
    with pytest.raises(MalformedRecord) as raised:
        parse_record(entry)
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_malformed_records_are_dropped_counted_and_named(tmp_path: Path) -> None:
    bad = [{"id": f"bad{n}", "video": "v.mp4", "conversations": GOOD} for n in range(12)]
    path = write_json(tmp_path / "data.json", [record(0), *bad, record(1), 7])
    with pytest.raises(UserError, match=r"record 2 \(id 'bad0'\): it has the key 'video'"):
        Conversations.open([path])
    data = Conversations.open([path], skip_malformed=True)
    assert [data.record(i).id for i in range(len(data))] == ["r0", "r1"]
    assert (data.malformed.count, len(data.malformed.first)) == (13, 10)
    assert "record 2 (id 'bad0'): it has the key 'video'" in data.malformed.first[0]
    whole = Conversations.open([write_json(tmp_path / "other.json", [record(0), record(1)])])
    assert whole.malformed == Finding(0, ())
    with pytest.raises(UserError, match=r"all 12 records of .* are malformed; the first is .*bad0"):
        Conversations.open([write_json(tmp_path / "bad.json", bad)], skip_malformed=True)


def test_check_reports_what_training_would_refuse_and_what_it_does_not_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [
        {"conversations": GOOD, "source": "here", "license": 1},
        {"conversations": GOOD, "source": "there"},
        {"images": ["a.png", "b.png"], "conversations": ASKED},
        {"conversations": ASKED},
    ]
    path = write_json(tmp_path / "data.json", entries)
    found = check([path])
    assert (found.records, found.malformed.count, found.ready) == (2, 2, False)
    assert found.unused_keys == {"source": 2, "license": 1}
    assert found.repeated_ids.count == 0
    assert main(["vlm", "check", "--data", str(path)]) == 2
    said = capsys.readouterr().out
    assert "record 3: its image is not the path of one file, but of 2" in said
    assert "record 4: its text has the mark <image>" in said
    assert "not used   source (2 records), license (1 records)" in said
    assert "without --skip-malformed" in said


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("as_lines", [True, False])
def test_a_byte_order_mark_changes_nothing(mark: str, as_lines: bool, tmp_path: Path) -> None:
    entries = [record(0), record(1)]
    text = "\n".join(map(json.dumps, entries)) if as_lines else json.dumps(entries)
    (tmp_path / "data.json").write_text(mark + text, encoding="utf-8")
    data = Conversations.open([tmp_path / "data.json"])
    assert [data.record(i).id for i in range(2)] == ["r0", "r1"]


@pytest.mark.skipif(not MIX.is_dir(), reason="../shared/data/official/llava-mix is not there")
def test_real_records_are_read() -> None:
    found = check([MIX / "llava_v1_5_mix1k.json"])
    assert (found.records, found.malformed.count, found.text_only) == (1000, 0, 0)
    assert (found.repeated_ids.count, found.unused_keys) == (3, {})


# -- image paths ---------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """``data/x.png``, ``secret.png``, and a link ``data/linked`` to ``store``, which holds ``y.png``."""
    for name in ("data/x.png", "data/sub/z.png", "secret.png", "store/y.png"):
        write_image(tmp_path / name)
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "alias").symlink_to(tmp_path / "data")
    return tmp_path


@pytest.mark.parametrize("root", ["data", "alias", "data/../data", "data/"])
@pytest.mark.parametrize(
    "image",
    [
        *("x.png", "./x.png", "sub/../x.png", "linked/y.png", "../data/x.png"),
        *("@data/x.png", "@alias/x.png", "@data/linked/y.png"),
    ],
)
def test_paths_that_stay_in_the_root_are_read(root: str, image: str, tree: Path) -> None:
    roots = ImageRoots([tree / root])
    path = image.replace("@", f"{tree}/")
    assert not roots.leaves(path)
    assert roots.find(path) == 0


@pytest.mark.parametrize("root", ["data", "alias"])
@pytest.mark.parametrize(
    "image",
    [
        *("../secret.png", "@secret.png", "sub/../../secret.png", "@data/../secret.png"),
        *("linked/../secret.png", "/etc/passwd"),
    ],
)
def test_paths_that_leave_the_root_are_refused(root: str, image: str, tree: Path) -> None:
    path = image.replace("@", f"{tree}/")
    roots = ImageRoots([tree / root])
    assert roots.leaves(path)
    assert roots.find(path) == -1
    assert not ImageRoots([tree / root], allow_outside=True).leaves(path)
    file = write_json(tree / "data.json", [record(0, image=path)])
    with pytest.raises(UserError, match=r"record 1 .* is outside the image folders; .*--allow-outside"):
        Conversations.open([file], [tree / root])
    if os.path.basename(path) == "secret.png":
        Conversations.open([file], [tree / root], allow_outside=True)


def test_a_prefix_does_not_hide_an_absolute_path(tree: Path) -> None:
    roots = ImageRoots([f"coco={tree / 'data'}"])
    assert roots.find("coco/x.png") == 0
    for image in ("coco//etc/passwd", "coco/../secret.png", f"coco/{tree}/secret.png"):
        assert roots.leaves(image)
        assert roots.find(image) == -1
    assert not roots.leaves("other/x.png")


def test_a_path_may_lead_from_one_root_to_another(tree: Path) -> None:
    roots = ImageRoots([tree / "data", tree / "store"])
    assert roots.find("../store/y.png") == 0
    assert roots.find(f"{tree}/store/y.png") == 0
    assert roots.leaves("../secret.png")
