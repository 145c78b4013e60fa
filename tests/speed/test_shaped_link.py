"""The benchmark of shaped links: what it asks of the system, and what it expects of plans."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shaped_link
import truedepth as td
from shaped_links import ADDRESSES, DEVICE, NotAllowedError, Shape, commands, shaped
from truedepth.speed.timing import Case, Task

SCRIPT = Path(shaped_link.__file__)
BETWEEN = ("one", "other")


def test_links_are_read():
    assert Shape.parse("10gbit") == Shape("10gbit", 10e9, 0.0)
    assert Shape.parse("500us").delay == pytest.approx(500e-6)
    assert Shape.parse("500us").rate is None
    both = Shape.parse("2.5mbit+1ms")
    assert (both.rate, both.delay) == (2.5e6, 1e-3)
    for text in ("", "10", "10gbit,500us", "0us", "-1us", "10 gbit"):
        with pytest.raises(td.TruedepthError, match="such as 10gbit, 500us or 1gbit"):
            Shape.parse(text)


def test_a_rate_is_a_token_bucket_on_both_ends():
    found = commands(Shape.parse("10gbit"), BETWEEN, netem=False, relayed=False)
    assert found[0] == f"ip link add {DEVICE} netns one type veth peer name {DEVICE} netns other"
    buckets = [line for line in found if line.startswith("tc")]
    tail = f"qdisc add dev {DEVICE} root tbf rate 10000000000bit burst 100000 limit 8388608"
    assert buckets == [f"tc -n {name} {tail}" for name in BETWEEN]  # 80 µs of 1.25 GB/s
    for name, address in zip(BETWEEN, ADDRESSES, strict=True):
        assert f"ip -n {name} addr add {address}/30 dev {DEVICE}" in found


def test_a_delay_is_netem_s_or_a_relay_s():
    shape = Shape.parse("500us")
    queues = [line for line in commands(shape, BETWEEN, netem=True, relayed=False) if "tc" in line]
    tail = f"qdisc add dev {DEVICE} root netem delay 500us limit 100000"
    assert [line for line in queues if line.startswith("tc")] == [
        f"tc -n {name} {tail}" for name in BETWEEN
    ]
    relayed = commands(shape, BETWEEN, netem=False, relayed=True)
    assert not any(line.startswith(("tc", "ip link add")) for line in relayed)
    assert Shape.parse("1gbit+100us").queue(netem=True)[-2:] == ["rate", "1000000000bit"]
    assert Shape.parse("1gbit+100us").queue(netem=False)[0] == "tbf"


def test_plans_have_as_many_all_reduces_as_they_say():
    found = shaped_link.plans(6, [9, 7, 6])
    assert found["original"] == td.Plan(6)
    assert found["9"] == td.Plan.staggered(6, 2, 5)
    assert found["7"] == td.Plan.staggered(6, 0, 5)
    assert found["6"].merged[-1] == td.Plan(6, stages=[["F4", "A5", "F5"]]).merged[0]
    assert [plan.all_reduces for plan in found.values()] == [12, 9, 7, 6]
    for number in (5, 13):
        with pytest.raises(td.TruedepthError, match=f"6 layers have 6 to 12 .* not {number}"):
            shaped_link.plans(6, [number])


def test_cases_are_read():
    assert shaped_link.cases_of("decode:128,prefill:4") == [
        Case(Task.decode, 128),
        Case(Task.prefill, 4),
    ]
    for text in ("decode", "generate:4", "prefill:x"):
        with pytest.raises(td.TruedepthError, match="A case is such as"):
            shaped_link.cases_of(text)


def test_collectives_that_a_plan_implies():
    plan, case = td.Plan(6, stages=[["F0", "A1"]]), Case(Task.prefill, 10)
    config = {"hidden_size": 64, "vocab_size": 320}
    found = shaped_link.expected(plan, config, case, torch.bfloat16)
    assert found == ({"all_reduce": 11 + 1, "all_gather": 1}, 12 * 10 * 64 * 2 + 160 * 2)
    one = shaped_link.expected(plan, config, Case(Task.decode, 10), torch.float32)
    assert one == ({"all_reduce": 12, "all_gather": 1}, 12 * 64 * 4 + 160 * 4)


def test_a_link_from_two_all_reduces():
    """Over two ranks a ring sends each byte once in each direction: L + S / B seconds."""
    small, large = shaped_link.SMALL, shaped_link.LARGE
    link = shaped_link.as_link("1gbit", {small: 1e-3 + small / 1e8, large: 1e-3 + large / 1e8})
    assert link.all_reduce(576, 2) == pytest.approx(1e-3 + 576 / 1e8)


def test_where_namespaces_are_not_allowed_it_says_so(make_model, tmp_path):
    words = [sys.executable, SCRIPT, "--json", tmp_path / "x.json", "--model", make_model()]
    words += ["--all-reduces", "9"]
    alone = os.environ | {"PATH": "/nowhere"}
    found = subprocess.run(words, capture_output=True, text=True, env=alone)
    assert (found.returncode, found.stdout) == (
        0,
        "Skipped: There are no commands ip and tc here (iproute2).\n",
    )


@pytest.mark.slow  # several models over two ranks, twice
def test_models_over_shaped_links(make_model, tmp_path):
    try:
        with shaped(Shape.parse("1gbit")):
            pass
    except NotAllowedError as error:
        pytest.skip(str(error))
    path = tmp_path / "found.json"
    words = [sys.executable, SCRIPT, "--json", path, "--model", make_model()]
    words += ["--links", "100mbit,300us", "--cases", "decode:4,prefill:8"]
    words += ["--all-reduces", "9,6", "--repetitions", "2"]
    found = subprocess.run(words, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    rows = json.loads(path.read_text())
    assert rows["300us"]["round_trip"]["1%"] > 2 * 300e-6
    assert rows["100mbit"]["bits_per_second"] < 110e6
    assert len(rows["results"]) == 4
    for models in rows["results"].values():
        calls = {name: each["calls"] for name, each in models.items()}
        for name, all_reduces in (("original", 12), ("9", 9), ("6", 6)):
            assert calls[name] == calls[f"{name}, fused"] == all_reduces + 2
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
    assert "truedepth" not in left
