"""A hub whose connection breaks: a local server that answers what huggingface_hub asks."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

import truedepth as td

REPO, COMMIT = "someone/some-model", "a" * 40
REQUESTS = 200
"""Most that a test may need; the server answers no more."""

ABORT = struct.pack("ii", 1, 0)
SHARD = 16 << 20  # the hub library writes 10 MB at a time, so that less would be nothing


class Hub(ThreadingHTTPServer):
    """One repository."""

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files = {
            str(path.relative_to(directory)): path.read_bytes()
            for path in directory.rglob("*")
            if path.is_file()
        }
        self.cut: dict[str, list[int]] = {}
        """Bytes after which the next downloads of a file break, one after another."""

        self.reset = False
        """Whether they break with a reset (TCP RST), which the hub library does not try again."""

        self.asked: list[tuple[str, int]] = []
        """Files that were downloaded, and from which byte on."""

        self.requests = 0
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.server.requests += 1
        path = unquote(self.path.partition("?")[0])
        if self.server.requests > REQUESTS:
            self.send(503, b"")
        elif path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/main"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.json({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings})
        elif path == f"/api/models/{REPO}/tree/{COMMIT}":
            self.json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": etag(data)}
                    for name, data in self.server.files.items()
                ]
            )
        elif (name := path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")) in self.server.files:
            self.file(name)
        else:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def file(self, name: str) -> None:
        data = self.server.files[name]
        headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = None
        if self.command == "GET":
            self.server.asked.append((name, start))
            if self.server.cut.get(name):
                cut = self.server.cut[name].pop(0)
        self.send(206 if start else 200, data[start:], headers, cut)

    def json(self, data: object) -> None:
        self.send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def send(
        self, code: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            if self.server.reset:
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
                self.connection.close()
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing."""


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(make_model) -> Iterator[Hub]:
    """With a model in shards of more than 10 MB."""
    options = {"vocab_size": 320, "hidden_size": 512, "num_attention_heads": 8}
    directory = make_model(num_hidden_layers=2, intermediate_size=2048, shard_size=SHARD, **options)
    with Hub(directory) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def convert(hub, tmp_path):
    """`truedepth convert` of the hub's model in a process of its own, with an empty cache."""

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "truedepth", "convert", REPO, tmp_path / "out"]
        environment = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "10",
            "NO_PROXY": "127.0.0.1",
        }
        for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            environment.pop(name, None)
        return subprocess.run(
            [*command, "--layers", "0-1"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def check_converted(hub, tmp_path):
    """The same weights as of the model itself."""
    model = tmp_path / "model"
    model.mkdir()
    for name, data in hub.files.items():
        (model / name).write_bytes(data)
    td.convert(model, tmp_path / "expected", td.Plan.span(2, 0, 1))
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "expected" / "model.safetensors").read_bytes()


def test_a_connection_that_breaks_once(hub, convert, tmp_path):
    """The hub library goes on within the file."""
    shard = max(hub.files, key=lambda name: len(hub.files[name]))
    cut = len(hub.files[shard]) - 1000
    hub.cut[shard] = [cut]
    done = convert()
    assert done.returncode == 0, done.stderr
    assert [start for name, start in hub.asked if name == shard] == [0, 10 << 20]
    assert hub.requests < REQUESTS
    check_converted(hub, tmp_path)


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_that_stays_broken(hub, convert, tmp_path, reset):
    """One sentence; the same command fetches what has not come whole, and nothing twice."""
    shards = sorted(name for name in hub.files if name.endswith(".safetensors"))
    assert len(shards) > 1
    hub.cut[shards[-1]], hub.reset = [1 << 20] + [0] * 20, reset
    failed = convert()
    assert failed.returncode == 1
    *tries, said = failed.stderr.splitlines()
    assert said.startswith(f"truedepth: Downloading {REPO} failed (")
    assert said.endswith("the same command fetches the others.")
    hubs_own = ("Error while downloading", "Trying to resume", "Max retries")
    assert all(line.startswith(hubs_own) for line in tries)
    assert not (tmp_path / "out").exists()
    first = list(hub.asked)
    hub.cut.clear()
    done = convert()
    assert done.returncode == 0, done.stderr
    again = [name for name, _ in hub.asked[len(first) :]]
    assert again == [shards[-1]]
    assert hub.requests < REQUESTS
    check_converted(hub, tmp_path)


def test_a_hub_that_is_gone_when_everything_is_here(hub, convert, tmp_path):
    """The cache is enough."""
    assert convert().returncode == 0
    check_converted(hub, tmp_path)
    (tmp_path / "out").rename(tmp_path / "first")
    hub.shutdown()
    hub.socket.close()
    assert convert().returncode == 0
