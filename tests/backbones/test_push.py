"""Uploads to a stand-in of the Hub on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from localign.backbones import create_backbone
from localign.cli import main

EXPORT = ["export", "vit_tiny_patch16_224", "--weights", "none", "--image-size", "32"]
EXPORT += ["--model-kwargs", '{"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}']
NAME, TOKEN = "me/model", "hf_secret"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


@dataclass
class Hub:
    """What the stand-in holds, and how it misbehaves."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    fails_at: str | None = None


class Handler(BaseHTTPRequestHandler):
    """The Hub's API as far as an upload needs it."""

    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, content: Any = None, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, message: str, **headers: str) -> None:
        self.reply({"error": message}, status, X_Error_Message=message, **headers)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_PUT(self) -> None:
        self.hub.large[self.path.rpartition("/")[2]] = self.body()
        self.reply()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        repository = self.hub.repositories.get(NAME)
        if repository is None:
            self.refuse(404, "Repository not found", X_Error_Code="RepoNotFound")
        elif "/resolve/" in path:
            content = repository.files.get(path.rpartition("/")[2])
            if content is None:
                self.refuse(404, "Entry not found", X_Error_Code="EntryNotFound")
            else:
                digest = hashlib.sha1(content).hexdigest()
                self.reply(content, X_Repo_Commit=digest, ETag=f'"{digest}"')
        else:
            self.reply({"id": NAME, "private": repository.private, "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body, path = self.body(), self.path.partition("?")[0]
        if self.hub.fails_at is not None and self.hub.fails_at in path:
            self.refuse(403, "You may not do this")
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(401, "Invalid username or password.")
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.reply({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/large/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self.reply({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")
        else:
            assert "/commit/" in path, path
            self.commit([json.loads(line) for line in body.splitlines()])

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            self.reply({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
            return
        self.hub.repositories[name] = Repository(wanted.get("visibility") == "private")
        self.reply({"url": f"{self.hub.url}/{name}"})

    def commit(self, lines: list[dict[str, Any]]) -> None:
        repository = self.hub.repositories[NAME]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.large[value["oid"]]
        repository.commits += 1
        self.reply({"commitUrl": f"{self.hub.url}/{NAME}/commit/1", "commitOid": "1" * 40})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()
    handler = type("Bound", (Handler,), {"hub": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", state.url)
        template = state.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # a protocol of its own
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield state
        server.shutdown()


def push(out: Path, *options: str) -> int:
    return main([*EXPORT, "--out", str(out), "--push-to", NAME, *options])


def test_the_repository_holds_the_export_and_nothing_else(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("not for others")
    assert push(out) == 0
    assert f"pushed     {hub.url}/{NAME}" in capsys.readouterr().out
    repository = hub.repositories[NAME]
    assert not repository.private
    assert repository.commits == 1
    assert repository.files == {
        path.name: path.read_bytes() for path in out.iterdir() if path.name != "notes.txt"
    }
    assert {"README.md", "config.json", "model.safetensors"} < repository.files.keys()
    assert f'AutoModel.from_pretrained("{NAME}"' in repository.files["README.md"].decode()
    again = tmp_path / "again"
    again.mkdir()
    for name, content in repository.files.items():
        (again / name).write_bytes(content)
    pixels = torch.rand(1, 3, 32, 32)
    assert torch.equal(create_backbone(str(again)).tokens(pixels), create_backbone(str(out)).tokens(pixels))


def test_private_means_private(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(tmp_path / "out", "--private") == 0
    assert hub.repositories[NAME].private
    hub.repositories[NAME].private = False
    commits = hub.repositories[NAME].commits
    assert push(tmp_path / "out", "--private") == 2
    assert "exists and is public, but --private was given" in capsys.readouterr().err
    assert hub.repositories[NAME].commits == commits


def test_a_card_in_the_repository_is_not_replaced(hub: Hub, tmp_path: Path) -> None:
    hub.repositories[NAME] = Repository(False, {"README.md": b"mine", "other.bin": b"mine"})
    assert push(tmp_path / "out") == 0
    files = hub.repositories[NAME].files
    assert files["README.md"] == files["other.bin"] == b"mine"
    assert "config.json" in files
    files["README.md"] = (tmp_path / "out" / "README.md").read_bytes()
    smaller = '{"depth": 1, "patch_size": 8, "embed_dim": 24, "num_heads": 2}'
    assert push(tmp_path / "out", "--model-kwargs", smaller) == 0
    assert files["README.md"] == (tmp_path / "out" / "README.md").read_bytes()


@pytest.mark.parametrize("fault", ["no token", "unreachable", "create", "preupload", "commit"])
def test_a_failure_is_one_line_and_the_export_stays(
    fault: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if fault == "no token":
        monkeypatch.delenv("HF_TOKEN")
        said = "the Hub answers 401, Invalid username or password.; log in with `hf auth login`"
    elif fault == "unreachable":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
        said = "onnect"
    else:
        hub.fails_at = f"/{fault}"
        said = "the Hub answers 403, You may not do this; log in"
    assert push(tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"localign: {NAME} was not pushed: ")
    assert said in lines[0]
    assert lines[0].endswith(f"the export in {tmp_path / 'out'} is complete")
    assert TOKEN not in lines[0]
    assert create_backbone(str(tmp_path / "out")).width == 24
    assert not any(r.files for r in hub.repositories.values())


@pytest.mark.parametrize("options", [["--push-to", "model"], ["--push-to", "../me/x"], ["--private"]])
@pytest.mark.parametrize("command", [EXPORT, ["vlm", "export", "x"]])
def test_bad_options_are_known_before_the_work(
    command: list[str], options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--out", str(tmp_path / "out"), *options]) == 2
    assert "--push-to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_environment_names_the_hub(hub: Hub, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HF_HUB_DISABLE_XET": "1",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": TOKEN,
    }
    command = [sys.executable, "-m", "localign", *EXPORT, "--out", str(tmp_path / "out"), "--push-to", NAME]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "config.json" in hub.repositories[NAME].files
