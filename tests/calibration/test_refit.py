"""Calibration against the same written out plainly, with whole models in memory."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

import truedepth as td
from family_models import Alone, options_of, share
from tiny_models import random_ids
from truedepth.calibration.refit import Calibrator
from truedepth.calibration.ridge import Regression
from truedepth.calibration.trajectories import Walk
from truedepth.plan.stages import group_of
from truedepth.runtime.layer_stack import LayerStack
from truedepth.widening.layout import Layout

IDS = random_ids(batch=12, length=40)
GROUPS = td.Plan(6, [[1, 2], [4, 5]])
FIRST_AND_LAST = td.Plan(6, stages=[["A0", "F0", "A1"], ["F2", "A3"], ["F4", "A5", "F5"]])
STAGGERED = td.Plan.staggered(6, 1, 4)
MIXED = td.Plan(6, [[1, 2]], stages=[["F3", "A4"], ["A5", "F5"]])

WRITES = {"self_attn": "o_proj", "mlp": "down_proj"}
NORMS_BEFORE = {
    "olmo2": {"A": None, "F": None},
    "gemma2": {"A": "input_layernorm", "F": "pre_feedforward_layernorm"},
    "gemma3_text": {"A": "input_layernorm", "F": "pre_feedforward_layernorm"},
}
NORMS_BEHIND = ("gemma2", "gemma3", "olmo2", "glm4")


def calibrated(model, plan=GROUPS, dtype=torch.float32, **options):
    """Refits by segment."""
    source = td.open_source(model)
    stack = LayerStack(source, device="cpu", dtype=dtype)
    walk = Walk(stack, Layout(source, plan), IDS, batch_size=5, **options)
    calibrator = Calibrator(walk)
    found = {}
    for segment in walk.layout.segments:
        if walk.layout.is_merged(segment):
            found[segment] = calibrator.refit(segment)
        else:
            walk.advance(segment)
    return found


def ridge(x, z, prior, penalty, parts):
    """A map near its prior; the inputs of each part count by the mean of their own squares."""
    x, z, prior = x.flatten(0, 1).double(), z.flatten(0, 1).double(), prior.double()
    if penalty == math.inf:
        return prior
    gram = x.T @ x
    scales = [square.mean().expand(len(square)) for square in gram.diagonal().split(parts)]
    system = gram + penalty * torch.cat(scales).diag()
    return prior + torch.linalg.solve(system, x.T @ z - gram @ prior.T).T


class Plainly:
    """The formulas of `refit`'s docstring, one map after another, given the penalties.

    Layers of a group keep their own weights here, so `weights` are by the original's names.
    `states` are what enters the original's sub-layers, by their places.
    """

    def __init__(self, model):
        self.original, self.converted = (
            AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
            for _ in range(2)
        )
        self.states = self._states()
        self.gave = {}

    @torch.no_grad()
    def _states(self):
        """What enters every sub-layer of the original, by its place, and what leaves the last."""
        found = []
        body = self.original.model
        norms = [
            layer.get_submodule(norm)
            for layer in body.layers
            for kind in ("A", "F")
            if (norm := self._norm(kind))
        ]
        for norm in [*norms, body.norm]:
            norm.register_forward_pre_hook(lambda _, given: found.append(given[0].double()))
        self.original(IDS, use_cache=False)
        return found

    def _norm(self, name):
        usual = {"A": "input_layernorm", "F": "post_attention_layernorm"}
        return NORMS_BEFORE.get(self.original.config.model_type, usual)[name[0]]

    def parts(self, name):
        """A sub-layer's layer, module, norm, and maps: those that read, and the one that writes."""
        layer = self.converted.model.layers[int(name[1:])]
        body = "self_attn" if name[0] == "A" else "mlp"
        module, norm = layer.get_submodule(body), layer.get_submodule(self._norm(name) or "")
        maps = {k: m for k, m in module.named_children() if isinstance(m, torch.nn.Linear)}
        write = maps.pop(WRITES[body] if WRITES[body] in maps else "c_proj")
        return layer, f"{body}.", norm, maps, write

    def read(self, name, x, folded):
        """What a sub-layer's maps read: behind its norm, or, in a group, before the gain."""
        if self._norm(name) is None:
            return x.double()
        norm = self.original.get_submodule(f"model.layers.{name[1:]}.{self._norm(name)}")
        if not folded:
            return copy.deepcopy(norm).double()(x.double())
        x = x.double()
        if hasattr(norm, "normalized_shape"):
            x = x - x.mean(-1, keepdim=True)
        eps = [getattr(norm, each, None) for each in ("eps", "variance_epsilon")]
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + (eps[0] or eps[1]))

    def place(self, name):
        return 2 * int(name[1:]) + (name[0] == "F")

    def refit_reads(self, name, x, fits, folded):
        _, body, norm, maps, _ = self.parts(name)
        if folded:
            gemma = self.original.config.model_type == "gemma"
            for each in maps.values():
                if (shift := getattr(norm, "bias", None)) is not None:
                    each.bias.add_(each.weight @ shift)
                each.weight.mul_(norm.weight + 1 if gemma else norm.weight)
            norm.weight.fill_(0.0 if gemma else 1.0)
            if getattr(norm, "bias", None) is not None:
                norm.bias.zero_()
        key = f"{', '.join(body + each for each in maps)} of layer {name[1:]}"
        seen = self.read(name, self.states[self.place(name)], folded)
        own = self.read(name, x, folded)
        matrix = ridge(own, seen, torch.eye(64), fits[key].penalty, [64])
        for each in maps.values():
            each.weight.copy_(each.weight.double() @ matrix)

    def refit_writes(self, names, x, wanted, penalty, together):
        features, alone = [], Alone(self.converted, IDS)
        writes = [self.parts(name)[-1] for name in names]
        for name, write in zip(names, writes, strict=True):
            hook = write.register_forward_pre_hook(lambda _, given: features.append(given[0]))
            alone.added(name, x)
            hook.remove()
        target = (wanted - x) / getattr(self.original.config, "residual_multiplier", 1.0)
        if self.gave:
            (target,) = (self.gave[name] for name in names)
        target = target - sum(each.bias for each in writes if each.bias is not None)
        columns = [each.weight.shape[1] for each in writes]
        fitted = ridge(
            torch.cat(features, -1),
            target,
            torch.cat([each.weight for each in writes], 1),
            penalty,
            [sum(columns)] if together else columns,
        )
        for each, weight in zip(writes, fitted.split(columns, 1), strict=True):
            each.weight.copy_(weight)

    def run(self, names, x):
        alone = Alone(self.converted, IDS)
        return x + sum(alone.added(name, x) for name in names)

    def written(self, name):
        _, body, _, maps, write = self.parts(name)
        (found,) = (k for k, m in self.parts(name)[0].named_modules() if m is write)
        assert found.startswith(body) and found.removeprefix(body) not in maps
        return found

    def run_original(self, segment, x):
        """Its sub-layers of the original, one after another from x."""
        alone = Alone(self.original, IDS)
        self.states = {}
        for name in sorted((str(each) for stage in segment for each in stage), key=self.place):
            self.states[self.place(name)] = x.double()
            writer = self.original.get_submodule(f"model.layers.{name[1:]}.{self.written(name)}")
            hook = writer.register_forward_hook(partial(self._keep, name))
            x = x + alone.added(name, x)
            hook.remove()
        self.states[self.place(name) + 1] = x.double()

    def _keep(self, name, module, given, output):
        """Where norms follow, what the map that writes gives."""
        layer = self.original.model.layers[0]
        if hasattr(layer, "post_feedforward_layernorm") or hasattr(layer, "post_mlp_layernorm"):
            self.gave[name] = output.double()

    @torch.no_grad()
    def follow(self, segments, found, anew):
        """Refit every segment that was refitted, with the same penalties.

        `anew`: the original starts at each of them from the converted states.
        """
        x = Alone(self.converted, IDS).entered
        for segment in segments:
            fits = found[segment].fits if segment in found else {}
            if fits and anew:
                self.run_original(segment, x)
            for stage in segment:
                names = list(map(str, stage))
                if fits:
                    wanted = self.states[self.place(str(segment[-1][-1])) + 1]
                    if group_of(segment) and names[0][0] == "A":
                        wanted = self.states[self.place(names[0])] + sum(
                            self.states[place + 1] - self.states[place]
                            for place in map(self.place, names)
                        )
                    key = self.written(names[0])
                    if not group_of(segment):
                        key = ", ".join(f"{self.written(n)} of layer {n[1:]}" for n in names)
                    for name in names:
                        self.refit_reads(name, x, fits, folded=bool(group_of(segment)))
                    together = bool(group_of(segment))
                    if self.gave:
                        for name in names:
                            key = f"{self.written(name)} of layer {name[1:]}"
                            self.refit_writes([name], x, wanted, fits[key].penalty, together)
                    else:
                        self.refit_writes(names, x, wanted, fits[key].penalty, together)
                x = self.run(names, x)

    def expected(self, segment, name):
        """A tensor of a refitted segment, from those of the layers of a group."""
        group = group_of(segment)
        if not group:
            return self.converted.get_parameter(name)
        rest = name.removeprefix(f"model.layers.{group[0]}.")
        parts = [self.converted.get_parameter(f"model.layers.{layer}.{rest}") for layer in group]
        module = rest.rpartition(".")[0]
        if "layernorm" in module:
            return parts[0]
        if module in (self.written(f"A{group[0]}"), self.written(f"F{group[0]}")):
            return sum(parts) if rest.endswith("bias") else torch.cat(parts, 1)
        return torch.cat(parts)


BIASED = {"attention_bias": True, "mlp_bias": True}
MODELS = {
    "llama": {},
    "llama, biases": BIASED,
    **{
        name: options_of(name)
        for name in ("phi3", "qwen3", "granite", "gemma", "starcoder2", "glm", "arcee", "smollm3")
    },
    "ministral": options_of("ministral"),
    **{name: options_of(name) for name in NORMS_BEHIND},
    # transformers 5.17 takes attention that caps no scores, if it is not asked for eager attention
    "gemma2": options_of("gemma2") | {"attn_logit_softcapping": None},
}
PACKED_OR_HEAD_NORMS = {"phi3", "qwen3", "glm"}  # their wide layers are not plainly joined rows
CASES = [
    *((name, FIRST_AND_LAST) for name in MODELS),
    *((name, plan) for name in ("llama", "starcoder2") for plan in (GROUPS, STAGGERED)),
    *((name, MIXED) for name in MODELS if name not in {*PACKED_OR_HEAD_NORMS, *NORMS_BEHIND}),
]


@pytest.mark.parametrize(("name", "plan"), CASES, ids=str)
def test_refits_are_the_formulas(make_model, name, plan, monkeypatch):
    """With one penalty for all maps: so small a random model would leave many as they are."""
    monkeypatch.setattr(Regression, "_choose", lambda *_: (1.0, 0.5, 0.03))
    model = make_model(**MODELS[name])
    found = calibrated(model, plan)
    plainly, raw = Plainly(model), AutoModelForCausalLM.from_pretrained(model)
    plainly.follow(plan.segments, found, anew=bool(plan.merged))
    wide = [group for group in plan.groups if len(group) > 1 and name != "ministral"]
    assert len(found) == len(plan.merged) + len(wide)
    for segment, refit in found.items():
        size = len(segment[0])
        writes = size if name in NORMS_BEHIND else 1
        assert len(refit.fits) == (6 if group_of(segment) else size + writes)
        changes = []
        for tensor, weight in refit.weights.items():
            plain, before = plainly.expected(segment, tensor), raw.get_parameter(tensor)
            torch.testing.assert_close(weight, plain, atol=5e-4, rtol=1e-3)
            if weight.shape == before.shape:
                changes.append((weight - before).abs().max().item())
        assert max(changes, default=1.0) > 0.01


def test_fits_are_named_by_their_maps(make_model):
    wide, staggered, block = calibrated(make_model(), MIXED).values()
    reads = ["self_attn.q_proj, self_attn.k_proj, self_attn.v_proj", "mlp.gate_proj, mlp.up_proj"]
    assert list(wide.fits) == [
        *(f"{reads[0]} of layer {layer}" for layer in (1, 2)),
        "self_attn.o_proj",
        *(f"{reads[1]} of layer {layer}" for layer in (1, 2)),
        "mlp.down_proj",
    ]
    assert list(staggered.fits) == [
        f"{reads[1]} of layer 3",
        f"{reads[0]} of layer 4",
        "mlp.down_proj of layer 3, self_attn.o_proj of layer 4",
    ]
    assert list(block.fits)[2] == "self_attn.o_proj of layer 5, mlp.down_proj of layer 5"


@pytest.mark.parametrize("name", MODELS)
def test_a_large_penalty_gives_the_raw_stages(make_model, name, monkeypatch, tmp_path):
    monkeypatch.setattr(Regression, "_choose", lambda *_: (1.0, 1.0, 1e9))
    model, text = make_model(**MODELS[name]), tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and then the hat " * 300)
    options = td.Calibration([text], tokens=512, window=32, check=0, dtype=torch.float32)
    td.convert(model, tmp_path / "raw", FIRST_AND_LAST)
    td.calibrate(model, tmp_path / "out", FIRST_AND_LAST, options)
    with torch.inference_mode():
        raw, out = (td.load(tmp_path / each).model(IDS).logits for each in ("raw", "out"))
    torch.testing.assert_close(out, raw, atol=1e-4, rtol=0)


@pytest.mark.parametrize("plan", [GROUPS, MIXED, FIRST_AND_LAST], ids=str)
def test_where_the_states_are_kept_changes_nothing(make_model, plan, tmp_path):
    kept = calibrated(make_model(**BIASED), plan)
    mapped = calibrated(make_model(**BIASED), plan, workspace=tmp_path)
    assert kept.keys() == mapped.keys()
    for segment, refit in kept.items():
        for name, weight in refit.weights.items():
            assert torch.equal(weight, mapped[segment].weights[name])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("plan", "silent"),
    [
        (GROUPS, ["A1", "F1", "A2", "A4", "F4", "A5"]),
        (STAGGERED, ["F1", "F2", "F3"]),
        (FIRST_AND_LAST, ["A0", "F0", "F2", "F4", "A5"]),
    ],
    ids=str,
)
def test_what_does_not_interact_stays_as_it_is(make_model, plan, silent, tmp_path):
    """Those write nothing which others of their stages no longer see."""
    loaded = td.load(make_model())
    with torch.no_grad():
        for name in silent:
            layer = loaded.model.model.layers[int(name[1:])]
            (layer.self_attn.o_proj if name[0] == "A" else layer.mlp.down_proj).weight.zero_()
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    source = td.open_source(tmp_path / "model")
    layout = Layout(source, plan, torch.float32)
    for segment, refit in calibrated(tmp_path / "model", plan).items():
        before = source.tensors
        if group := group_of(segment):
            tensors = layout.wide_layer(group, torch.float32)
            before = {f"model.layers.{group[0]}.{k}": v for k, v in tensors.items()}
        for name, weight in refit.weights.items():
            torch.testing.assert_close(weight, before[name].read(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("plan", [GROUPS, STAGGERED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_held_out_errors_shrink(make_model, plan, dtype):
    for refit in calibrated(make_model(), plan, dtype=dtype).values():
        for name, fit in refit.fits.items():
            assert fit.after <= fit.before, name
        assert any(fit.after < 0.9 * fit.before for fit in refit.fits.values())


@pytest.mark.parametrize("plan", [GROUPS, STAGGERED, MIXED], ids=str)
def test_advancing_with_kept_weights_is_refitting(make_model, plan):
    """What a resumed run does."""
    whole = calibrated(make_model(), plan)
    source = td.open_source(make_model())
    stack = LayerStack(source, device="cpu", dtype=torch.float32)
    walk = Walk(stack, Layout(source, plan), IDS, batch_size=5)
    *before, last = whole
    for segment in walk.layout.segments[: walk.layout.segments.index(last)]:
        walk.advance(segment, whole[segment].weights if segment in before else None)
    again = Calibrator(walk).refit(last)
    for name, weight in again.weights.items():
        assert torch.equal(weight, whole[last].weights[name])


@pytest.mark.parametrize("plan", [GROUPS, STAGGERED, MIXED], ids=str)
def test_the_original_stays_as_it_is(make_model, plan):
    """Also where its tensors are used in place, in the dtype of the file."""
    source = td.open_source(make_model())
    before = {name: tensor.read().clone() for name, tensor in source.tensors.items()}
    stack = LayerStack(source, device="cpu", dtype=torch.float32)
    walk = Walk(stack, Layout(source, plan), IDS)
    calibrator = Calibrator(walk)
    for segment in plan.segments:
        (calibrator.refit if walk.layout.is_merged(segment) else walk.advance)(segment)
    for name, tensor in source.tensors.items():
        assert torch.equal(tensor.read(), before[name]), name


LOCAL = td.Plan(6, stages=[{"sublayers": ["F1", "A2"], "local": 2}])


@pytest.mark.parametrize("name", ["llama", "llama, biases", "phi3", "qwen3", "granite"])
@torch.no_grad()
def test_refits_of_a_local_stage_are_the_formulas(make_model, name, monkeypatch):
    """A rank's rows are refitted for what it reads, x + p_r; what writes, for all ranks' shares.

    Here columns stay where they are; test_columns.py has where they go.
    """
    monkeypatch.setattr(Regression, "_choose", lambda *_: (1.0, 0.5, 0.03))
    monkeypatch.setattr("truedepth.calibration.refit.arrange", lambda *_: None)
    model = make_model(**MODELS[name])
    (found,) = calibrated(model, LOCAL).values()
    original, refitted = (
        AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager") for _ in range(2)
    )
    alone = Alone(original, IDS)
    x = alone.entered
    for each in ("A0", "F0", "A1"):
        x = x + alone.added(each, x)
    behind_ffn = x + alone.added("F1", x)
    wanted = behind_ffn + alone.added("A2", behind_ffn) - x

    norm = copy.deepcopy(original.model.layers[2].input_layernorm).double()
    states = [x + Alone(share(original, rank, 2), IDS).added("F1", x) for rank in range(2)]
    fits = [
        ridge(norm(state.double()), norm(behind_ffn.double()), torch.eye(64), 0.03, [64])
        for state in states
    ]
    attention, ffn = refitted.model.layers[2].self_attn, refitted.model.layers[1].mlp
    for map_, sizes in [
        (getattr(attention, "qkv_proj", None), [64, 32, 32]),
        *((getattr(attention, f"{each}_proj", None), None) for each in "qkv"),
    ]:
        if map_ is not None:
            rows = [
                rows.double() @ fit
                for part in map_.weight.split(sizes or len(map_.weight))
                for rows, fit in zip(part.chunk(2), fits, strict=True)
            ]
            map_.weight.copy_(torch.cat(rows))

    features, alone = [], Alone(refitted, IDS)
    for writer, read in (
        (ffn.down_proj, [("F1", x)]),
        (attention.o_proj, [("A2", s) for s in states]),
    ):
        given = []
        hook = writer.register_forward_pre_hook(lambda _, args, given=given: given.append(args[0]))
        for each in read:
            alone.added(*each)
        hook.remove()
        shares = [each.chunk(2, -1)[rank] for rank, each in enumerate(given)]
        features.append(torch.cat(shares, -1) if len(shares) > 1 else given[0])
    wanted = wanted / getattr(original.config, "residual_multiplier", 1.0)
    for writer in (ffn.down_proj, attention.o_proj):
        wanted = wanted - (0.0 if writer.bias is None else writer.bias)
    priors = [ffn.down_proj.weight, attention.o_proj.weight]
    columns = [prior.shape[1] for prior in priors]
    fitted = ridge(torch.cat(features, -1), wanted, torch.cat(priors, 1), 0.03, columns)
    for prior, weight in zip(priors, fitted.split(columns, 1), strict=True):
        prior.copy_(weight)

    assert len(found.fits) == 2 + 1
    for tensor, weight in found.weights.items():
        torch.testing.assert_close(weight, refitted.get_parameter(tensor), atol=5e-4, rtol=1e-3)
