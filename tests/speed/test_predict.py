"""Predicted times. What is timed here is only looked at for its form; sums are held exactly."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import truedepth as td
from truedepth.runtime.empty import empty_model
from truedepth.speed import layer_timing, prediction
from truedepth.speed.layer_timing import LayerTimes, layer_times, rank_config, unpaired_config
from truedepth.speed.links import LINKS, parse_link
from truedepth.speed.timing import Case, Collectives, Task

PLAN = td.Plan(6, [[1, 2], [3, 4]])
TIMES = LayerTimes(layers={1: 5.0, 2: 8.0}, weights=3.0, rest=7.0, all_reduce=0.5, bandwidth=1.0)


@pytest.fixture
def timed(monkeypatch):
    """The arguments of what would be timed."""
    seen = []
    monkeypatch.setattr(prediction, "layer_times", lambda *given, **_: seen.append(given) or TIMES)
    return seen


def test_sums_of_layers_on_one_rank(make_model, timed):
    found = td.predict(make_model(), PLAN, device="cpu", length=9, batch=2)
    assert (found.before.weights, found.before.layers, found.before.all_reduces) == (18, 12, 0)
    assert (found.after.weights, found.after.layers, found.after.all_reduces) == (18, 8, 0)
    assert found.speedup == pytest.approx((30 + 7) / (26 + 7))
    config, _, widths, case, *_, ranks = timed[0]
    assert config["num_attention_heads"] == 4
    assert widths == [1, 2]
    assert case == Case(Task.decode, 9, 2)
    assert ranks == 1


def test_sums_of_stages(make_model, monkeypatch, tmp_path):
    """Each sub-layer that runs in the stage of another costs `shared` more, and no all-reduce."""
    asked = []
    times = replace(TIMES, shared=-0.25)
    monkeypatch.setattr(prediction, "layer_times", lambda *_, **more: asked.append(more) or times)
    plan = td.Plan(6, [[0, 1]], stages=[["F2", "A3", "F3"], ["A5", "F5"]])
    found = td.predict(make_model(), plan, ranks=2, device="cpu")
    assert found.before.weights + found.before.layers == 6 * 5
    assert found.after.weights + found.after.layers == 8 + 4 * 5 - 3 * 0.25
    assert found.before.all_reduces == 12 * 0.5
    assert found.after.all_reduces == (12 - 2 - 3) * 0.5
    td.convert(make_model(), tmp_path / "out", plan)
    assert td.predict(tmp_path / "out", ranks=2, device="cpu").after == found.after
    td.predict(make_model(), PLAN, ranks=2, device="cpu")
    td.predict(make_model(), PLAN, ranks=2, fuse=True, device="cpu")
    merged = [(each["staggered"], each["fused"]) for each in asked]
    assert merged == [(True, False), (True, False), (False, False), (False, True)]


def test_all_reduces_measured_between_ranks(make_model, timed):
    found = td.predict(make_model(), PLAN, ranks=2, device="cpu")
    assert found.before.all_reduces == 2 * 6 * 0.5
    assert found.after.all_reduces == 2 * 4 * 0.5
    config, *_, ranks = timed[0]
    assert ranks == 2
    assert config["num_attention_heads"] == 4  # transformers shards it


def test_all_reduces_of_a_link(make_model, timed):
    link = parse_link("30,0.5")
    found = td.predict(make_model(), PLAN, ranks=2, link=link, device="cpu", dtype=torch.float32)
    size = 64 * 4
    assert found.before.all_reduces == pytest.approx(12 * (30e-6 + size / 0.5e9))
    head = 320 * 4
    more = 30e-6 + size / 0.5e9 + (30e-6 + head / 0.5e9) / 2
    assert found.before.rest == found.after.rest == pytest.approx(7 + more)
    config, *_, ranks = timed[0]
    assert ranks == 1
    assert config["num_attention_heads"] == 2  # one rank's share


def test_prefill_sends_the_states_of_all_tokens(make_model, timed, capsys):
    """An all-reduce of a ring over 3 ranks sends 4/3 of its bytes; the head has one token's."""
    from truedepth.report.speed import print_prediction

    given = {"ranks": 3, "link": parse_link("30,0.5"), "dtype": torch.float32, "device": "cpu"}
    path = make_model(hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    found = td.predict(path, PLAN, task="prefill", length=1000, batch=2, **given)
    assert timed[0][3] == Case(Task.prefill, 1000, 2)
    assert found.message == 2 * 1000 * 48 * 4
    each = 30e-6 + found.message * 4 / 3 / 0.5e9
    head = 30e-6 + 2 * 320 * 4 * 4 / 3 / 0.5e9
    assert found.before.all_reduces == pytest.approx(12 * each)
    assert found.after.all_reduces == pytest.approx(8 * each)
    assert found.after.rest == pytest.approx(7 + each + head / 2)
    print_prediction(found)
    said = " ".join(capsys.readouterr().out.split())
    assert "prompts of 1,000 tokens" in said
    assert "all-reduce 384,000 bytes" in said
    assert "Time per pass over the prompts in ms" in said
    one = td.predict(path, PLAN, length=1000, **given)
    assert one.message == 48 * 4
    with pytest.raises(td.TruedepthError, match="task must be decode or prefill, not generate"):
        td.predict(path, PLAN, task="generate")


def test_a_converted_model_is_compared_with_what_it_was_made_from(make_model, tmp_path, timed):
    td.convert(make_model(), tmp_path / "out", PLAN)
    ours = td.predict(tmp_path / "out", device="cpu", dtype=torch.float32)
    theirs = td.predict(make_model(), PLAN, device="cpu", dtype=torch.float32)
    assert (ours.plan.groups, ours.after) == (theirs.plan.groups, theirs.after)
    (config, _, *rest), (same, _, *others) = timed
    assert rest == others
    of_layers = ("num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_widths")
    assert [config[name] for name in of_layers] == [same[name] for name in of_layers]
    assert td.predict(tmp_path / "out", depth=3, device="cpu").plan.effective_depth == 3


def test_what_does_not_pay_is_called_so(make_model, timed, monkeypatch, capsys):
    from truedepth.report.speed import print_prediction

    found = td.predict(make_model(), PLAN, device="cpu")
    assert found.pays
    print_prediction(found)
    assert "not pay" not in capsys.readouterr().out
    same = LayerTimes(layers={1: 5.0, 2: 10.0}, weights=4.9, rest=1.0, all_reduce=0, bandwidth=1)
    monkeypatch.setattr(prediction, "layer_times", lambda *given, **_: same)
    found = td.predict(make_model(), PLAN, device="cpu")
    assert not found.pays
    print_prediction(found)
    assert "95% of the time is reading layer weights" in " ".join(capsys.readouterr().out.split())


def test_a_share_has_one_rank_s_parameters(make_model):
    path = make_model(hidden_size=48, num_attention_heads=3, num_key_value_heads=1)
    config = json.loads((path / "config.json").read_text())
    own = rank_config(unpaired_config(config, 2), 2) | {
        "num_hidden_layers": 2,
        "layer_widths": [1, 2],
    }
    layers = empty_model(own, path).model.layers
    narrow, wide = (
        {name: tuple(p.shape) for name, p in layer.named_parameters()} for layer in layers
    )
    ffn = config["intermediate_size"] // 2
    assert narrow["self_attn.q_proj.weight"] == (3 * 16, 48)  # 6 heads of 2 KV heads, halved
    assert narrow["self_attn.k_proj.weight"] == (1 * 16, 48)
    assert narrow["mlp.down_proj.weight"] == (48, ffn)
    assert wide["self_attn.o_proj.weight"] == (48, 2 * 3 * 16)
    assert wide["mlp.up_proj.weight"] == (2 * ffn, 48)


@pytest.mark.parametrize(("ranks", "fused"), [(1, False), (1, True), (2, True)])
def test_layers_are_timed(make_model, ranks, fused):
    path = make_model()
    config = unpaired_config(json.loads((path / "config.json").read_text()), ranks)
    case = Case(Task.decode, 4)
    found = layer_times(
        config,
        path,
        [1, 2],
        case,
        "cpu",
        torch.float32,
        ranks,
        1 << 16,
        staggered=True,
        fused=fused,
    )
    assert found.layers.keys() == {1, 2}
    assert found.shared != 0
    assert found.bandwidth > 0
    assert found.weights > 0
    assert (found.all_reduce > 0) == (ranks == 2)


def test_layers_are_timed_at_prompts(make_model):
    path, case = make_model(), Case(Task.prefill, 8, 2)
    config = unpaired_config(json.loads((path / "config.json").read_text()), 1)
    found = layer_times(config, path, [1], case, "cpu", torch.float32, staggered=True)
    assert found.layers.keys() == {1}
    assert found.weights > 0


def test_times_of_layers_are_differences_of_stacks(make_model, monkeypatch):
    """A layer of width w takes 2w + 1, its all-reduces 0.5 each, all else 4, all-gather 0.5.

    A shared stage takes 0.25 less than its sub-layers alone, and saves an all-reduce.
    """

    class TimedStack:
        def __init__(self, model):
            self.widths = model.config.layer_widths
            self.stages = model.config.stages or []
            assert all(stage == [f"F{k}", f"A{k + 1}"] for k, stage in enumerate(self.stages))
            assert len(self.stages) in (0, len(self.widths) - 1)

        def seconds(self, case):
            whole = 4 + 0.5 + sum(2 * width + 1 + 2 * 0.5 for width in self.widths)
            return whole - len(self.stages) * (0.25 + 0.5)

        def collectives(self, case):
            calls = {"all_reduce": 2 * len(self.widths), "all_gather": 1}
            spent = 0.5 * sum(calls.values())
            return Collectives(calls, 1, spent, spent / self.seconds(case))

    monkeypatch.setattr(layer_timing, "TimedTransformersModel", TimedStack)
    path, case = make_model(), Case(Task.decode, 4)
    config = unpaired_config(json.loads((path / "config.json").read_text()), 1)
    found = layer_times(config, path, [1, 2, 3], case, "cpu", torch.float32, staggered=True)
    assert found.layers == {1: pytest.approx(3), 2: pytest.approx(5), 3: pytest.approx(7)}
    assert found.shared == pytest.approx(-0.25)
    assert found.all_reduce == pytest.approx(0.5)
    assert found.rest == pytest.approx(4.5)


def test_links():
    nvlink = LINKS["nvlink"]
    assert nvlink.all_reduce(8192, 2) == pytest.approx(6.6e-6 + 2 * (0.6e-6 + 4096 / 450e9))
    measured = ["nvlink-custom", "nvlink-nccl", "pcie-oneshot"]
    measured += ["pcie-switch", "pcie-nccl", "pcie-host"]
    order = ["nvlink", "pcie5", "pcie4", "infiniband", "40gbe", "10gbe"]
    times = [LINKS[name].all_reduce(1 << 16, 4) for name in order]
    assert times == sorted(times)
    assert {*order, *measured} == set(LINKS)
    assert all(link.source for link in LINKS.values())
    assert LINKS["10gbe"].all_reduce(8, 4) == pytest.approx(263e-6, rel=0.01)  # what gloo measured


@pytest.mark.parametrize(
    ("name", "size", "ranks", "seconds"),
    [
        ("nvlink-custom", 4096, 2, 3.9e-6),
        ("nvlink-custom", 1 << 20, 8, 33.8e-6),
        ("nvlink-nccl", 1024, 8, 19e-6),
        ("nvlink-nccl", 16 << 20, 8, 135.7e-6),
        ("pcie-oneshot", 8 << 10, 4, 5.0e-6),
        ("pcie-oneshot", 128 << 10, 4, 44.5e-6),
        ("pcie-switch", 8 << 10, 4, 20.3e-6),
        ("pcie-switch", 384 << 10, 4, 83.5e-6),
        ("pcie-nccl", 4096, 8, 45e-6),
        ("pcie-nccl", 65536, 8, 344e-6),
        ("pcie-host", 10 << 10, 2, 39e-6),
        ("pcie-host", 20 << 20, 2, 10.9e-3),
    ],
)
def test_links_take_what_was_measured(name, size, ranks, seconds):
    """Figures of the threads that are cited."""
    assert LINKS[name].all_reduce(size, ranks) == pytest.approx(seconds, rel=0.15)


@pytest.mark.parametrize("text", ["usb", "30", "-1,5", "5,0", "a,b"])
def test_links_that_are_none(text):
    with pytest.raises(
        td.TruedepthError, match=r"A link is one of nvlink-custom, .* such as 30,12.5"
    ):
        parse_link(text)


def test_errors(make_model):
    with pytest.raises(td.TruedepthError, match="not converted yet, so it has no plan"):
        td.predict(make_model())
    with pytest.raises(td.TruedepthError, match=r"plan is for 7 layers; .* has 6"):
        td.predict(make_model(), td.Plan(7))


def test_local_stages_save_all_reduces_and_no_kernels(make_model, monkeypatch):
    times = replace(TIMES, shared=-0.25)
    monkeypatch.setattr(prediction, "layer_times", lambda *_, **__: times)
    plans = [td.Plan.staggered(6, 1, 4, ranks=ranks) for ranks in (None, 2)]
    merged, local = (td.predict(make_model(), plan, ranks=2, device="cpu") for plan in plans)
    assert merged.after.all_reduces == local.after.all_reduces == 9 * 0.5
    assert local.after.layers == local.before.layers == merged.after.layers + 3 * 0.25
    with pytest.raises(td.TruedepthError, match=r"local to 2 tensor-parallel ranks; give --tp 2"):
        td.predict(make_model(), plans[1], ranks=4, device="cpu")


def test_so_many_all_reduces(make_model, monkeypatch):
    monkeypatch.setattr(prediction, "layer_times", lambda *_, **more: TIMES)
    found = td.predict(make_model(), all_reduces=9, device="cpu")
    assert found.plan == td.Plan.staggered(6, 2, 5)
    assert found.plan.all_reduces == 9
    assert td.predict(make_model(), all_reduces=12, device="cpu").plan == td.Plan(6)
    for number in (6, 13):
        with pytest.raises(td.TruedepthError, match=f"have 7 to 12 all-reduces, not {number}"):
            td.predict(make_model(), all_reduces=number, device="cpu")
    with pytest.raises(td.TruedepthError, match="one of plan, depth and all_reduces"):
        td.predict(make_model(), depth=5, all_reduces=9, device="cpu")
