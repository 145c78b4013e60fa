"""The sum x + Σ s(N_s x), in runtime/stage.py and in the code that travels with checkpoints."""

from __future__ import annotations

import pytest
import torch

import truedepth as td
from family_models import CASES, options_of
from tiny_models import random_ids
from truedepth.modeling import LayerForm
from truedepth.runtime.calls import record
from truedepth.runtime.stage import run_stage, stages_of
from truedepth.widening.layout import Layout

GROUPS = [[0], [1, 2, 3], [4, 5]]
SIDE_BY_SIDE = [case for case, options in CASES.items() if options.get("side_by_side")]


def test_a_stage_adds_what_its_members_give_for_one_state():
    x = torch.randn(2, 3, 4)
    seen = []

    def member(factor):
        def run(state, calls):
            seen.append((state, calls))
            return factor * state

        return run

    y = run_stage(x, [member(2.0), member(3.0)], "calls")
    assert torch.equal(y, x + 2.0 * x + 3.0 * x)
    assert all(state is x and calls == "calls" for state, calls in seen)
    assert run_stage(x, [], ()) is x


@pytest.mark.parametrize("case", ["llama", "cohere", *SIDE_BY_SIDE])
@torch.no_grad()
def test_modeling_and_run_stage_are_the_same_sum(make_model, case, tmp_path):
    """Layer after layer of a checkpoint by its own forward, and stage after stage here."""
    source = make_model(**options_of(case))
    td.convert(source, tmp_path / "out", td.Plan(6, GROUPS))
    loaded, original = td.load(tmp_path / "out").model, td.load(source)
    ids, family = random_ids(batch=2), original.source.family
    states = {}
    layers = loaded.base_model.layers
    hooks = [
        layer.register_forward_hook(lambda _, __, output, at=at: states.update({at: output}))
        for at, layer in enumerate(layers)
    ]
    loaded(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    x, calls = record(original.model, family, ids)
    form = LayerForm(**family.layer_form(original.model.config))
    layout = Layout.of(td.open_source(tmp_path / "out"))
    for group, at in zip(layout.plan.groups, layout.layers, strict=True):
        members = [layers[index] for index in at]
        for stage in stages_of(dict(zip(group, members, strict=False)), form):
            x = run_stage(x, stage, calls)
        torch.testing.assert_close(x, states[at[-1]], atol=1e-5, rtol=1e-5)


def test_layers_are_two_stages_where_the_ffn_reads_what_the_attention_wrote():
    layers = {1: torch.nn.Identity(), 2: torch.nn.Identity()}
    names = {"attention": ["a", None, None], "ffn": ["f", None, None], "multiplier": None}
    stages = stages_of(layers, LayerForm(**names, parallel=False))
    assert [[(s.kind, s.index) for s in stage] for stage in stages] == [
        [("attention", 1), ("attention", 2)],
        [("ffn", 1), ("ffn", 2)],
    ]
    (stage,) = stages_of(layers, LayerForm(**names, parallel=True))
    assert [s.kind for s in stage] == ["attention", "attention", "ffn", "ffn"]


def test_an_attention_takes_the_call_of_its_own_layer_and_an_ffn_none():
    class Told(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
            self.said = None

        def forward(self, x, **call):
            self.said = call
            return x

    layers = {index: torch.nn.ModuleDict({"a": Told(), "f": Told()}) for index in (2, 4)}
    names = {"attention": ["a", None, None], "ffn": ["f", None, None], "multiplier": None}
    calls = [{"mask": index} for index in range(6)]
    x = torch.ones(1, 1, 1)
    for stage in stages_of(layers, LayerForm(**names, parallel=False)):
        x = run_stage(x, stage, calls)
    assert {index: layer["a"].said for index, layer in layers.items()} == {
        2: {"mask": 2},
        4: {"mask": 4},
    }
    assert all(layer["f"].said == {} for layer in layers.values())
    assert x.item() == 9  # 1 + 1 + 1, and that with itself twice
