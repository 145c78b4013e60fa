"""Runs a loaded decoder layer by layer over hidden states, in any order and any grouping.

A schedule is a sequence of steps; a step is one or more layers that run side by side, or a stage of
sub-layers. The weights are the model's own and are not copied. Many schedules run as one tree:
steps that they share at the beginning are computed once, so a change at layer s costs only the
layers from s on, and equal schedules are run once.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from truedepth.evaluation.loss import window_measures
from truedepth.modeling import LayerForm
from truedepth.plan.stages import ATTENTION, KINDS, Kind, Stage, Sublayer, said
from truedepth.runtime.calls import Calls, record
from truedepth.runtime.loading import Loaded
from truedepth.runtime.output_head import OutputHead
from truedepth.runtime.stage import LoadedSublayer, Member, run_stage

Form = Literal["lp", "par", "merge"]

BATCH_WINDOWS = 4  # windows per call: a layer's intermediates are several times its input

MEAN_ROWS = 256  # rows of a matrix whose mean is computed at once, in float32

BatchedCalls = Sequence[Calls]
"""The arguments that the layers are called with, for each batch of `BATCH_WINDOWS` windows."""


@dataclass(frozen=True, order=True)
class Step:
    """What runs on the same input x: layers side by side, or the sub-layers of a stage.

    With attention A, FFN F and norms N, layers run in one of these forms:

    lp      a = x + Σ A_i(N_i x),  y = a + Σ F_i(N'_i a)                    arXiv 2502.02790
    par     y = x + Σ [A_i(N_i x) + F_i(N'_i (x + A_i(N_i x)))]             arXiv 2404.06709
    merge   one layer with the mean of their weights

    For a single layer all forms are equal.
    """

    layers: tuple[int, ...] = ()
    form: Form = "lp"
    stage: Stage = ()
    """Instead of layers: y = x + Σ s(N_s x)."""

    def __post_init__(self) -> None:
        if len(self.layers) == 1:
            object.__setattr__(self, "form", "lp")

    def __str__(self) -> str:
        """For example `3`, `3+4`, `3+4:par` or `[F3 A4]`."""
        if self.stage:
            return said(self.stage)
        form = "" if self.form == "lp" else f":{self.form}"
        return "+".join(map(str, self.layers)) + form


Schedule = tuple[Step, ...]


def in_order(layers: Iterable[int]) -> Schedule:
    """Layers one after another."""
    return tuple(Step((layer,)) for layer in layers)


def layer_evaluations(schedules: Iterable[Schedule]) -> float:
    """Number of layers that `Runner.run` evaluates for these schedules.

    Attention and FFN count half each; the output head is not counted.
    """
    nodes: dict[Schedule, set[Step]] = {}
    for schedule in schedules:
        for depth, step in enumerate(schedule):
            nodes.setdefault(schedule[:depth], set()).add(step)
    return sum(map(_node_evaluations, nodes.values()))


def _node_evaluations(steps: Iterable[Step]) -> float:
    """Layers evaluated for steps that start from one state; what they share is computed once."""
    merged, attentions, own_ffns, ffns = 0, set[int](), set[int](), 0
    staged = set[int]()
    for step in steps:
        for sublayer in step.stage:
            (attentions if sublayer.kind == ATTENTION else staged).add(sublayer.layer)
        if step.form == "merge":
            merged += 1
            continue
        attentions.update(step.layers)
        if step.form == "par" or len(step.layers) == 1:
            own_ffns.update(step.layers)
        else:
            ffns += len(step.layers)
    return merged + (len(attentions) + len(own_ffns) + len(staged) + ffns) / 2


class Runner:
    """Runs schedules of one model on one set of token ids."""

    def __init__(self, loaded: Loaded, ids: Tensor) -> None:
        """Embed the tokens and record how the model calls its layers.

        Args:
            loaded: An original model; its own layers are called.
            ids: `[windows, length]` int64.

        Raises:
            TruedepthError: The model's family is not supported.
        """
        self.evaluated = 0.0
        """Layers evaluated so far, counted as `layer_evaluations` does."""

        self._model: Any = loaded.model
        self._ids = ids.to(loaded.model.device)
        self._family = loaded.source.family
        self._form = LayerForm(**self._family.layer_form(self._model.config))
        self._head = OutputHead(self._model)
        self.layers: list[nn.Module] = list(self._model.base_model.layers)
        self._scratch: nn.Module | None = None
        recorded = [
            record(self._model, self._family, batch)
            for batch in torch.split(self._ids, BATCH_WINDOWS)
        ]
        self.calls: BatchedCalls = [calls for _, calls in recorded]
        # The residual stream is kept in float32 even if the layers compute in bfloat16.
        self.embedded = torch.cat([states for states, _ in recorded])

    @property
    def parallel(self) -> bool:
        """Whether a layer's attention and FFN read the same state; then LP and PAR are equal."""
        return self._form.parallel

    @torch.inference_mode()
    def inputs(self) -> list[Tensor]:
        """The inputs of all layers in the original order, then the output of the last layer.

        Each is `[windows, length, hidden]` float32.
        """
        states = [self.embedded]
        for step in in_order(range(len(self.layers))):
            states.append(_Node(self, states[-1]).run(step))
        return states

    @torch.inference_mode()
    def sublayer_inputs(self) -> list[Tensor]:
        """What every sub-layer reads in the original: A0, F0, A1, F1, …

        Each is `[windows, length, hidden]` float32.
        """
        states = []
        for layer, x in enumerate(self.inputs()[:-1]):
            attention = Sublayer(layer, ATTENTION)
            states += [x, x if self.parallel else x + self.added(attention, x)]
        return states

    @torch.inference_mode()
    def added(self, sublayer: Sublayer, x: Tensor) -> Tensor:
        """What a sub-layer adds to a state, `s(N_s x)`."""
        return self.member(sublayer.kind, sublayer.layer)(x, self.calls)

    @torch.inference_mode()
    def update(self, layer: int, x: Tensor) -> Tensor:
        """What a layer adds to its input: `f_i(x) = A_i(N_i x) + F_i(N'_i (x + A_i(N_i x)))`."""
        node = _Node(self, x)
        return node.attention(layer) + node.own_ffn(layer)

    def run(self, schedules: Iterable[Schedule]) -> Iterator[tuple[Schedule, Tensor]]:
        """Run each distinct schedule once, in the order in which they share the most steps.

        Yields:
            A schedule and the mean NLL of its predictions, `[windows]` float64, nats per token.
        """
        ordered = sorted(set(schedules))
        if ordered:
            yield from self._walk(self.embedded, ordered, 0)

    @torch.inference_mode()
    def _walk(
        self, x: Tensor, schedules: Sequence[Schedule], depth: int
    ) -> Iterator[tuple[Schedule, Tensor]]:
        """Run schedules that share their first `depth` steps, from the state x after these."""
        if len(schedules[0]) == depth:
            yield schedules[0], self.nll(x)
            schedules = schedules[1:]
        node = _Node(self, x)
        for step, group in itertools.groupby(schedules, key=lambda schedule: schedule[depth]):
            yield from self._walk(node.run(step), list(group), depth + 1)

    @torch.inference_mode()
    def nll(self, x: Tensor) -> Tensor:
        """Mean NLL of the next tokens in each window, from the last layer's output.

        Args:
            x: `[windows, length, hidden]`.

        Returns:
            `[windows]` float64, nats per token.
        """
        dtype = self._model.get_output_embeddings().weight.dtype
        norm = self._model.get_submodule(self._family.outside[1])
        normed = norm(x.to(dtype))[:, :-1]
        rows = []
        for hidden, targets in zip(normed, self._ids[:, 1:], strict=True):
            predictions = partial(self._logits, hidden)
            rows.append(window_measures(targets, [predictions])[0, 0])
        return torch.stack(rows)

    def _logits(self, hidden: Tensor, positions: slice) -> Tensor:
        return self._head(hidden[positions])

    def member(self, kind: Kind, layer: int, module: nn.Module | None = None) -> Member[Any]:
        """A sub-layer as a member of a stage; `module` replaces the layer and its weights."""
        sublayer = LoadedSublayer(kind, layer, module or self.layers[layer], self._form)

        def run(x: Tensor, calls: BatchedCalls) -> Tensor:
            self.evaluated += 0.5
            parts = zip(torch.split(x, BATCH_WINDOWS), calls, strict=True)
            return torch.cat([sublayer(part, call) for part, call in parts])

        return run

    def mean_layer(self, layers: Sequence[int]) -> nn.Module:
        """A layer with the mean of the given layers' parameters; valid until the next call."""
        if self._scratch is None:
            self._scratch = copy.deepcopy(self.layers[0])
        for name, parameter in self._scratch.named_parameters():
            members = [self.layers[layer].get_parameter(name).detach() for layer in layers]
            blocks = (torch.split(each, MEAN_ROWS) for each in (parameter.detach(), *members))
            for mean, *rows in zip(*blocks, strict=True):
                mean.copy_(sum(each.float() for each in rows) / len(rows))
        return self._scratch


class _Node:
    """A state, and results computed from it that several steps can share."""

    def __init__(self, runner: Runner, x: Tensor) -> None:
        self._runner = runner
        self._x = x
        self._attentions: dict[int, Tensor] = {}
        self._own_ffns: dict[int, Tensor] = {}
        self._ffns: dict[int, Tensor] = {}

    def attention(self, layer: int) -> Tensor:
        """`A_i(N_i x)`."""
        if layer not in self._attentions:
            run = self._runner.member("attention", layer)
            self._attentions[layer] = run(self._x, self._runner.calls)
        return self._attentions[layer]

    def own_ffn(self, layer: int) -> Tensor:
        """`F_i(N'_i (x + A_i(N_i x)))`: the FFN after its own layer's attention alone."""
        if layer not in self._own_ffns:
            parallel = self._runner.parallel
            read = self._x if parallel else run_stage(self._x, [self._attention(layer)], ())
            self._own_ffns[layer] = self._runner.member("ffn", layer)(read, self._runner.calls)
        return self._own_ffns[layer]

    def ffn(self, layer: int) -> Tensor:
        """`F_i(N'_i x)`: the FFN that does not see its own layer's attention."""
        if layer not in self._ffns:
            self._ffns[layer] = self._runner.member("ffn", layer)(self._x, self._runner.calls)
        return self._ffns[layer]

    def _in_stage(self, sublayer: Sublayer) -> Member[Any]:
        run = self.attention if sublayer.kind == ATTENTION else self.ffn
        return lambda *_: run(sublayer.layer)

    def _attention(self, layer: int) -> Member[Any]:
        """The attention as a member of a stage that reads this state."""
        return lambda *_: self.attention(layer)

    def _own_ffn(self, layer: int) -> Member[Any]:
        return lambda *_: self.own_ffn(layer)

    def run(self, step: Step) -> Tensor:
        """The state after a step."""
        runner, calls, layers = self._runner, self._runner.calls, step.layers
        if step.stage:
            return run_stage(self._x, map(self._in_stage, step.stage), calls)
        if step.form == "merge":
            mean = runner.mean_layer(layers)
            attentions, ffns = ([runner.member(kind, layers[0], mean)] for kind in KINDS)
        else:
            attentions = [self._attention(layer) for layer in layers]
            ffns = [runner.member("ffn", layer) for layer in layers]
            if step.form == "par" or len(layers) == 1 or runner.parallel:
                return run_stage(self._x, [*attentions, *map(self._own_ffn, layers)], calls)
        if runner.parallel:
            return run_stage(self._x, [*attentions, *ffns], calls)
        return run_stage(run_stage(self._x, attentions, calls), ffns, calls)
