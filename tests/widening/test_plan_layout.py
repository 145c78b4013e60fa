"""A source under a plan: what is computed, and how often."""

from __future__ import annotations

import pytest
import torch

import truedepth as td
from family_models import options_of
from truedepth.plan.plan import Plan
from truedepth.runtime.layer_stack import LayerStack
from truedepth.tensors import from_tensor
from truedepth.widening import layout as layout_module
from truedepth.widening.layout import Layout

PLAN = Plan(6, [[1, 2], [3, 4, 5]])


def test_what_is_written_is_laid_out_as_it_was_planned(make_model, tmp_path):
    for case in ("llama", "smollm3", "gemma2"):
        source = td.open_source(make_model(**options_of(case)))
        planned = Layout(source, PLAN)
        done = td.convert(source, tmp_path / case, PLAN)
        written = Layout.of(td.open_source(tmp_path / case))
        assert written.plan == PLAN
        assert written.layers == planned.layers
        assert written.executed_plan == planned.executed_plan == done.executed_plan
        assert written.all_reduces == planned.all_reduces
        assert written.shared_sublayers == planned.shared_sublayers
        assert written.kept_layers == planned.kept_layers
        assert written.tensors.keys() == planned.tensors.keys()
        assert {key: written.config[key] for key in planned.config} == planned.config


def test_groups_become_wide_layers_or_keep_their_places(make_model):
    wide = Layout(td.open_source(make_model()), PLAN)
    assert wide.layers == ((0,), (1,), (2,))
    assert wide.executed_plan == PLAN
    assert (wide.all_reduces, wide.kept_layers) == (6, {0: 0})
    assert " ".join(map(str, wide.shared_sublayers)) == "A1 F1 A2 F2"
    beside = Layout(td.open_source(make_model(**options_of("gemma2"))), PLAN)
    assert beside.layers == ((0,), (1, 2), (3, 4, 5))
    assert beside.executed_plan == Plan(6)
    assert beside.all_reduces == 12
    assert " ".join(map(str, beside.shared_sublayers)) == "A1 F1 A2 F2 A3 F3 A4 F4 A5 F5"
    assert beside.kept_layers == {index: index for index in range(6)}


def test_wide_layers_are_made_for_any_group(make_model):
    """A search scores groups that overlap, which no plan holds together."""
    layout = Layout(td.open_source(make_model()), Plan(6))
    for group in ((1, 2), (2, 3), (2, 3, 4)):
        planned = Layout(layout.source, Plan(6, [group]))
        prefix = f"model.layers.{group[0]}."
        for name, tensor in layout.wide_layer(group).items():
            assert torch.equal(tensor.read(), planned.tensors[prefix + name].read())


def test_a_calibrated_conversion_computes_its_layout_once(make_model, prose, tmp_path, monkeypatch):
    made, configs = [], []
    init, parse = Layout.__init__, layout_module.transformers_config

    def counted(self, *given):
        made.append(self)
        init(self, *given)

    monkeypatch.setattr(Layout, "__init__", counted)
    monkeypatch.setattr(
        layout_module, "transformers_config", lambda *given: configs.append(1) or parse(*given)
    )
    options = td.Calibration(text=[prose], tokens=2048, window=32)
    td.calibrate(make_model(), tmp_path / "out", PLAN, options)
    assert (len(made), len(configs)) == (1, 1)


def test_a_plan_for_another_model_is_refused(make_model):
    with pytest.raises(td.TruedepthError, match="The plan is for 8 layers, but"):
        Layout(td.open_source(make_model()), Plan(8))


def test_weights_that_do_not_fit_a_layer_are_refused(make_model):
    """A misspelt name would otherwise leave the layer as it was converted, in silence."""
    source = td.open_source(make_model())
    stack = LayerStack(source, device="cpu", dtype=torch.float32)
    tensors = Layout(source, PLAN).wide_layer((1, 2), torch.float32)
    assert stack.wide_layer((1, 2), tensors).self_attn.q_proj.out_features == 128
    misspelt = dict(tensors)
    misspelt["mlp.down_prj.weight"] = misspelt.pop("mlp.down_proj.weight")
    with pytest.raises(td.TruedepthError, match=r"'mlp\.down_pr.*' is"):
        stack.wide_layer((1, 2), misspelt)
    with pytest.raises(td.TruedepthError, match=r"'more\.weight' is unknown"):
        stack.wide_layer((1, 2), {**tensors, "more.weight": from_tensor(torch.ones(1))})
