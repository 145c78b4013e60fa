"""Pictures of training."""

from __future__ import annotations

import re

from truedepth.report.plots import plot_healing

CURVE = [
    {"step": 0, "kl": 0.3, "excess": 0.2, "stderr": 0.01},
    {"step": 10, "kl": 0.1, "excess": 0.05, "stderr": 0.01},
]


def words_of(path) -> list[str]:
    """The texts of an SVG file, which matplotlib writes as comments beside their outlines."""
    return re.findall(r"<!-- (.+?) -->", path.read_text())


def test_one_run_needs_no_name(tmp_path):
    plot_healing({"": (4096, CURVE)}, tmp_path / "one.svg")
    words = words_of(tmp_path / "one.svg")
    assert words[-2:] == ["KL", "excess loss"]
    assert "20 k" in words  # tokens, not steps


def test_several_runs_are_named_once_each(tmp_path):
    plot_healing({"46": (4096, CURVE), "40, rank-local": (4096, CURVE)}, tmp_path / "two.svg")
    assert words_of(tmp_path / "two.svg")[-4:] == ["46", "40, rank-local", "KL", "excess loss"]
