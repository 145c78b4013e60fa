"""Other methods that make a model shallower without training, after their papers' descriptions.

Every function changes `model.base_model.layers` in place; the caller passes a copy of its own. They
are for comparison only: none of them is part of the package.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from truedepth.depth_study.schedule import Runner, in_order
from truedepth.modeling import LayerForm
from truedepth.plan.plan import Plan
from truedepth.runtime.loading import Loaded
from truedepth.runtime.stage import run_stage, stages_of


def parallel_whole_layers(loaded: Loaded, plan: Plan) -> None:
    """PAR, the form of CQIL (arXiv 2404.06709): the group's layers side by side, each whole."""
    layers = loaded.model.base_model.layers
    _replace(loaded, [_SideBySide(loaded, [layers[i] for i in group]) for group in plan.groups])


class _SideBySide(nn.Module):
    """y = x + Σ_i f_i(x), where x + f_i(x) is the output of layer i."""

    def __init__(self, loaded: Loaded, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self._form = LayerForm(**loaded.source.family.layer_form(loaded.model.config))
        self.members = nn.ModuleList(members)

    def forward(self, hidden_states: Tensor, **call: Any) -> Tensor:
        """Called like a decoder layer."""
        x = hidden_states.float()
        y = x
        for member in self.members:
            state = x
            for stage in stages_of({0: member}, self._form):
                state = run_stage(state, stage, [call])
            y = y + (state - x)
        return y.to(hidden_states.dtype)


def drop_by_influence(loaded: Loaded, ids: Tensor, count: int) -> list[int]:
    """ShortGPT (arXiv 2403.03853): the layers of least block influence, 1 - E cos(x_i, x_{i+1})."""
    states = Runner(loaded, ids).inputs()
    influence = [
        1 - torch.cosine_similarity(before, after, dim=-1).mean().item()
        for before, after in itertools.pairwise(states)
    ]
    dropped = sorted(range(len(influence)), key=influence.__getitem__)[:count]
    drop(loaded, dropped)
    return sorted(dropped)


def greedy_order(loaded: Loaded, ids: Tensor, count: int) -> list[int]:
    """SLEB (arXiv 2402.09025): one layer after another, whichever leaves the least perplexity."""
    runner = Runner(loaded, ids)
    left, dropped = list(range(len(runner.layers))), list[int]()
    for _ in range(count):
        options = {in_order([i for i in left if i != layer]): layer for layer in left}
        losses = {options[done]: nll.mean().item() for done, nll in runner.run(options)}
        least = min(losses, key=losses.__getitem__)
        left.remove(least)
        dropped.append(least)
    return dropped


def drop(loaded: Loaded, layers: Sequence[int]) -> None:
    """Remove layers."""
    kept = [x for i, x in enumerate(loaded.model.base_model.layers) if i not in set(layers)]
    _replace(loaded, kept)


@torch.no_grad()
def patch_linearly(loaded: Loaded, ids: Tensor, count: int) -> list[int]:
    """ReplaceMe (arXiv 2505.02819): a span of layers becomes a linear map after the previous FFN.

    The span is the one over which hidden states turn least (mean cosine distance). The map is the
    least-squares solution T of (M T + Y ≈ L), where M is the FFN's output in the last layer before
    the span, Y is what it is added to and L is the span's output. T is folded into the down
    projection.
    """
    runner = Runner(loaded, ids)
    states = runner.inputs()
    last = len(runner.layers) - count
    turns = {
        start: 1 - torch.cosine_similarity(states[start], states[start + count], dim=-1).mean()
        for start in range(1, last + 1)
    }
    start = min(turns, key=lambda each: turns[each].item())
    attended = states[start - 1] + runner.member("attention", start - 1)(
        states[start - 1], runner.calls
    )
    ffn = runner.member("ffn", start - 1)(attended, runner.calls).flatten(0, 1).double()
    wanted = (states[start + count] - attended).flatten(0, 1).double()
    gram = ffn.T @ ffn
    gram.diagonal().add_(1e-6 * gram.diagonal().mean())
    patch = torch.linalg.solve(gram, ffn.T @ wanted)
    name = loaded.source.family.writes[1]
    weight = runner.layers[start - 1].get_parameter(f"{name}.weight")
    weight.copy_(patch.T @ weight.double())
    dropped = list(range(start, start + count))
    drop(loaded, dropped)
    return dropped


def _replace(loaded: Loaded, layers: Sequence[nn.Module]) -> None:
    model = loaded.model
    model.base_model.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    model.config.use_cache = False  # layers keep the numbers that caches know them by
