"""Schedules against models that are rebuilt layer by layer, the naive way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import MistralConfig

import truedepth as td
from tiny_models import random_ids, reference_logits
from truedepth.depth_study.schedule import BATCH_WINDOWS, Runner, Step, in_order
from truedepth.depth_study.transformations import Cell

IDS = random_ids(batch=3, length=21)


@pytest.fixture(scope="module")
def loaded(make_model):
    return td.load(make_model(attention_bias=True))


@pytest.fixture
def runner(loaded):
    return Runner(loaded, IDS)


def nll_of(logits, ids=IDS):
    losses = cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten(), reduction="none"
    )
    return losses.view(len(ids), -1).mean(1)


@torch.no_grad()
def rebuilt(loaded, layers, ids=IDS):
    """The NLL of a model that has these layers, in this order, as its own."""
    model = copy.deepcopy(loaded.model)
    model.model.layers = torch.nn.ModuleList(copy.deepcopy(layer) for layer in layers)
    model.config.num_hidden_layers = len(layers)
    return nll_of(model(ids, use_cache=False).logits, ids)


def run_one(runner, schedule):
    ((_, nll),) = runner.run([schedule])
    return nll


def test_the_original_order_is_the_model_bit_for_bit(loaded, runner):
    states = runner.inputs()
    hidden = loaded.model(IDS, output_hidden_states=True).hidden_states
    for ours, theirs in zip(states[:-1], hidden, strict=False):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(
        run_one(runner, in_order(range(6))), nll_of(loaded.model(IDS).logits), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("order", [[0, 3, 1, 2, 4, 5], [0, 5], [2], [], [0, 0, 1]])
def test_orders_shuffled_pruned_and_repeated(loaded, runner, order):
    layers = loaded.model.model.layers
    expected = rebuilt(loaded, [layers[index] for index in order])
    torch.testing.assert_close(run_one(runner, in_order(order)), expected, atol=1e-5, rtol=0)


def test_merging_is_the_layer_of_mean_weights(loaded, runner):
    layers = list(loaded.model.model.layers)
    mean = copy.deepcopy(layers[1])
    for name, parameter in mean.named_parameters():
        parameter.data = sum(layer.get_parameter(name) for layer in layers[1:4]) / 3
    schedule = (*in_order([0]), Step((1, 2, 3), "merge"), *in_order([4, 5]))
    expected = rebuilt(loaded, [layers[0], mean, *layers[4:]])
    torch.testing.assert_close(run_one(runner, schedule), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("groups", [[[0], [1, 2], [3, 4], [5]], [[0, 1, 2], [3, 4, 5]]])
def test_lp_groups_are_the_papers_formula(make_model, loaded, runner, groups):
    expected = nll_of(reference_logits(loaded.model, IDS, groups))
    schedule = tuple(Step(tuple(group)) for group in groups)
    torch.testing.assert_close(run_one(runner, schedule), expected, atol=1e-5, rtol=0)


def test_lp_groups_are_what_conversion_writes(make_model, runner, tmp_path):
    groups = [[0], [1, 2, 3], [4, 5]]
    td.convert(make_model(attention_bias=True), tmp_path / "out", td.Plan(6, groups))
    expected = nll_of(td.load(tmp_path / "out").model(IDS).logits)
    schedule = tuple(Step(tuple(group)) for group in groups)
    torch.testing.assert_close(run_one(runner, schedule), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_par_groups_add_what_every_layer_would_add_alone(loaded, runner):
    states = runner.inputs()
    added = [rebuilt_update(loaded, layer, states[1]) for layer in (1, 2, 3)]
    x = states[1] + sum(added)
    for layer in (4, 5):
        x = x + rebuilt_update(loaded, layer, x)
    expected = nll_of(loaded.model.lm_head(loaded.model.model.norm(x)))
    schedule = (*in_order([0]), Step((1, 2, 3), "par"), *in_order([4, 5]))
    torch.testing.assert_close(run_one(runner, schedule), expected, atol=1e-5, rtol=0)


def rebuilt_update(loaded, index, x):
    """What a layer adds to a state, by calling the layer itself."""
    body, layer = loaded.model.model, loaded.model.model.layers[index]
    rotary = body.rotary_emb(x, position_ids=torch.arange(x.shape[1])[None])
    return layer(x, position_embeddings=rotary) - x


@torch.no_grad()
def test_updates(loaded, runner):
    x = runner.inputs()[3]
    torch.testing.assert_close(runner.update(2, x), rebuilt_update(loaded, 2, x), atol=1e-5, rtol=0)


def schedules_of_all_kinds():
    cells = [
        Cell(kind, start, end)
        for kind in ("shuffle", "prune", "merge", "parallel", "parallel (PAR)", "2-parallel")
        for start in range(6)
        for end in range(start + 1, 7)
    ]
    return [cell.schedule(6, seed=0) for cell in cells]


def test_shared_beginnings_change_no_bit(loaded, runner):
    schedules = schedules_of_all_kinds()
    together = dict(runner.run(schedules))
    assert set(together) == set(schedules)
    alone = Runner(loaded, IDS)
    for schedule in set(schedules):
        assert torch.equal(together[schedule], run_one(alone, schedule))
    assert runner.evaluated < 0.6 * alone.evaluated


def test_a_change_at_a_layer_costs_the_layers_from_there_on(loaded, runner):
    original = in_order(range(6))
    list(runner.run([original]))
    assert runner.evaluated == 6
    list(runner.run([original, (*in_order(range(4)), Step((4, 5)))]))
    assert runner.evaluated == 6 + 6 + 1.5  # layer 4's attention is there already
    list(runner.run([original, original]))
    assert runner.evaluated == 6 + 7.5 + 6


def test_the_weights_are_not_touched(loaded, runner):
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    list(runner.run(schedules_of_all_kinds()))
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.data_ptr() == loaded.model.get_parameter(name).data_ptr()


def test_steps_of_one_layer_are_the_same_in_every_form():
    assert Step((3,), "par") == Step((3,), "merge") == Step((3,))
    assert str(Step((3, 4), "par")) == "3+4:par"


def test_windows_run_in_batches_as_they_do_alone(make_model):
    """More windows than a layer computes at once, the last batch not full; masks by window."""
    loaded = td.load(make_model(family=MistralConfig, sliding_window=5))
    ids = random_ids(batch=2 * BATCH_WINDOWS + 1, length=13)
    schedules = schedules_of_all_kinds()
    together = dict(Runner(loaded, ids).run(schedules))
    for index in (0, BATCH_WINDOWS, len(ids) - 1):
        alone = dict(Runner(loaded, ids[index : index + 1]).run(schedules))
        for schedule, nll in alone.items():
            torch.testing.assert_close(together[schedule][index], nll[0], atol=1e-5, rtol=0)
