"""The layers that a student and its original share are computed once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaMLP

import truedepth as td
from family_models import CASES, options_of
from tiny_models import random_ids
from truedepth.healing.distillation import Distillation
from truedepth.healing.front import front_of, share_front
from truedepth.healing.options import Objective, Train
from truedepth.healing.student import (
    is_trained,
    original_beside,
    recompute_activations,
    student_of,
)
from truedepth.healing.teacher import Original
from truedepth.widening.layout import Layout

LATE = td.Plan(6, stages=[["F2", "A3"], ["F3", "A4"]])
PLANS = {"late stages": (LATE, 2), "a pair": (td.Plan(6, [[3, 4]]), 3), "early": (None, 0)}


@pytest.fixture(scope="module")
def late(make_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("front") / "late"
    td.convert(make_model(), out, LATE)
    return out


class Models:
    """A student and its original."""

    def __init__(self, checkpoint, model, train=Train.paired):
        source, original = td.open_source(checkpoint), td.open_source(model)
        self.layout, self.family = Layout.of(source), original.family
        trained = is_trained(self.family, self.layout, train)
        self.student = student_of(source, trained, torch.float32)
        self.original = original_beside(self.student, original, self.layout, torch.float32)

    @property
    def front(self):
        return front_of(self.student, self.original, self.family, self.layout)

    def share(self):
        share_front(self.student, self.original, self.family, self.layout)

    def loss_and_gradients(self, **objective):
        teacher = Original(self.original)
        joined = Distillation(
            self.student, teacher, teacher, self.layout, Objective(**objective), seed=3
        )
        loss = joined(random_ids(), torch.arange(2))
        loss.backward()
        return loss, {name: p.grad for name, p in self.student.named_parameters()}


@pytest.mark.parametrize("plan", PLANS)
def test_the_front_ends_where_the_plan_begins(make_model, tmp_path, plan):
    made, expected = PLANS[plan]
    td.convert(make_model(), tmp_path / "out", made or td.Plan(6, stages=[["F0", "A1"]]))
    assert Models(tmp_path / "out", make_model()).front == expected


def test_the_front_has_no_tensor_that_is_trained_or_another(make_model, late):
    assert Models(late, make_model(), Train.all).front == 0
    for layer, name in ((1, "layers.1.mlp.up_proj"), (0, "layers.0.input_layernorm")):
        models = Models(late, make_model())
        module = models.original.model.get_submodule(name)
        module.weight = torch.nn.Parameter(module.weight.clone())
        assert models.front == layer
    models = Models(late, make_model())
    models.original.model.embed_tokens.weight = torch.nn.Parameter(
        models.original.model.embed_tokens.weight.clone()
    )
    assert models.front == 0


@pytest.mark.parametrize(
    "objective", [{}, {"hidden": 1.0}, {"on_policy": 1.0, "rollout": 4}], ids=str
)
@pytest.mark.parametrize("saving", [False, True])
def test_loss_and_gradients_are_the_same(make_model, late, objective, saving):
    found = []
    for sharing in (False, True):
        models = Models(late, make_model())
        if sharing:
            models.share()
        if saving:
            models.student.train()
            recompute_activations(models.student)
        found.append(models.loss_and_gradients(**objective))
    (loss, gradients), (loss_of_shared, gradients_of_shared) = found
    assert torch.equal(loss, loss_of_shared)
    assert sum(each is not None for each in gradients.values()) > 10
    for name, gradient in gradients.items():
        if gradient is None:
            assert gradients_of_shared[name] is None
        else:
            assert torch.equal(gradient, gradients_of_shared[name])


def test_healing_computes_the_front_once(make_model, late, options, tmp_path, monkeypatch):
    """And takes the same steps as without."""
    calls, forward = Counter(), LlamaMLP.forward
    for name in ("once", "twice"):

        def counted(self, *inputs, name=name):
            calls[name] += 1
            return forward(self, *inputs)

        with monkeypatch.context() as patch:
            patch.setattr(LlamaMLP, "forward", counted)
            if name == "twice":
                patch.setattr("truedepth.healing.front.front_of", lambda *_: 0)
            few = replace(options, tokens=256)
            td.heal(late, tmp_path / name, teacher=make_model(), healing=few)
    assert calls["once"] == calls["twice"] * 10 / 12
    once, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice"))
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize("case", CASES)
def test_every_family_goes_on_from_the_stream(make_model, tmp_path, case):
    model = make_model(**options_of(case))
    td.convert(model, tmp_path / "out", td.Plan(6, [[3, 4]]))
    models, ids = Models(tmp_path / "out", model), random_ids()
    with torch.no_grad():
        expected = models.original(input_ids=ids, use_cache=False).logits
        assert models.front == 3
        models.share()
        models.student(input_ids=ids, use_cache=False)
        found = models.original(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
