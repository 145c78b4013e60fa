"""The study's report in a real browser: every plot drawn, nothing fetched, no error."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from truedepth.cli import app as cli
from truedepth.depth_study.measurements import Measurements
from truedepth.depth_study.run import study
from truedepth.depth_study.transformations import TRANSFORMATIONS
from truedepth.report.study_report import report_html, write_study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--virtual-time-budget=3000",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on the mat and then the hat " * 200)
    return path


@pytest.fixture(scope="module")
def found(make_model, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "out"
    return study(make_model(), out, text=text, window=16, windows=3, dtype=torch.float32)


@pytest.fixture(scope="module")
def directory(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    write_study(found, path, "truedepth study </script><b>model</b>")
    return path


def browse(page, profile):
    """The page's document after its scripts have run, and the hosts that were asked."""
    assert CHROMIUM, "CI must have Chromium"
    log = profile / "net.json"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--log-net-log={log}"]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    hosts = set(re.findall(r'"url":"(\w+://[^/"]+)', log.read_text(errors="replace")))
    return done.stdout, hosts


def empty_page(tmp_path, content=""):
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><title>page</title>{content}")
    return page


# Elsewhere the tests that need a browser are left out where there is none, and pytest says so.
in_browser = pytest.mark.skipif(
    not CHROMIUM and not os.environ.get("CI"), reason="Chromium is not installed"
)

BROWSERS_OWN = (".google.com", ".googleapis.com", ".gvt1.com")


@in_browser
def test_a_phone_need_not_scroll_sideways(directory, tmp_path):
    """In a frame, for a browser's window cannot be as narrow as a phone."""
    page = tmp_path / "phone.html"
    content = html.escape((directory / "report.html").read_text(), quote=True)
    script = (
        "frame.onload = () => { const page = frame.contentDocument;"
        " const wide = page.documentElement.scrollWidth > page.documentElement.clientWidth;"
        " document.body.dataset.found = [page.body.dataset.drawn, frame.clientWidth, wide] }"
    )
    frame = f'<iframe id="frame" width="360" height="800" frameborder="0" srcdoc="{content}">'
    page.write_text(f"<!doctype html><body>{frame}</iframe><script>{script}</script>")
    dom, _ = browse(page, tmp_path)
    assert re.search(r'data-found="([^"]*)"', dom)[1] == "25,360,false"


@in_browser
def test_every_plot_is_drawn_without_error_or_request(directory, tmp_path_factory):
    profiles = [tmp_path_factory.mktemp("profile") for _ in range(2)]
    _, own = browse(empty_page(profiles[0]), profiles[0])  # what the browser asks for by itself
    dom, hosts = browse(directory / "report.html", profiles[1])
    body = re.search(r"<body[^>]*>", dom)[0]
    assert "data-errors" not in body
    # 11 transformations, 3 measures of layers and of sub-layers, their 7 scales, sweep
    assert 'data-drawn="25"' in body
    curves, dots = 2, 5 + 3  # Δ = 2 and 4; one span of 6 makes no curve
    assert dom.count("<polyline ") == curves
    assert dom.count("<circle ") == dots
    assert dom.count('data-tip="') == 11 * 21 + 3 * (15 + 66) + curves + dots
    assert "&lt;/script&gt;&lt;b&gt;model" in dom
    assert not [host for host in hosts - own if not host.endswith(BROWSERS_OWN)]


@in_browser
def test_an_error_or_a_request_of_the_page_would_be_noticed(directory, tmp_path_factory):
    """The checks above can fail."""
    profiles = [tmp_path_factory.mktemp("profile") for _ in range(2)]
    broken = profiles[0] / "broken.html"
    page = (directory / "report.html").read_text()
    broken.write_text(page.replace('"transformed":', '"other":'))
    dom, _ = browse(broken, profiles[0])
    assert "data-errors" in re.search(r"<body[^>]*>", dom)[0]
    asking = empty_page(profiles[1], '<img src="http://127.0.0.1:9/picture.png">')
    assert "http://127.0.0.1:9" in browse(asking, profiles[1])[1]


@in_browser
def test_columns_of_tables_are_aligned_by_their_type(directory, tmp_path):
    """Words to the left, also those that begin with a digit; numbers and titles to the right."""
    dom, _ = browse(directory / "report.html", tmp_path)
    assert "<td>2-parallel</td>" in dom
    for name, words in (("medians", 1), ("units", 0), ("best", 0), ("correlation", 1)):
        (table,) = re.findall(rf'<table id="{name}">(.*?)</table>', dom)
        rows = re.findall(r"<tr>(.*?)</tr>", table)
        assert len(rows) > 2
        for row in rows:
            cells = re.findall(r"<t[hd]([^>]*)>", row)
            right = [' class="number"' in cell for cell in cells]
            assert right == [False] * words + [True] * (len(cells) - words), row
    assert "number" not in re.search(r'<table id="settings">(.*?)</table>', dom)[1]


def test_the_page_names_no_other_address(directory):
    page = (directory / "report.html").read_text()
    assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page


def test_the_page_and_the_json_hold_the_same_figures(found, directory):
    page = (directory / "report.html").read_text()
    embedded = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.S)[1])
    saved = json.loads((directory / "study.json").read_text())
    assert {key: embedded[key] for key in saved} == saved
    assert saved["transformed"] == found.transformed
    assert set(embedded["descriptions"]) >= set(TRANSFORMATIONS)


def test_figures_are_pictures(directory):
    for name in ("spans", "sweep", "dependence"):
        data = (directory / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000


def test_without_matplotlib_the_figures_are_left_out(found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written = write_study(found, tmp_path, "command")
    assert [path.name for path in written] == ["study.json", "report.html"]


def test_texts_cannot_break_out_of_the_page(found):
    data = found.to_dict() | {"command": "</script><script>alert(1)</script>"}
    assert report_html(data).count("</script>") == 2


def test_the_command(make_model, text, tmp_path, monkeypatch, capsys):
    arguments = ["study", str(make_model()), "-o", str(tmp_path / "out"), "--text", str(text)]
    arguments += ["--window", "16", "--windows", "3", "--stride", "2", "--only", "2-parallel"]
    monkeypatch.setattr(sys, "argv", ["truedepth", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    out = capsys.readouterr().out
    assert "Best spans of consecutive pairs" in out
    saved = json.loads((tmp_path / "out" / "study.json").read_text())
    assert list(saved["transformed"]) == ["2-parallel"]
    shown = (Path(word).name if word.startswith("/") else word for word in arguments)
    assert saved["command"] == "truedepth " + " ".join(shown)


def test_an_interrupted_command_says_that_it_can_go_on(
    make_model, text, tmp_path, monkeypatch, capsys
):
    def interrupt(self, schedule, nll):
        raise KeyboardInterrupt

    monkeypatch.setattr(Measurements, "add", interrupt)
    arguments = ["study", str(make_model()), "-o", str(tmp_path / "out"), "--text", str(text)]
    monkeypatch.setattr(sys, "argv", ["truedepth", *arguments, "--window", "16", "--windows", "3"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert "the same command resumes" in capsys.readouterr().err
