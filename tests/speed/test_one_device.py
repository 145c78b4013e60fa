"""The benchmark of one device: what it simulates, and its one call, rehearsed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import one_device
from stages import plans

GPU = Path(one_device.__file__).with_name("gpu.sh")
SHAPE = one_device.SHAPES["tiny"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("name", "plan"), plans(6, [10, 6]).items())
def test_a_spin_for_every_all_reduce(name, plan, fused):
    one_device.register()
    model = one_device.build(SHAPE, plan, fused, "cpu", ranks=2)
    assert model.config.num_attention_heads == 2
    assert model.config.intermediate_size == 48
    spins = []
    one_device.spin_between(model, plan, spins.append, 5e-6)
    model(torch.zeros(1, 3, dtype=torch.long))
    assert spins == [5e-6] * (plan.all_reduces + 1)


def test_a_spin_lasts(monkeypatch):
    now = iter([10.0, 10.1, 10.2, 10.3])
    monkeypatch.setattr(one_device.time, "perf_counter", lambda: next(now))
    one_device.Spin("cpu")(0.25)
    assert next(now, None) is None


def test_the_one_call_is_rehearsed(tmp_path):
    words = os.environ | {"TINY": "1", "PYTHON": sys.executable}
    found = subprocess.run([GPU, tmp_path], capture_output=True, text=True, env=words)
    assert found.returncode == 0, found.stderr
    rows = json.loads((tmp_path / "one_device.json").read_text())
    forms = [f"tiny, {form}, {n} of 12" for n in (10, 8, 6) for form in ("pairs", "staggered")]
    assert [*rows] == ["setup", *(each for form in forms for each in (form, f"{form}, 2 ranks"))]
    for form in forms:
        assert len(rows[form]) == 4
        delays = rows[f"{form}, 2 ranks"]
        assert [*delays] == ["5 µs", "16 µs", "40 µs"]
        left = int(form.split()[2])
        assert all(each["all_reduces"] == [13, left + 1] for each in delays.values())
