"""Calibration of wide layers against the same written out plainly, with whole models in memory."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import truedepth as td
from tiny_models import random_ids
from truedepth.calibration.refit import Calibrator
from truedepth.calibration.trajectories import Walk
from truedepth.runtime.layer_stack import LayerStack
from truedepth.widening.layout import Layout

IDS = random_ids(batch=12, length=40)
PLAN = td.Plan(6, [[1, 2], [4, 5]])


def calibrated(model, ids=IDS, plan=PLAN, dtype=torch.float32, **options):
    """Refits by layer, and the stacks."""
    source = td.open_source(model)
    stack = LayerStack(source, device="cpu", dtype=dtype)
    walk = Walk(stack, Layout(source, plan), ids, batch_size=5, **options)
    calibrator = Calibrator(walk)
    found = {}
    for segment in walk.layout.segments:
        if walk.layout.is_merged(segment):
            found[segment] = calibrator.refit(segment)
        else:
            walk.advance(segment)
    return found


def seen_by(model, layer, module, ids):
    """What a module of a layer was given, by running the whole model."""
    found = []
    target = model.model.layers[layer].get_submodule(module)
    hook = target.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    return found[0].double()


def unit(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def ridge(x, z, prior, penalty):
    x, z, prior = x.flatten(0, 1), z.flatten(0, 1), prior.double()
    if penalty == math.inf:
        return prior
    gram = x.T @ x
    system = gram + penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return prior + torch.linalg.solve(system, x.T @ z - gram @ prior.T).T


@torch.no_grad()
def plainly(original, converted, fits):
    """The formulas of the module's docstring, one map after another, given the penalties."""
    converted = copy.deepcopy(converted)
    for index, group in enumerate(PLAN.groups):
        if len(group) == 1:
            continue
        wide = converted.model.layers[index]
        for norm, body, reads, write in [
            ("input_layernorm", "self_attn", ["q_proj", "k_proj", "v_proj"], "o_proj"),
            ("post_attention_layernorm", "mlp", ["gate_proj", "up_proj"], "down_proj"),
        ]:
            x = unit(seen_by(converted, index, norm, IDS))
            names = [f"{body}.{read}" for read in reads]
            maps = []
            for layer in group:
                z = unit(seen_by(original, layer, norm, IDS))
                penalty = fits[index].fits[f"{', '.join(names)} of layer {layer}"].penalty
                maps.append(ridge(x, z, torch.eye(64), penalty))
            for name in names:
                weight = wide.get_parameter(f"{name}.weight")
                rows = weight.double().chunk(len(group))
                weight.copy_(torch.cat([r @ m for r, m in zip(rows, maps, strict=True)]))
            name = f"{body}.{write}"
            features = seen_by(converted, index, name, IDS)
            if body == "self_attn":
                target = sum(
                    seen_by(original, layer, "post_attention_layernorm", IDS)
                    - seen_by(original, layer, "input_layernorm", IDS)
                    for layer in group
                )
                target += seen_by(original, group[0], "input_layernorm", IDS)
                target -= seen_by(converted, index, "input_layernorm", IDS)
            else:
                after = (
                    seen_by(original, group[-1] + 1, "input_layernorm", IDS)
                    if group[-1] < 5
                    else last_state(original)
                )
                target = after - seen_by(converted, index, "post_attention_layernorm", IDS)
            weight = wide.get_parameter(f"{name}.weight")
            weight.copy_(ridge(features, target, weight, fits[index].fits[name].penalty))
    return converted


def last_state(model):
    found = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(IDS, use_cache=False)
    hook.remove()
    return found[0].double()


def test_refits_are_the_formulas(make_model, tmp_path):
    found = calibrated(make_model())
    assert list(found) == [1, 3]
    td.convert(make_model(), tmp_path / "out", PLAN)
    original, converted = td.load(make_model()).model, td.load(tmp_path / "out").model
    expected = plainly(original, converted, found)
    changed = 0
    for index, refit in found.items():
        for name, weight in refit.weights.items():
            plain = expected.model.layers[index].get_parameter(name)
            torch.testing.assert_close(weight, plain, atol=2e-4, rtol=1e-3)
            before = converted.model.layers[index].get_parameter(name)
            changed += not torch.equal(before, plain)
    assert changed >= 10


def test_where_the_states_are_kept_changes_nothing(make_model, tmp_path):
    kept = calibrated(make_model(attention_bias=True, mlp_bias=True))
    mapped = calibrated(make_model(attention_bias=True, mlp_bias=True), workspace=tmp_path)
    for index, refit in kept.items():
        for name, weight in refit.weights.items():
            assert torch.equal(weight, mapped[index].weights[name])
    assert not list(tmp_path.iterdir())


def test_layers_that_do_not_interact_stay_as_they_are(make_model, tmp_path):
    """The first layer of each group writes nothing, the second's attention neither."""
    loaded = td.load(make_model())
    with torch.no_grad():
        for first, second in ((1, 2), (4, 5)):
            layers = loaded.model.model.layers
            for module in (
                layers[first].self_attn.o_proj,
                layers[first].mlp.down_proj,
                layers[second].self_attn.o_proj,
            ):
                module.weight.zero_()
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    source = td.open_source(tmp_path / "model")
    raw = Layout(source, PLAN, torch.float32).tensors
    for index, refit in calibrated(tmp_path / "model").items():
        for name, weight in refit.weights.items():
            before = raw[f"model.layers.{index}.{name}"].read()
            torch.testing.assert_close(weight, before, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_held_out_errors_shrink(make_model, dtype):
    for refit in calibrated(make_model(), dtype=dtype).values():
        for name, fit in refit.fits.items():
            assert fit.after <= fit.before, name
        assert any(fit.after < 0.9 * fit.before for fit in refit.fits.values())


def test_advancing_with_kept_weights_is_refitting(make_model):
    """What a resumed run does."""
    whole = calibrated(make_model())
    source = td.open_source(make_model())
    stack = LayerStack(source, device="cpu", dtype=torch.float32)
    walk = Walk(stack, Layout(source, PLAN), IDS, batch_size=5)
    walk.advance((0,))
    walk.advance((1, 2), whole[1].weights)
    walk.advance((3,))
    again = Calibrator(walk).refit((4, 5))
    for name, weight in again.weights.items():
        assert torch.equal(weight, whole[3].weights[name])
