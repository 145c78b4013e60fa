"""Runs a loaded decoder layer by layer over hidden states, in any order and any grouping.

A schedule is a sequence of steps; a step is one or more layers that run at one moment. The weights
are the model's own and are not copied. Many schedules are run as one tree: what they have in common
at their beginnings is computed once, so that a change at layer s costs the layers from s on only,
and two schedules that are the same cost one.

How the model calls its layers (masks, rotary embeddings, positions) is recorded from one ordinary
forward pass, so nothing of a family's model code is repeated here.
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
from truedepth.families.family import sublayers
from truedepth.runtime.layer_stack import run_branch
from truedepth.runtime.loading import Loaded
from truedepth.runtime.output_head import OutputHead

Form = Literal["lp", "par", "merge"]

BATCH_WINDOWS = 4  # that a layer computes at once; what is inside it is several times its input

Calls = dict[int, dict[str, Any]]
"""By layer, what its attention is called with for a batch, but for the hidden states."""


@dataclass(frozen=True, order=True)
class Step:
    """Layers that run at one moment, on the same input x, with attention A, FFN F and norms N.

    lp      a = x + Σ A_i(N_i x),  y = a + Σ F_i(N'_i a)                    arXiv 2502.02790
    par     y = x + Σ [A_i(N_i x) + F_i(N'_i (x + A_i(N_i x)))]             arXiv 2404.06709
    merge   one layer whose weights are the mean of theirs

    A layer alone is the same in every form.
    """

    layers: tuple[int, ...]
    form: Form = "lp"

    def __post_init__(self) -> None:
        if len(self.layers) == 1:
            object.__setattr__(self, "form", "lp")

    def __str__(self) -> str:
        """`3`, `3+4`, `3+4:par`."""
        form = "" if self.form == "lp" else f":{self.form}"
        return "+".join(map(str, self.layers)) + form


Schedule = tuple[Step, ...]


def in_order(layers: Iterable[int]) -> Schedule:
    """Layers one after another."""
    return tuple(Step((layer,)) for layer in layers)


def layer_evaluations(schedules: Iterable[Schedule]) -> float:
    """Layers that `Runner.run` evaluates for these schedules, each step of each tree node once.

    Attention and FFN count half each, the output head nothing.
    """
    nodes: dict[Schedule, set[Step]] = {}
    for schedule in schedules:
        for depth, step in enumerate(schedule):
            nodes.setdefault(schedule[:depth], set()).add(step)
    return sum(map(_node_evaluations, nodes.values()))


def _node_evaluations(steps: Iterable[Step]) -> float:
    """Of steps that start from one state: what of them can be shared is computed once."""
    merged, attentions, own_ffns, ffns = 0, set[int](), set[int](), 0
    for step in steps:
        if step.form == "merge":
            merged += 1
            continue
        attentions.update(step.layers)
        if step.form == "par" or len(step.layers) == 1:
            own_ffns.update(step.layers)
        else:
            ffns += len(step.layers)
    return merged + (len(attentions) + len(own_ffns) + ffns) / 2


class Runner:
    """Runs schedules of one model on one set of token ids."""

    def __init__(self, loaded: Loaded, ids: Tensor) -> None:
        """Embed the tokens and record how the model calls its layers.

        Args:
            loaded: An original model; its layers are called as they are.
            ids: `[windows, length]` int64.

        Raises:
            TruedepthError: The model's family is not supported.
        """
        self.evaluated = 0.0
        """Layers evaluated so far, counted as `layer_evaluations` does."""

        self._model: Any = loaded.model
        self._ids = ids.to(loaded.model.device)
        self._family = loaded.source.family
        self._sublayers = sublayers(self._family, self._model.config)
        self._head = OutputHead(self._model)
        self.layers: list[nn.Module] = list(self._model.base_model.layers)
        self._scratch: nn.Module | None = None
        self._record()

    @property
    def parallel(self) -> bool:
        """Whether a layer's attention and FFN read the same state: then LP and PAR are one."""
        return bool(self._sublayers["parallel"])

    @torch.inference_mode()
    def _record(self) -> None:
        calls: Calls = {}
        embedded: list[Tensor] = []
        attention = self._family.attention.module

        def record_call(index: int) -> Any:
            def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
                calls[index] = {k: v for k, v in kwargs.items() if k != "hidden_states"}

            return hook

        hooks = [
            layer.get_submodule(attention).register_forward_pre_hook(
                record_call(index), with_kwargs=True
            )
            for index, layer in enumerate(self.layers)
        ]
        hooks.append(
            self.layers[0].register_forward_pre_hook(lambda _, args: embedded.append(args[0]))
        )
        self._calls: list[Calls] = []
        try:
            for ids in torch.split(self._ids, BATCH_WINDOWS):
                self._model.base_model(ids, use_cache=False)
                self._calls.append(dict(calls))
        finally:
            for hook in hooks:
                hook.remove()
        # The residual stream is kept in float32, also where the layers compute in bfloat16.
        self.embedded = torch.cat(embedded).float()

    @torch.inference_mode()
    def inputs(self) -> list[Tensor]:
        """The inputs of all layers in the original order, and last the output of the last layer.

        `[windows, length, hidden]` float32 each.
        """
        states = [self.embedded]
        for step in in_order(range(len(self.layers))):
            states.append(_Node(self, states[-1]).run(step))
        return states

    @torch.inference_mode()
    def update(self, layer: int, x: Tensor) -> Tensor:
        """What a layer adds to its input: `f_i(x) = A_i(N_i x) + F_i(N'_i (x + A_i(N_i x)))`."""
        node = _Node(self, x)
        return node.attention(layer) + node.own_ffn(layer)

    def run(self, schedules: Iterable[Schedule]) -> Iterator[tuple[Schedule, Tensor]]:
        """Run schedules, each distinct one once, in an order that shares the most.

        Yields:
            A schedule and the mean NLL of its predictions, `[windows]` float64, nats a token.
        """
        ordered = sorted(set(schedules))
        if ordered:
            yield from self._walk(self.embedded, ordered, 0)

    @torch.inference_mode()
    def _walk(
        self, x: Tensor, schedules: Sequence[Schedule], depth: int
    ) -> Iterator[tuple[Schedule, Tensor]]:
        """Schedules that share their first `depth` steps, which led to the state x."""
        if len(schedules[0]) == depth:
            yield schedules[0], self.nll(x)
            schedules = schedules[1:]
        node = _Node(self, x)
        for step, group in itertools.groupby(schedules, key=lambda schedule: schedule[depth]):
            yield from self._walk(node.run(step), list(group), depth + 1)

    @torch.inference_mode()
    def nll(self, x: Tensor) -> Tensor:
        """Mean NLL of the next tokens over each window, from the last layer's output.

        Args:
            x: `[windows, length, hidden]`.

        Returns:
            `[windows]` float64, nats a token.
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

    def branch(self, number: int, layer: int, x: Tensor, module: nn.Module | None = None) -> Tensor:
        """`A_i(N_i x)` (number 0) or `F_i(N'_i x)` (number 1), in float32.

        `module` stands in for the layer's own weights.
        """
        self.evaluated += 0.5
        module = module or self.layers[layer]
        run = partial(run_branch, self._sublayers, module, number)
        parts = zip(torch.split(x, BATCH_WINDOWS), self._calls, strict=True)
        return torch.cat([run(part, calls[layer]) for part, calls in parts])

    def mean_layer(self, layers: Sequence[int]) -> nn.Module:
        """A layer whose parameters are the means of those layers'; valid until the next call."""
        if self._scratch is None:
            self._scratch = copy.deepcopy(self.layers[0])
        for name, parameter in self._scratch.named_parameters():
            total = torch.zeros_like(parameter, dtype=torch.float32)
            for layer in layers:
                total += self.layers[layer].get_parameter(name)
            parameter.copy_(total.div_(len(layers)))
        return self._scratch


class _Node:
    """A state, and what has been computed from it that several steps can share."""

    def __init__(self, runner: Runner, x: Tensor) -> None:
        self._runner = runner
        self._x = x
        self._attentions: dict[int, Tensor] = {}
        self._own_ffns: dict[int, Tensor] = {}

    def attention(self, layer: int) -> Tensor:
        """`A_i(N_i x)`."""
        if layer not in self._attentions:
            self._attentions[layer] = self._runner.branch(0, layer, self._x)
        return self._attentions[layer]

    def own_ffn(self, layer: int) -> Tensor:
        """`F_i(N'_i (x + A_i(N_i x)))`: the FFN that sees its own layer's attention only."""
        if layer not in self._own_ffns:
            parallel = self._runner.parallel
            entered = self._x if parallel else self._x + self.attention(layer)
            self._own_ffns[layer] = self._runner.branch(1, layer, entered)
        return self._own_ffns[layer]

    def run(self, step: Step) -> Tensor:
        """The state after a step."""
        if step.form == "merge":
            mean = self._runner.mean_layer(step.layers)
            a = self._x + self._runner.branch(0, step.layers[0], self._x, mean)
            entered = self._x if self._runner.parallel else a
            return a + self._runner.branch(1, step.layers[0], entered, mean)
        a = self._x
        for layer in step.layers:
            a = a + self.attention(layer)
        y = a
        for layer in step.layers:
            if step.form == "par" or len(step.layers) == 1 or self._runner.parallel:
                y = y + self.own_ffn(layer)
            else:
                y = y + self._runner.branch(1, layer, a)
        return y
