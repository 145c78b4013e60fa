"""How strongly layers and sub-layers depend on one another, measured without a sweep over spans.

Every measure gives one figure per pair i < j, of layers or of sub-layers in the order A0 F0 A1 F1,
from the hidden states of the original model, averaged over all tokens. f_i is what i adds to the
state x_i that it reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from truedepth.depth_study.schedule import Runner
from truedepth.plan.stages import Sublayer

MEASURES = {
    "interaction": "E‖f_j(x_j) - f_j(x_j - f_i)‖ / E‖f_j(x_j)‖: how j's update changes without i's",
    "input similarity": "E cos(x_i, x_j): how alike the inputs of i and j are",
    "update size": "E‖f_i‖ / E‖x_j‖: the size of i's update relative to j's input",
}
"""The measures and their formulas.

Merging should cost more where interaction and update size are high and inputs differ.
"""

Advance = Callable[[int], object]


def dependence(runner: Runner, advance: Advance = lambda steps: None) -> dict[str, Tensor]:
    """Every measure of layers, `[layers, layers]` float64, NaN on and below the diagonal.

    Costs one layer evaluation per pair and one per layer; `advance(1)` is called after each pair.
    """
    states = runner.inputs()
    updates = [after - before for before, after in itertools.pairwise(states)]
    return _measures(states[:-1], updates, runner.update, lambda i, j: True, advance)


def sublayer_dependence(runner: Runner, advance: Advance = lambda steps: None) -> dict[str, Tensor]:
    """Every measure of sub-layers, `[2 layers, 2 layers]` float64, NaN on and below the diagonal.

    Where attention and FFN of a layer read the same state, the FFN loses nothing without the
    attention: their interaction is 0. Costs half a layer evaluation per pair.
    """
    states = runner.sublayer_inputs()
    sublayers = [Sublayer.at(position) for position in range(len(states))]
    updates = [runner.added(each, x) for each, x in zip(sublayers, states, strict=True)]

    def update(j: int, x: Tensor) -> Tensor:
        return runner.added(sublayers[j], x)

    def is_seen(i: int, j: int) -> bool:
        return not (runner.parallel and sublayers[i].layer == sublayers[j].layer)

    return _measures(states, updates, update, is_seen, advance)


def _measures(
    states: Sequence[Tensor],
    updates: Sequence[Tensor],
    update: Callable[[int, Tensor], Tensor],
    is_seen: Callable[[int, int], bool],
    advance: Advance,
) -> dict[str, Tensor]:
    """The measures from what each reads and adds, and `update(j, x)`, what j adds to a state x."""
    count = len(states)
    matrices = {
        name: torch.full((count, count), float("nan"), dtype=torch.float64) for name in MEASURES
    }
    for j, (x_j, f_j) in enumerate(zip(states, updates, strict=True)):
        size = _norm(f_j)
        for i, (x_i, f_i) in enumerate(zip(states[:j], updates, strict=False)):
            lost = _norm(update(j, x_j - f_i) - f_j) if is_seen(i, j) else 0.0
            matrices["interaction"][i, j] = lost / size
            matrices["input similarity"][i, j] = cosine_similarity(x_i, x_j, -1).mean().item()
            matrices["update size"][i, j] = _norm(f_i) / _norm(x_j)
            advance(1)
    return matrices


def _norm(x: Tensor) -> float:
    return float(x.norm(dim=-1).mean())
