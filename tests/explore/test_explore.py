"""The data of a page is what the models compute, and the command refuses what it cannot show."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from explore_world import (
    HOSTILE_FILE,
    PATCHES,
    SIDE,
    World,
    answer,
    content_of,
    cosines,
    make_world,
    tiny_vit,
)
from PIL import Image
from torch import Tensor

from localign.alignment.teacher import Teacher
from localign.backbones import Backbone, save_backbone
from localign.cli import main
from localign.data.transforms import EvalTransform
from localign.explore.answers import read_common_answers
from localign.explore.attention import last_attention
from localign.explore.features import PageFeatures, joint_colours, page_features, quantise
from localign.options.export import ExploreConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def page(world: World) -> str:
    out = world.root / "everything.html"
    assert main([*world.everything, "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def inputs_of(world: World) -> Tensor:
    """uint8 images as the models see them, in the order of the page: pictures of the probing, then files."""
    arrays = np.load(world.root / "probe" / "pictures.npz")
    transform = EvalTransform((SIDE, SIDE), "square")
    paths = sorted((world.root / "images").iterdir())
    return torch.cat(
        [
            torch.from_numpy(arrays["images"]),
            torch.stack([transform(Image.open(p).convert("RGB")) for p in paths]),
        ]
    )


@torch.no_grad()
def patches_of(backbone: Backbone, images: Tensor) -> Tensor:
    return backbone.tokens(backbone.normalise(images))[:, 1:]


def refusal(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(command) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("localign: ")]
    assert len(said) == 1
    return said[0]


# -- features ----------------------------------------------------------------------------------------------


def test_similarities_in_the_page_are_the_models_within_the_error_that_it_states(
    world: World, page: str
) -> None:
    content, arrays = content_of(page)
    images = inputs_of(world)
    for number, backbone in enumerate((world.baseline, world.student.encoder.backbone)):
        exact = cosines(patches_of(backbone, images).numpy())
        stored = cosines(arrays[f"features{number}"])
        error = np.abs(stored - exact).max()
        assert error <= content["models"][number]["error"] + 1e-5
        assert 1e-5 < error < 0.02
        assert np.abs(exact - np.eye(PATCHES)).max() > 0.3  # something to see


def test_float16_is_more_exact(world: World, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert main([*world.command, "--dtype", "float16", "--out", str(out)]) == 0
    content, arrays = content_of(out.read_text())
    assert arrays["features0"].dtype == np.float16
    assert all(model["error"] < 1e-3 for model in content["models"])


def test_a_patch_keeps_its_direction_however_large_it_is() -> None:
    tokens = torch.tensor([[3.0, -1.5, 0.0], [3e4, -1.5e4, 0.0], [0.0, 0.0, 0.0]])
    assert quantise(tokens, "int8").tolist() == [[127, -64, 0], [127, -64, 0], [0, 0, 0]]


def test_batches_do_not_change_the_page(world: World, page: str, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert main([*world.everything, "--batch-size", "1", "--out", str(out)]) == 0
    for name, array in content_of(out.read_text())[1].items():
        assert np.allclose(array.astype(float), content_of(page)[1][name].astype(float), atol=1.01), name


def test_tokens_that_are_no_numbers_are_one_line(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tiny_vit()
    for layer in (broken.vit.blocks[0].mlp.fc1, broken.vit.blocks[0].mlp.fc2):
        layer.weight.data *= 1e30
    save_backbone(broken, tmp_path / "broken")
    command = [
        *world.command[:2],
        f"b={tmp_path / 'broken'}",
        *world.command[3:],
        "--out",
        str(tmp_path / "x.html"),
    ]
    assert "are not numbers; check the weights" in refusal(command, capsys)


def some_features(tokens: Tensor) -> PageFeatures:
    unit = torch.nn.functional.normalize(tokens, dim=-1).flatten(0, 1).double()
    mean = unit.mean(0)
    return PageFeatures(
        features=quantise(tokens, "float16"),
        error=0.0,
        mean=mean.numpy(),
        covariance=((unit - mean).T @ (unit - mean) / len(unit)).numpy(),
        attention=None,
        attention_peak=None,
        attention_prefix=None,
    )


def test_models_share_a_basis_so_that_equal_directions_have_equal_colours() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(2, 50, 8)
    turned = tokens.clone()
    turned[1] = turned[1].flip(0)
    same, other = joint_colours([some_features(tokens), some_features(turned)])
    assert same.basis == other.basis
    assert (same.rgb[0] == other.rgb[0]).all()
    assert (same.rgb[1] == other.rgb[1][::-1]).all()
    assert same.rgb.min() == 0
    assert same.rgb.max() == 255


def test_the_components_are_those_of_both_models_and_each_states_its_own_share() -> None:
    """One model varies along axes 0 and 1, the other along 1 and 2; both count equally, at any scale."""
    torch.manual_seed(0)
    base = torch.zeros(6)
    base[5] = 10.0
    spread = torch.randn(1, 4000, 2)
    first, second = base.repeat(1, 4000, 1), base.repeat(1, 4000, 1)
    first[..., :2] += spread * torch.tensor([2.0, 1.0])
    second[..., 1:3] += 0.05 * spread * torch.tensor([2.0, 1.0])
    colours = joint_colours([some_features(first), some_features(second)])
    assert sum(colours[0].share) == pytest.approx(1, abs=0.02)
    assert sum(colours[1].share) == pytest.approx(1, abs=0.02)
    assert sorted(colours[0].share) == pytest.approx([0, 0.2, 0.8], abs=0.05)
    assert sorted(colours[1].share) == pytest.approx([0, 0.2, 0.8], abs=0.05)


def test_models_of_other_widths_have_their_own_basis() -> None:
    torch.manual_seed(0)
    found = joint_colours([some_features(torch.randn(1, 30, d)) for d in (6, 8, 6)])
    assert [colours.basis for colours in found] == [0, 1, 0]


# -- attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_attention_is_what_the_last_block_computes(soft_cap: float | None) -> None:
    """With values of one token only, the output of the attention is proportional to the weight of that token."""
    backbone = tiny_vit() if soft_cap is None else tiny_vit().copy(soft_cap=soft_cap)
    attn = backbone.vit.blocks[-1].attn
    inputs: list[Tensor] = []
    handle = attn.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    torch.manual_seed(2)
    images = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    with last_attention(backbone) as found, torch.no_grad():
        backbone.tokens(backbone.normalise(images))
    handle.remove()
    assert found[0].shape == (2, PATCHES + 1, PATCHES + 1)
    assert torch.allclose(found[0].sum(-1), torch.ones(2, PATCHES + 1))
    x = inputs[0].clone()
    with torch.no_grad():
        width = x.shape[-1]
        attn.proj.weight.copy_(torch.eye(width))
        attn.proj.bias.zero_()
        qkv = attn.qkv(x)
        for token in (0, 7):
            values = torch.zeros_like(x)
            values[:, token] = 1.0

            class Fixed(torch.nn.Module):
                def forward(self, _: Tensor, values: Tensor = values) -> Tensor:
                    return torch.cat([qkv[..., : 2 * width], values], dim=-1)

            kept, attn.qkv = attn.qkv, Fixed()
            by_head = attn(x).unflatten(-1, (2, width // 2)).mean(dim=(-1, -2))
            attn.qkv = kept
            assert torch.allclose(by_head, found[0][..., token], atol=1e-5)


def test_attention_of_the_page_adds_up(world: World, page: str) -> None:
    _, arrays = content_of(page)
    for number in (0, 1):
        weights = arrays[f"attention{number}"] / 255 * arrays[f"peak{number}"][..., None]
        assert np.allclose(weights.sum(-1) + arrays[f"prefix{number}"], 1, atol=0.05)
        assert (arrays[f"attention{number}"].max(-1) == 255).all()


def test_attention_can_be_left_out(world: World, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert main([*world.command, "--attention", "false", "--masks", "false", "--out", str(out)]) == 0
    content, arrays = content_of(out.read_text())
    assert "masks" not in content
    assert not any(name.startswith(("attention", "peak", "prefix")) for name in arrays)


# -- masks -------------------------------------------------------------------------------------------------


def test_errors_of_views_are_those_of_teacher_and_student(world: World, page: str) -> None:
    content, arrays = content_of(page)
    hidden = content["masks"]["hidden"]
    assert hidden == [0, 9, 18, 27, 32]
    teacher = Teacher(tiny_vit(), "penultimate")
    teacher.scale.fill_(1.5)
    images = teacher.backbone.normalise(inputs_of(world))
    order = torch.from_numpy(arrays["order"].astype(np.int64))
    assert (order.sort(dim=-1).values == torch.arange(PATCHES)).all()
    keep = torch.stack([order >= count for count in hidden], dim=1)
    assert (~keep).sum(-1).tolist() == [hidden] * len(images)
    with torch.no_grad():
        target, predicted = teacher(images, keep)[:, 1:], world.student(images, keep)[:, 1:]
    variance = (target - target.flatten(0, 1).mean(0)).square().sum(-1).mean()
    error = ((predicted - target).square().sum(-1) / variance).unflatten(0, (len(images), -1))
    assert np.allclose(arrays["view_error"], error.mean(-1), rtol=0.02)
    assert np.allclose(arrays["patch_error"] / 255, error.clamp(max=1), atol=0.02)
    assert arrays["target"].shape == arrays["reconstruction"].shape == (len(images), 5, PATCHES, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher_sha256": "0"}, "has another teacher than the first model"),
        ({"run": {"target": "cls"}}, "does not say that its target was patch tokens"),
        ({"run": None}, "does not say that its target was patch tokens"),
    ],
)
def test_views_need_the_teacher(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], said: str
) -> None:
    for name in ("baseline", "aligned", "images"):
        (tmp_path / name).symlink_to(world.root / name)
    (tmp_path / "aligned").unlink()
    (tmp_path / "aligned").mkdir()
    for file in (world.root / "aligned").iterdir():
        if file.name != "config.json":
            (tmp_path / "aligned" / file.name).symlink_to(file)
    config = json.loads((world.root / "aligned" / "config.json").read_text())
    config["localign"]["provenance"] |= change
    (tmp_path / "aligned" / "config.json").write_text(json.dumps(config))
    moved = dataclasses.replace(world, root=tmp_path)
    out = tmp_path / "page.html"
    assert main([*moved.command, "--out", str(out)]) == 0
    assert f"no masked views: aligned {said}" in capsys.readouterr().err
    assert "masks" not in content_of(out.read_text())[0]


# -- predictions -------------------------------------------------------------------------------------------


def test_predictions_are_those_of_the_run(world: World, page: str) -> None:
    content, arrays = content_of(page)
    pictures = np.load(world.root / "probe" / "pictures.npz")
    assert content["predictions"] == {"images": 2, "classes": ["unlabeled", "cat", "<b>dog"]}
    assert len(content["images"]) == 6
    assert (arrays["truth"] == pictures["truth"]).all()
    for number, name in enumerate(("baseline", "aligned")):
        probability = pictures[f"probability_{name}"].astype(np.float64)
        assert ((arrays[f"probability{number}"] > 127) == (probability > 0.5)).all()
        assert np.abs(arrays[f"probability{number}"] / 255 - probability).max() < 1 / 255


def test_models_are_named_as_in_the_probing(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = [word.replace("aligned=", "other=") for word in world.command]
    line = refusal(
        [*command, "--probe", str(world.root / "probe"), "--out", str(tmp_path / "x.html")], capsys
    )
    assert "has predictions of baseline, aligned, not of other; name the models of explore like those" in line


def test_pictures_of_another_size_are_refused(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = [*world.everything, "--image-size", "32", "--out", str(tmp_path / "x.html")]
    assert "are not of the input size of baseline, 32 x 32 pixels in 8 x 8 patches" in refusal(
        command, capsys
    )


@pytest.mark.parametrize("fault", ["none", "empty", "garbage", "no predictions"])
def test_a_folder_without_pictures_is_one_line(
    world: World, fault: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if fault in ("empty", "garbage"):
        (tmp_path / "pictures.npz").write_bytes(b"" if fault == "empty" else b"PK\x03\x04" + bytes(100))
    elif fault == "no predictions":
        np.savez(tmp_path / "pictures.npz", images=np.zeros((1, 3, SIDE, SIDE), dtype=np.uint8))
    line = refusal([*world.command, "--probe", str(tmp_path), "--out", str(tmp_path / "x.html")], capsys)
    assert "has no pictures for --probe" in line or "hold no predictions" in line


# -- answers -----------------------------------------------------------------------------------------------


def test_questions_with_different_scores_come_first(world: World) -> None:
    folders = {"a": str(world.root / "eval0"), "b": str(world.root / "eval1")}
    found = read_common_answers(folders, 40)
    assert [q["disagree"] for q in found.questions] == [True] * 3 + [False] * 3
    assert (found.common, found.disagreements, found.unreadable) == (6, 3, 1)
    asked = {q["id"]: q for q in found.questions}
    assert asked["q5"]["box"] == [0.1, 0.1, 0.5, 0.5]
    assert [a["box"] for a in asked["q5"]["answers"]] == [[0.6, 0.6, 1.0, 0.9], [0.1, 0.1, 0.5, 0.6]]
    assert [a["text"] for a in asked["q1"]["answers"]] == ["<b>No</b>", "Yes."]
    assert asked["q6"]["image"] is None
    assert len(found.images) == 2  # four questions share one
    assert read_common_answers(folders, 2).questions == found.questions[:2]


def test_addresses_are_not_read(world: World, tmp_path: Path) -> None:
    for model in (0, 1):
        (tmp_path / str(model)).mkdir()
        line = {**answer(1, model, Path("x")), "image": "http://127.0.0.1:9/x.png"}
        (tmp_path / str(model) / "answers.jsonl").write_text(json.dumps(line) + "\n")
    found = read_common_answers({"a": str(tmp_path / "0"), "b": str(tmp_path / "1")}, 5)
    assert found.questions[0]["image"] is None


def test_evaluations_without_a_common_question_are_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {**answer(1, 1, Path("x")), "message": "another question"}
    (tmp_path / "answers.jsonl").write_text(json.dumps(line) + "\n")
    command = [
        *world.command,
        "--vlm",
        f"a={world.root / 'eval0'},b={tmp_path}",
        "--out",
        str(tmp_path / "x.html"),
    ]
    assert "have no question in common" in refusal(command, capsys)


def test_the_page_names_no_folder_of_the_machine(world: World, page: str) -> None:
    content, _ = content_of(page)
    assert [model["source"] for model in content["models"]] == ["baseline", "aligned"]
    assert str(world.root) not in page


# -- the page ----------------------------------------------------------------------------------------------


def test_foreign_text_ends_no_element_and_the_policy_allows_this_script_only(page: str) -> None:
    content, _ = content_of(page)
    shown = [image["name"] for image in content["images"]]
    assert HOSTILE_FILE.replace("\u202e", "\\u202e") in shown
    assert "<img src=x" not in page
    assert "<b>dog" not in page
    assert page.count("<script") == page.count("</script>") == 3
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert "default-src 'none'" in policy.group(1)
    assert "unsafe" not in policy.group(1)
    assert policy.start() < page.index("<style")
    assert not re.search(r"""(?:src|href)=["']?https?:""", page)


def test_the_built_front_end_is_of_these_sources() -> None:
    """`npm run build` in web/ writes it again."""
    sources = Path(__file__).resolve().parents[2] / "web" / "src"
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources.iterdir()))).hexdigest()
    built = (files("localign") / "assets" / "explore" / "page.html").read_text(encoding="utf-8")
    assert f"<!-- built from sources {digest} -->" in built


def test_a_page_that_is_too_large_is_refused_before_the_models_run(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localign.explore.content.page_features", None)
    out = tmp_path / "x.html"
    line = refusal([*world.command, "--max-mib", "0.01", "--out", str(out)], capsys)
    assert "more than --max-mib 0.01; give --limit " in line
    assert "--attention false, or --max-mib 2" in line
    assert not out.exists()


def test_a_page_that_turns_out_too_large_is_not_written(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.html"
    line = refusal([*world.everything, "--max-mib", "0.04", "--out", str(out)], capsys)
    assert "the page would have 0." in line
    assert not out.exists()


def test_the_command_states_the_size_and_replaces_only_its_own_page(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    for _ in range(2):
        assert main([*world.command, "--out", str(out)]) == 0
        assert "page       0." in capsys.readouterr().err
    out.write_text("<html>mine")
    assert "did not write it" in refusal([*world.command, "--out", str(out)], capsys)
    assert out.read_text() == "<html>mine"


def test_unreadable_images_are_left_out_and_said(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_bytes((world.root / "images" / "photo1.png").read_bytes())
    (tmp_path / "images" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    command = [*world.command[:3], "--images", str(tmp_path / "images"), "--out", str(tmp_path / "x.html")]
    assert main(command) == 0
    assert "1 images cannot be read and are left out; the first is a.png" in capsys.readouterr().err
    (tmp_path / "images" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert "none of the images of" in refusal(command, capsys)


def test_models_may_differ_in_grid_and_width(world: World, tmp_path: Path) -> None:
    save_backbone(tiny_vit(side=32, width=16), tmp_path / "larger")
    out = tmp_path / "page.html"
    assert main([*world.command[:2], f"b={tmp_path / 'larger'}", *world.command[3:], "--out", str(out)]) == 0
    content, arrays = content_of(out.read_text())
    assert [model["grid"] for model in content["models"]] == [[6, 6], [8, 8]]
    assert [model["basis"] for model in content["models"]] == [0, 1]
    assert arrays["features1"].shape == (4, 64, 16)


def test_models_that_see_other_parts_of_an_image_are_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_backbone(tiny_vit(side=(24, 32)), tmp_path / "wide")
    command = [
        *world.command[:2],
        f"b={tmp_path / 'wide'}",
        *world.command[3:],
        "--out",
        str(tmp_path / "x.html"),
    ]
    assert "they would see different parts of an image: give one --image-size" in refusal(command, capsys)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"models": ("a=x",)}, "explore compares two models or more"),
        ({"models": ("a=x", "a=y")}, "has the name 'a' twice"),
        ({"models": ("a=", "b=y")}, "takes NAME=BACKBONE"),
        ({"models": tuple("vwxyz")}, "at most 4 models, not 5"),
        ({"images": ""}, "needs --images FOLDER"),
        ({"vlm": ("a=x",)}, "--vlm compares models"),
        ({"serve": True}, "have no effect with --serve"),
        ({"port": 1}, "have no effect without --serve"),
        ({"serve": True, "images": "", "port": 2**16}, "--port takes 0 to 65535"),
        ({"limit": 0}, "--limit must be at least 1"),
        ({"questions": 0}, "--questions must be at least 1"),
        ({"max_mib": 0.0}, "--max-mib must be above 0"),
        ({"max_mib": 1e9}, "at most 512"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, object], said: str) -> None:
    from localign.errors import UserError

    good: dict[str, object] = {"models": ("a=x", "b=y"), "images": "z"}
    ExploreConfig(**good)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=re.escape(said)):
        ExploreConfig(**{**good, **options})  # type: ignore[arg-type]


def test_names_may_be_separated_by_commas() -> None:
    config = ExploreConfig(models=("a=x,b=y",), images="z", vlm=("a=1,b=2",))
    assert config.named_models() == {"a": "x", "b": "y"}
    assert config.named_answers() == {"a": "1", "b": "2"}


def test_all_features_of_a_batch_are_computed_once(world: World) -> None:
    calls: list[tuple[str, int, int]] = []
    images = list(inputs_of(world))
    found = page_features(
        world.baseline,
        images,
        dtype="int8",
        attention=False,
        batch_size=4,
        progress=lambda what, done, total: calls.append((what, done, total)),
    )
    assert calls == [("features", 4, 6), ("features", 6, 6)]
    assert found.attention is None
    assert found.features.shape == (6, PATCHES, world.baseline.width)
