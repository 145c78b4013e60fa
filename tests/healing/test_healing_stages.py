"""Healing checkpoints whose sub-layers share stages."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import truedepth as td
from tiny_models import random_ids
from truedepth.families.lookup import original_family
from truedepth.healing.distillation import Distillation
from truedepth.healing.options import Objective, Train
from truedepth.healing.student import (
    compile_layers,
    is_trained,
    original_beside,
    student_of,
)
from truedepth.healing.teacher import Original
from truedepth.healing.training import _Trainer
from truedepth.widening.layout import Layout

PLAN = td.Plan(6, [[0, 1]], stages=[["F2", "A3"], ["F3", "A4"]])
CALIBRATION = td.Calibration(tokens=512, window=32)

NORMS = {"attention": "input_layernorm", "ffn": "post_attention_layernorm"}
MAPS = {
    "attention": [f"self_attn.{name}_proj" for name in "qkvo"],
    "ffn": [f"mlp.{name}_proj" for name in ("gate", "up", "down")],
}
SHARING = [
    *((0, kind) for kind in MAPS),  # the wide layer
    (1, "ffn"),  # F2
    *((2, kind) for kind in MAPS),  # A3 and F3
    (3, "attention"),  # A4
]
"""The sub-layers of the checkpoint that share stages, by hand."""


def names_of(maps_only: bool = False) -> set[str]:
    return {
        f"model.layers.{layer}.{name}.weight"
        for layer, kind in SHARING
        for name in [*MAPS[kind], *([] if maps_only else [NORMS[kind]])]
    }


@pytest.fixture(scope="module", params=["raw", "calibrated"])
def converted(request, make_model, prose, tmp_path_factory):
    out = tmp_path_factory.mktemp("healing") / "converted"
    text = replace(CALIBRATION, text=[str(prose)]) if request.param == "calibrated" else None
    td.convert(make_model(), out, PLAN, calibration=text)
    return out


@pytest.fixture(scope="module")
def raw(make_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("healing") / "raw"
    td.convert(make_model(), out, PLAN)
    return out


@pytest.fixture
def options(options):
    return replace(options, tokens=32 * 4 * 8)


def weights(path):
    return load_file(path / "model.safetensors")


def changed(before, after):
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {
        k: (v.shape, v.dtype) for k, v in after.items()
    }
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_only_the_sublayers_of_stages_change_and_the_loss_falls(
    make_model, converted, options, tmp_path
):
    gently = replace(options, learning_rate=2e-4)
    done = td.heal(converted, tmp_path / "out", teacher=make_model(), healing=gently)
    assert changed(weights(converted), weights(tmp_path / "out")) == names_of()
    assert done.curve[-1]["kl"] < 0.99 * done.curve[0]["kl"]
    before, after = (
        json.loads((path / "config.json").read_text()) for path in (converted, tmp_path / "out")
    )
    assert after["truedepth"].pop("healing")["train"] == "paired"
    del before["truedepth"]["healing"]
    assert after == before
    assert after["stages"] == [["F1", "A2"], ["F2", "A3"]]
    ours, ids = td.load(tmp_path / "out"), random_ids()
    remote = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, dtype=torch.float32
    )
    with torch.no_grad():
        logits = ours.model(ids).logits
        assert torch.equal(remote(ids).logits, logits)
        assert not torch.equal(td.load(converted).model(ids).logits, logits)


def test_lora_goes_to_these_sublayers_and_is_merged(make_model, raw, options, tmp_path):
    from peft import PeftModel

    lora = replace(options, train=Train.lora, rank=4, learning_rate=1e-2)
    kept = tmp_path / "adapter"
    done = td.heal(raw, tmp_path / "out", teacher=make_model(), healing=lora, keep_adapter=kept)
    assert changed(weights(raw), weights(tmp_path / "out")) == names_of(maps_only=True)
    assert done.curve[-1]["kl"] < 0.95 * done.curve[0]["kl"]
    adapted = PeftModel.from_pretrained(td.load(raw).model, kept)
    merged, ids = td.load(tmp_path / "out").model, random_ids()
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_takes_the_same_steps(
    make_model, raw, options, tmp_path, monkeypatch
):
    calls, forward = {False: 0, True: 0}, LlamaMLP.forward
    for saving in (False, True):

        def counted(self, *inputs, saving=saving):
            calls[saving] += torch.is_grad_enabled()
            return forward(self, *inputs)

        monkeypatch.setattr(LlamaMLP, "forward", counted)
        changes = replace(options, tokens=256, gradient_checkpointing=saving)
        td.heal(raw, tmp_path / str(saving), teacher=make_model(), healing=changes)
    assert calls[True] > 1.4 * calls[False] > 0
    plain, saving = weights(tmp_path / "False"), weights(tmp_path / "True")
    assert changed(weights(raw), plain) == names_of()
    for name in plain:
        torch.testing.assert_close(plain[name], saving[name], atol=1e-6, rtol=1e-4)


def test_every_layer_of_both_models_is_compiled(make_model, raw, monkeypatch):
    found, family = [], td.open_source(make_model()).family
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: found.append(self))
    limit = torch._dynamo.config.recompile_limit
    with torch._dynamo.config.patch(recompile_limit=limit):
        for path, layers in ((raw, 5), (make_model(), 6)):
            model = td.load(path).model
            compile_layers(model, family)
            assert found == list(model.model.layers)
            assert len(found) == layers  # the wide layer is one
            found.clear()
        assert torch._dynamo.config.recompile_limit == limit + 2 * 11


@pytest.mark.slow
@pytest.mark.parametrize("saving", [False, True])
def test_compiled_layers_take_the_same_steps(make_model, raw, options, tmp_path, saving):
    """Where torch gave up compiling, this would fail."""
    torch._dynamo.reset()
    few = replace(options, tokens=256, gradient_checkpointing=saving)
    for name, quick in (("plain", False), ("compiled", True)):
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=quick):
            changes = replace(few, compile=quick)
            td.heal(raw, tmp_path / name, teacher=make_model(), healing=changes)
    plain, quick = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    assert changed(weights(raw), plain) == names_of()
    for name in plain:
        torch.testing.assert_close(plain[name], quick[name], atol=1e-5, rtol=1e-4)


def test_an_interrupted_run_resumes(make_model, raw, options, tmp_path, monkeypatch):
    td.heal(raw, tmp_path / "whole", teacher=make_model(), healing=options)
    step = _Trainer.training_step

    def interrupted(self, *inputs):
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return step(self, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(_Trainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            td.heal(raw, tmp_path / "cut", teacher=make_model(), healing=options)
    assert not (tmp_path / "cut").exists()
    done = td.heal(raw, tmp_path / "cut", teacher=make_model(), healing=options)
    assert [row["step"] for row in done.curve] == [0, 4, 8]
    assert not changed(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_what_is_frozen_and_the_same_is_in_memory_once(make_model, raw):
    source, original = td.open_source(raw), td.open_source(make_model())
    layout, family = Layout.of(source), original_family(source.config, str(source.path))
    student = student_of(source, is_trained(family, layout, Train.paired), torch.float32)
    trained = {name for name, each in student.named_parameters() if each.requires_grad}
    assert trained == names_of()
    teacher = original_beside(student, original, layout, torch.float32)
    ours = {id(parameter) for parameter in student.parameters()}
    own = {name for name, each in teacher.named_parameters() if id(each) not in ours}
    assert own == {
        *(
            n
            for n, _ in teacher.named_parameters()
            if n.startswith(("model.layers.0.", "model.layers.1."))
        ),
        *(
            f"model.layers.{layer + 1}.{name}.weight"
            for layer, kind in SHARING
            if layer
            for name in [*MAPS[kind], NORMS[kind]]
        ),
    }


def test_the_error_of_hidden_states_is_as_written_down(make_model, raw):
    """Behind every layer with a sub-layer in a stage, also where the stage is still open."""
    source, original = td.open_source(raw), td.open_source(make_model())
    layout = Layout.of(source)
    student = student_of(source, is_trained(original.family, layout, Train.paired), torch.float32)
    model = original_beside(student, original, layout, torch.float32)
    teacher, ids = Original(model), random_ids()

    def loss(hidden):
        objective = Objective(hidden=hidden)
        with torch.no_grad():
            return Distillation(student, teacher, teacher, layout, objective)(ids, torch.arange(2))

    wanted = model(ids, output_hidden_states=True).hidden_states
    found = states_behind_layers(model.model, wanted[0])
    errors = [
        ((found[k] - wanted[k + 1]).pow(2).sum(-1) / wanted[k + 1].pow(2).sum(-1)).mean()
        for k in (1, 2, 3, 4)
    ]
    torch.testing.assert_close(loss(2.0) - loss(0.0), 2 * sum(errors) / 4, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def states_behind_layers(body, x):
    """By layer of the original: x with all that was added up to its FFN, under `PLAN`."""
    positions = torch.arange(x.shape[1])[None]
    rotary = body.rotary_emb(x, position_ids=positions)
    mask = torch.full((x.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    found = {}
    for stage in PLAN.stages:
        read = x
        for sublayer in stage:
            layer = body.layers[sublayer.layer]
            if sublayer.kind == "attention":
                normed = layer.input_layernorm(read)
                attended = {"position_embeddings": rotary, "attention_mask": mask}
                x = x + layer.self_attn(normed, **attended)[0]
            else:
                x = x + layer.mlp(layer.post_attention_layernorm(read))
                found[sublayer.layer] = x
    return found
