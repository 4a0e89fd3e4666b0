"""The server answers uploads with their page, keeps its bounds, and answers nobody else."""

from __future__ import annotations

import http.client
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from explore_world import HOSTILE_FILE, World, content_of, make_world

from localign.cli import main
from localign.errors import UserError
from localign.explore import serve as server
from localign.explore.command import find_alignment, load_models
from localign.options.export import ExploreConfig


@dataclass
class Running:
    """A server in a thread."""

    port: int
    world: World

    def ask(
        self, method: str = "GET", body: bytes = b"", headers: dict[str, str] | None = None, path: str = "/"
    ) -> tuple[int, str]:
        """Status and text of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def upload(self, *files: tuple[str, bytes], **headers: str) -> tuple[int, str]:
        """Upload files as a browser's form does."""
        parts = [
            b'--sep\r\nContent-Disposition: form-data; name="files"; filename="'
            + name.encode()
            + b'"\r\nContent-Type: image/png\r\n\r\n'
            + content
            + b"\r\n"
            for name, content in files
        ]
        kind = {"Content-Type": "multipart/form-data; boundary=sep"}
        return self.ask("POST", b"".join(parts) + b"--sep--\r\n", {**kind, **headers})

    def photograph(self, name: str = "photo1.png") -> bytes:
        """An image of the world."""
        return (self.world.root / "images" / name).read_bytes()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    uvicorn = pytest.importorskip("uvicorn", reason="needs localign[serve]")
    pytest.importorskip("starlette", reason="needs localign[serve]")
    pytest.importorskip("python_multipart", reason="needs localign[serve]")
    world = make_world(tmp_path_factory.mktemp("world"))
    config = ExploreConfig(models=tuple(world.command[1:3]), serve=True, port=0)
    models = load_models(config)
    app = server.application(
        config, models, find_alignment(config, models), torch.device("cpu"), list(server._LOOPBACK)
    )
    listener = server._listener(config)
    runner = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=lambda: runner.run(sockets=[listener]), daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.02)
    yield Running(listener.getsockname()[1], world)
    runner.should_exit = True
    thread.join(timeout=10)


def test_an_upload_is_answered_with_its_page(running: Running, tmp_path: Path) -> None:
    status, page = running.upload(
        ("a.png", running.photograph()), ("b.png", running.photograph("photo2.png"))
    )
    assert status == 200
    content, arrays = content_of(page)
    assert [image["name"] for image in content["images"]] == ["a.png", "b.png"]
    assert content["home"] == "/"
    assert content["masks"]["hidden"][0] == 0
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(running.photograph())
    out = tmp_path / "page.html"
    models = running.world.command[:3]
    assert main([*models, "--images", str(tmp_path / "images"), "--out", str(out)]) == 0
    written = content_of(out.read_text())[1]
    assert (written["features0"][0] == arrays["features0"][0]).all()


def test_the_form_names_the_models_and_may_only_be_sent_home(running: Running) -> None:
    status, page = running.ask()
    assert status == 200
    assert "What baseline, aligned see in each patch" in page
    assert "<script" not in page


def test_names_of_uploads_are_text(running: Running) -> None:
    status, page = running.upload((HOSTILE_FILE.replace('"', ""), running.photograph()))
    assert status == 200
    assert "<img src=x" not in page
    status, page = running.upload(("<b>x.png", b"no image"))
    assert status == 400
    assert "&lt;b&gt;x.png" in page
    assert "<b>" not in page


@pytest.mark.parametrize("content", [b"no image", b"\x89PNG\r\n\x1a\n broken", b"<svg onload=alert(1)>"])
def test_what_is_no_image_is_one_line_in_the_form(running: Running, content: bytes) -> None:
    status, page = running.upload(("x.png", content))
    assert status == 400
    assert '<p role="alert">' in page
    assert running.ask()[0] == 200


def test_an_empty_form_asks_for_a_photograph(running: Running) -> None:
    status, page = running.upload(("", b""))
    assert status == 400
    assert "Choose a photograph first." in page


def test_uploads_are_bounded(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [(f"{n}.png", running.photograph()) for n in range(server.MAX_PHOTOGRAPHS + 1)]
    assert running.upload(*many)[0] == 413
    monkeypatch.setattr(server, "MAX_UPLOAD", 1000)
    status, page = running.upload(("x.png", bytes(5000)))
    assert status == 413
    assert "photographs and 0 MiB at once" in page


def test_other_kinds_of_bodies_are_refused(running: Running) -> None:
    assert running.ask("POST", b"x", {"Content-Type": "text/plain"})[0] == 400
    assert running.ask("POST", b"garbage", {"Content-Type": "multipart/form-data; boundary=sep"})[0] == 400
    assert running.ask("POST", b"garbage", {"Content-Type": "multipart/form-data"})[0] == 400
    assert running.ask("PUT", b"x")[0] == 405
    assert running.ask(path="/etc/passwd")[0] == 404


def test_other_web_pages_reach_nothing(running: Running) -> None:
    """A foreign name of this address (DNS rebinding), and a form of another site."""
    assert running.ask(headers={"Host": "evil.example"})[0] == 400
    status, page = running.upload(("a.png", running.photograph()), Origin="https://evil.example")
    assert status == 403
    assert "octet-stream" not in page
    own = f"http://127.0.0.1:{running.port}"
    assert running.upload(("a.png", running.photograph()), Origin=own)[0] == 200


def test_an_address_in_use_is_one_line(running: Running) -> None:
    config = ExploreConfig(models=("a=x", "b=y"), serve=True, port=running.port)
    with pytest.raises(
        UserError, match=rf"cannot serve at 127.0.0.1, port {running.port}: .*give another --port"
    ):
        server._listener(config)


def test_without_the_extra_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(tmp_path)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main([*world.command[:3], "--serve"]) == 2
    assert "pip install 'localign[serve]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_person_uploads_and_sees(running: Running) -> None:
    playwright: Any = pytest.importorskip(
        "playwright.sync_api", reason="no playwright; `make test-web` installs it"
    )
    installed = next((p for name in ("chromium", "google-chrome") if (p := shutil.which(name))), None)
    with playwright.sync_playwright() as driver:
        try:
            arguments = [] if os.geteuid() else ["--no-sandbox"]
            browser = driver.chromium.launch(executable_path=installed, args=arguments)
        except playwright.Error:
            pytest.skip("no browser; `make test-web` installs one")
        page = browser.new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"http://127.0.0.1:{running.port}/")
        page.set_input_files("#files", [str(running.world.root / "images" / "photo1.png")])
        page.click("button")
        page.wait_for_selector("html[data-ready=yes]")
        assert "1 image ·" in page.inner_text("#summary")
        page.click("text=other photographs")
        page.wait_for_selector("#files")
        browser.close()
    # The browser asks every server for an icon.
    assert [line for line in said if "404" not in line] == []
