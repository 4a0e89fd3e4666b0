"""The page needs no other file, holds the numbers of its run, and names what it lacks."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localign.errors import UserError
from localign.report import build_report

EVIL = '<img src=x onerror="alert(1)">'
CLASSES = ["ground", "red", EVIL]


def metrics(recall: float) -> dict[str, Any]:
    return {"macro_recall": recall, "class_recall": [0.9, recall, None], "class_positives": [900, 77, 0]}


def probe_result(local: float) -> dict[str, Any]:
    heads = {head: {"local": metrics(local), "global": metrics(0.25)} for head in ("transformer", "linear")}
    losses = {"train": 0.5, "validation": 0.6}
    curve = [
        {"step": s, "transformer": {"local": losses, "global": losses}, "linear": {"local": losses}}
        for s in (100, 200)
    ]
    return {"backbone": "tiny", "classes": CLASSES, "train": {"curve": curve}, "results": {"val": heads}}


def write_demo(folder: Path, pictures: bool = True) -> Path:
    probes = {
        "baseline": [probe_result(v) for v in (0.40, 0.41)],
        "aligned": [probe_result(v) for v in (0.61, 0.63)],
    }
    results = {
        "command": "demo",
        "config": {"align": {"lr": 0.000123}, "name": EVIL},
        "versions": {"torch": "2.99"},
        "timings": {"alignment": 12.34},
        "seeds": [0, 1],
        "classes": CLASSES,
        "probe": probes,
        "notes": [f"A note about {EVIL}."],
    }
    (folder / "results.json").write_text(json.dumps(results))
    inner = folder / "align-seed0"
    inner.mkdir()
    log = [{"step": s, "loss": 1 / s, "grad_norm": 2.0, "attention_logit_max": 4.0} for s in range(1, 6)]
    (inner / "log.jsonl").write_text(
        "".join(json.dumps(e) + "\n" for e in [*log, {"step": 5, "val_loss": 0.3}])
    )
    (inner / "results.json").write_text(json.dumps({"config": {"loss": "mse"}, "soft_cap": 30.0}))
    if pictures:
        np.savez(folder / "pictures.npz", **picture_arrays())
    return folder


def picture_arrays() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    keep = np.array([[[True, False, True, False], [False, True, False, True], [True] * 4]])
    return {
        "images": draw.integers(0, 256, (1, 3, 8, 8), dtype=np.uint8),
        "grid": np.array([2, 2]),
        "patch_size": np.array([4, 4]),
        "mean_colour": np.array([0.5, 0.5, 0.5]),
        "keep_masks": keep,
        "truth": draw.random((1, 4, 3)) > 0.5,
        "class_names": np.array(CLASSES),
        "probability_baseline": draw.random((1, 4, 3)).astype(np.float16),
        "probability_aligned": draw.random((1, 4, 3)).astype(np.float16),
        "pca_baseline": draw.random((1, 4, 3)),
        "pca_aligned": draw.random((1, 4, 3)),
        "pca_baseline_share": np.array([0.5, 0.2, 0.1]),
        "pca_aligned_share": np.array([0.5, 0.2, 0.1]),
        "target": draw.random((1, 3, 4, 3)),
        "reconstruction": draw.random((1, 3, 4, 3)),
        "view_error": draw.random((1, 3)),
    }


@pytest.fixture(scope="module")
def demo_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(write_demo(tmp_path_factory.mktemp("demo")))


class Addresses(HTMLParser):
    """All tags, and every attribute through which a browser would fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.update(name for name, _ in attrs)
        self.fetched += [v or "" for name, v in attrs if name in ("src", "href", "srcset", "data", "poster")]


def parsed(page: Path) -> tuple[str, Addresses]:
    content = page.read_text(encoding="utf-8")
    addresses = Addresses()
    addresses.feed(content)
    return content, addresses


def test_the_page_needs_nothing_but_itself(demo_page: Path) -> None:
    content, found = parsed(demo_page)
    assert found.tags.count("img") == 5  # predictions, features, reconstructions, alignment, heads
    assert all(address.startswith("data:image/") for address in found.fetched)
    assert "script" not in found.tags
    assert "link" not in found.tags
    assert not re.search(r"url\(|@import", content)


def test_it_holds_the_numbers_of_the_run(demo_page: Path) -> None:
    content, _ = parsed(demo_page)
    # Differences 0.21 and 0.22: mean 0.215, half-width 12.7062 * 0.00707 / sqrt(2) = 0.0635.
    assert "+21.5 ± 6.4" in content
    for number in ("40.5", "62.0", "0.000123", "12.3 s", "2.99", "900", "align-seed0"):
        assert number in content, number
    assert "Not in this report" not in content


def test_every_picture_is_told_in_words(demo_page: Path) -> None:
    content, _ = parsed(demo_page)
    assert all(len(alt) > 30 for alt in re.findall(r'<img [^>]*alt="([^"]*)"', content))


def test_names_are_text_and_not_markup(demo_page: Path) -> None:
    content, found = parsed(demo_page)
    assert "onerror" not in found.attributes
    assert EVIL not in content
    assert "A note about &lt;img src=x" in content


def test_equal_folders_give_equal_pages(demo_page: Path) -> None:
    first = demo_page.read_bytes()
    assert build_report(demo_page.parent).read_bytes() == first


def test_without_pictures_it_says_so(tmp_path: Path) -> None:
    content, found = parsed(build_report(write_demo(tmp_path, pictures=False)))
    assert "pictures.npz is missing: no pictures" in content
    assert found.tags.count("img") == 2


def test_pictures_that_are_partly_there_are_shown_in_part(tmp_path: Path) -> None:
    write_demo(tmp_path)
    arrays = picture_arrays()
    del arrays["truth"], arrays["reconstruction"]
    np.savez(tmp_path / "pictures.npz", **arrays)
    content, found = parsed(build_report(tmp_path))
    assert found.tags.count("img") == 3
    assert "predictions per patch: pictures.npz has no truth" in content


def test_a_broken_picture_file_is_no_failure(tmp_path: Path) -> None:
    write_demo(tmp_path)
    (tmp_path / "pictures.npz").write_bytes(b"not a zip file")
    assert "pictures.npz cannot be read" in parsed(build_report(tmp_path))[0]


def test_a_plain_alignment_run_has_curves_and_no_recall(tmp_path: Path) -> None:
    results = {
        "command": "align", "config": {"backbone": "tiny"}, "steps": 3, "images": 96, "seconds": 2.0,
        "images_per_second": 48.0, "final": {"val_loss": 0.4321}, "soft_cap": None,
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.9}\n{"step": 3, "loss": 0.5}\n{"step": 4, "lo')
    content, found = parsed(build_report(tmp_path))
    assert found.tags.count("img") == 1
    assert "0.4321" in content
    assert "Training loss went from 0.9 to 0.5 over 3 steps." in content
    assert "Before and after" not in content


def test_a_probing_run_has_its_recalls_figures_and_curves(tmp_path: Path) -> None:
    results = {"command": "probe", "config": {}, "probe": {"tiny": [probe_result(0.4321)]}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    content, found = parsed(build_report(tmp_path))
    assert found.tags.count("img") == 4  # recall, heads, local against global, curves
    assert "43.2" in content
    assert "gains by class: it needs two backbones" in content


def test_an_unfinished_run_is_shown_as_far_as_it_got(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("command: align\nconfig: {backbone: tiny}\n")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.9}\n')
    assert "the run has not finished" in parsed(build_report(tmp_path))[0]


def test_a_single_seed_is_not_oversold(tmp_path: Path) -> None:
    write_demo(tmp_path, pictures=False)
    results = json.loads((tmp_path / "results.json").read_text())
    results["probe"] = {side: runs[:1] for side, runs in results["probe"].items()}
    (tmp_path / "results.json").write_text(json.dumps(results))
    content, _ = parsed(build_report(tmp_path))
    assert "one seed, so it may be chance" in content
    assert "One seed: no interval can be given." in content


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        build_report(tmp_path)
