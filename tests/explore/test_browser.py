"""The page in a real browser: what a click, a key and a link show, and that nothing leaves the page."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explore_world import HOSTILE_FILE, PATCHES, World, content_of, cosines, make_world

from localign.cli import main

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (500, 900, 1400)
VIEWS = ("similarity", "components", "attention", "classes", "masks", "answers")
COLUMNS = 6
PALE_TEXTS = """() => {
    const light = (colour) => {
        const [r, g, b] = colour.match(/[\\d.]+/g).map((x) => Number(x) / 255)
            .map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const under = (element) => {
        for (; element; element = element.parentElement) {
            const colour = getComputedStyle(element).backgroundColor;
            if (!/^rgba.*, 0\\)/.test(colour)) return colour;
        }
    };
    const shown = [...document.querySelectorAll("body *")].filter((element) =>
        element.checkVisibility() && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
    return shown.map((element) => {
        const pair = [light(getComputedStyle(element).color), light(under(element))].sort((x, y) => y - x);
        return [(pair[0] + 0.05) / (pair[1] + 0.05), element.textContent.slice(0, 40)];
    }).filter(([contrast]) => contrast < 4.5);
}"""
UNNAMED = """() => [...document.querySelectorAll(
        "button, input, select, [role=listbox], [role=application], [tabindex='0']")]
    .filter((element) => element.checkVisibility())
    .filter((e) => !e.getAttribute("aria-label") && !e.textContent.trim() && !e.labels?.[0]?.textContent.trim())
    .map((element) => element.outerHTML)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no playwright; `make test-web` installs it"
    )
    installed = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    with playwright.sync_playwright() as running:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium refuses root otherwise
        try:
            chromium = running.chromium.launch(executable_path=installed, args=sandbox)
        except playwright.Error:
            pytest.skip("no browser; `make test-web` installs one")
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    assert main([*world.everything, "--out", str(world.root / "page.html")]) == 0
    return world


@dataclass
class Opened:
    """A page in the browser, and what it said and asked for."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def maps(self) -> list[str]:
        """The pixels of every panel."""
        self.page.wait_for_timeout(100)
        found: list[str] = self.page.eval_on_selector_all(
            ".panel > canvas", "all => all.map(c => c.toDataURL())"
        )
        return found

    @property
    def link(self) -> str:
        found: str = self.page.evaluate("location.hash")
        return found


Opener = Callable[..., Opened]


@pytest.fixture
def opened(browser: Any, world: World) -> Iterator[Opener]:
    contexts = []

    def open_page(
        link: str = "", width: int = 1400, scheme: str = "light", file: str = "page.html", **more: Any
    ) -> Opened:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **more)
        contexts.append(context)
        found = Opened(context.new_page())
        found.page.on("console", lambda message: found.said.append(message.text))
        found.page.on("pageerror", lambda error: found.said.append(str(error)))
        found.page.on("dialog", lambda dialog: found.said.append(f"dialog {dialog.message}"))
        found.page.on("request", lambda request: found.asked.append(request.url))
        found.page.goto((world.root / file).as_uri() + link)
        found.page.wait_for_selector("html[data-ready=yes]")
        found.page.wait_for_timeout(100)
        return found

    yield open_page
    for context in contexts:
        context.close()


def test_a_click_on_a_patch_changes_the_maps_and_the_link(opened: Opener) -> None:
    found = opened()
    before = found.maps()
    box = found.page.locator(".panel canvas").first.bounding_box()
    found.page.mouse.click(box["x"] + box["width"] * 4.5 / COLUMNS, box["y"] + box["height"] * 1.5 / COLUMNS)
    after = found.maps()
    assert len(before) == len(after) == 4
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert found.link == f"#image=1&patch={COLUMNS + 5}"
    assert "row 2, column 5" in found.page.inner_text("#live")
    assert found.said == []


def test_the_pointer_shows_a_patch_and_leaves_the_chosen_one(opened: Opener) -> None:
    found = opened("#image=2&patch=1")
    before = found.maps()
    box = found.page.locator(".panel canvas").nth(1).bounding_box()
    found.page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.9)
    assert found.maps() != before
    assert found.link == "#image=2&patch=1"
    found.page.mouse.move(5, 5)
    assert found.maps() == before


def test_a_tap_chooses_a_patch(opened: Opener) -> None:
    found = opened("#image=1&patch=1", width=500, has_touch=True, is_mobile=True)
    before = found.maps()
    box = found.page.locator(".panel canvas").first.bounding_box()
    found.page.touchscreen.tap(box["x"] + box["width"] * 0.99, box["y"] + box["height"] * 0.99)
    assert found.maps() != before
    assert found.link == f"#image=1&patch={PATCHES}"


def test_keys_reach_every_patch_image_and_view(opened: Opener) -> None:
    found = opened("#image=1&patch=1")
    found.page.focus("#panels")
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowLeft", "PageDown", "End"):
        found.page.keyboard.press(key)
    assert found.link == f"#image=2&patch={3 * COLUMNS}"
    found.page.focus("[role=tab][aria-selected=true]")
    for _ in VIEWS[1:]:
        found.page.keyboard.press("ArrowRight")
    found.page.wait_for_timeout(100)
    assert found.link == "#question=1&view=answers"
    assert found.page.evaluate("document.activeElement.id") == "tab-answers"


def test_tab_stops_are_few_and_in_order(opened: Opener) -> None:
    found = opened()
    stops = []
    for _ in range(7):
        found.page.keyboard.press("Tab")
        stops.append(
            found.page.evaluate("document.activeElement.id || document.activeElement.getAttribute('role')")
        )
    assert stops == ["theme", "tab-similarity", "option", "shared", "others", "alpha", "panels"]


def test_a_link_opens_what_it_names(opened: Opener) -> None:
    found = opened("#image=3&patch=20&view=masks&step=5")
    assert "Image 3 of 6" in found.page.inner_text("#live")
    assert "Patch 20: row 4, column 2" in found.page.inner_text("#live")
    assert "32 of 36 patches hidden" in found.page.inner_text("#panels")
    found.page.evaluate("location.hash = '#image=1&patch=2'")
    found.page.wait_for_timeout(100)
    assert "Image 1 of 6" in found.page.inner_text("#live")


@pytest.mark.parametrize(
    "link", ["#image=99&patch=0", "#image=-1&patch=1e9&view=<script>", "#class=9&view=classes", "#%E0"]
)
def test_a_bad_link_opens_the_page_all_the_same(opened: Opener, link: str) -> None:
    found = opened(link)
    assert found.said == []
    assert "Image 1 of 6" in found.page.inner_text("#live")


def test_similarities_and_neighbours_are_numpys(opened: Opener, world: World) -> None:
    found = opened()
    _, arrays = content_of((world.root / "page.html").read_text())
    for number in (0, 1):
        features = arrays[f"features{number}"].astype(np.float64)
        exact = cosines(features)[2, 7]
        shown = found.page.evaluate(f"Array.from(explorer.models[{number}].similarities(2, 7))")
        assert np.allclose(shown, exact, atol=1e-6)
        unit = (features / np.linalg.norm(features, axis=-1, keepdims=True)).reshape(-1, features.shape[-1])
        order = np.argsort(-(unit @ unit[2 * PATCHES + 7]), kind="stable")
        others = [int(i) for i in order if i // PATCHES != 2][:8]
        near = found.page.evaluate(
            f"explorer.models[{number}].nearest(2, 7, 8, true).map(n => n.image * {PATCHES} + n.patch)"
        )
        assert near == others


def test_a_page_of_float16_shows_the_same(opened: Opener, world: World) -> None:
    out = world.root / "half.html"
    assert main([*world.command, "--dtype", "float16", "--out", str(out)]) == 0
    found = opened(file="half.html")
    _, arrays = content_of(out.read_text())
    shown = found.page.evaluate("Array.from(explorer.models[1].similarities(0, 3))")
    assert np.allclose(shown, cosines(arrays["features1"])[0, 3], atol=1e-5)


def test_a_neighbour_leads_to_its_patch(opened: Opener) -> None:
    found = opened("#image=2&patch=8")
    label = found.page.locator(".neighbour").first.get_attribute("aria-label")
    found.page.locator(".neighbour").first.click()
    found.page.wait_for_timeout(100)
    place = re.match(r"Image (\d+), row (\d+), column (\d+)", label)
    assert place is not None
    image, row, column = map(int, place.groups())
    assert found.link == f"#image={image}&patch={(row - 1) * COLUMNS + column}"


def test_fixed_and_broken_patches_are_counted_as_defined(opened: Opener, world: World) -> None:
    _, arrays = content_of((world.root / "page.html").read_text())
    truth = arrays["truth"][0] > 0
    for chosen in (None, 1):
        right = []
        for number in (0, 1):
            agrees = (arrays[f"probability{number}"][0] > 127) == truth
            right.append(agrees.all(-1) if chosen is None else agrees[:, chosen])
        fixed, broken = int((~right[0] & right[1]).sum()), int((right[0] & ~right[1]).sum())
        assert fixed + broken > 0
        found = opened("#image=1&patch=1&view=classes" + ("" if chosen is None else f"&class={chosen + 1}"))
        text = found.page.inner_text("#panels")
        assert f"fixed {fixed}" in text
        assert f"broken {broken}" in text


def test_the_class_filter_changes_the_maps(opened: Opener) -> None:
    found = opened("#image=1&patch=1&view=classes")
    before = found.maps()
    found.page.select_option("#class", label="<b>dog")
    assert found.maps() != before
    assert "class=3" in found.link
    assert "<b>dog" in found.page.inner_text("#details")
    found.page.locator(".thumb").nth(4).click()
    assert "Predictions exist for the first 2 images only" in found.page.inner_text("#details")


def test_the_slider_hides_more_patches(opened: Opener) -> None:
    found = opened("#image=1&patch=1&view=masks&step=1")
    before = found.maps()
    found.page.focus("#step")
    found.page.keyboard.press("ArrowRight")
    after = found.maps()
    assert all(old != new for old, new in zip(before[:3], after[:3], strict=True))
    assert "9 of 36 patches hidden" in found.page.inner_text("#panels")
    assert found.page.evaluate("document.activeElement.id") == "step"
    assert found.page.get_attribute("#step", "aria-valuetext") == "9 of 36 patches hidden"


def test_answers_are_shown_and_those_that_differ_come_first(opened: Opener) -> None:
    found = opened("#view=answers")
    assert "6 questions asked of all models, 3 with different scores" in found.page.inner_text("#answers")
    texts = found.page.locator("[role=listbox].questions [role=option]").all_inner_texts()
    assert len(texts) == 6
    assert texts[0].startswith("≠")
    assert texts[-1].startswith("=")
    found.page.check("#disagree")
    assert found.page.locator(".questions [role=option]").count() == 3
    found.page.focus(".questions")
    found.page.keyboard.press("ArrowDown")
    found.page.wait_for_timeout(100)
    assert found.link == "#question=2&view=answers"
    assert "<i>cat</i>" in found.page.inner_text(".question")


def test_nothing_leaves_the_page_and_nothing_in_it_runs(opened: Opener, world: World) -> None:
    for view in VIEWS:
        found = opened(f"#image=3&patch=3&view={view}")
        assert found.said == []
        assert [url for url in found.asked if not url.startswith("data:image/jpeg;base64,")] == [
            (world.root / "page.html").as_uri()
        ]
        shown = HOSTILE_FILE.replace("\u202e", "\\u202e")
        assert found.page.locator(".thumb").nth(2).get_attribute("title") == shown


def test_the_policy_stops_what_a_foreign_script_would_do(opened: Opener) -> None:
    found = opened()
    assert (
        found.page.evaluate("fetch('https://localhost:9/').then(() => 'sent', () => 'stopped')") == "stopped"
    )
    found.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = true'}))"
    )
    assert found.page.evaluate("window.ran") is None
    assert any("Content Security Policy" in line for line in found.said)
    assert not any(url.startswith("http") for url in found.asked)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_view_fits_its_width(opened: Opener, width: int, scheme: str) -> None:
    for view in VIEWS:
        found = opened(f"#image=1&patch=15&view={view}", width=width, scheme=scheme)
        assert found.page.evaluate("document.documentElement.scrollWidth") <= width
        red, green, blue = map(
            int,
            re.findall(r"\d+", found.page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3],
        )
        assert (red + green + blue > 600) == (scheme == "light")
        if folder := os.environ.get("LOCALIGN_SCREENSHOTS"):
            found.page.screenshot(path=Path(folder) / f"{view}-{width}-{scheme}.png", full_page=True)
        found.page.close()


def test_the_button_switches_the_colours(opened: Opener) -> None:
    found = opened(scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = found.page.evaluate(background)
    found.page.click("#theme")
    assert found.page.evaluate(background) != dark
    found.page.click("#theme")
    assert found.page.evaluate(background) == dark


def test_text_is_legible_in_both_colour_schemes(opened: Opener) -> None:
    """Contrast of at least 4.5 to 1, as WCAG asks of text."""
    for scheme in ("light", "dark"):
        for view in VIEWS:
            assert opened(f"#image=1&view={view}", scheme=scheme).page.evaluate(PALE_TEXTS) == [], (
                scheme,
                view,
            )


def test_everything_that_can_be_used_has_a_name(opened: Opener) -> None:
    for view in VIEWS:
        found = opened(f"#image=1&view={view}")
        unnamed = found.page.evaluate(UNNAMED)
        assert unnamed == []
        assert found.page.evaluate("[...document.images].every((i) => i.hasAttribute('alt'))")


def test_models_of_other_grids_are_shown_side_by_side(opened: Opener, world: World) -> None:
    from explore_world import tiny_vit

    from localign.backbones import save_backbone

    save_backbone(tiny_vit(side=32, width=16), world.root / "larger")
    command = [*world.command[:2], f"larger={world.root / 'larger'}", *world.command[3:]]
    assert main([*command, "--out", str(world.root / "grids.html")]) == 0
    found = opened("#image=1&patch=36", file="grids.html")
    assert len(found.maps()) == 3  # no difference
    assert found.page.evaluate("explorer.patchOf(explorer.models[1])") == 63
    for view in ("components", "attention"):
        found.page.click(f"#tab-{view}")
        assert len(found.maps()) == 3
    assert found.said == []
