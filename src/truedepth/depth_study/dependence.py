"""How strongly layers depend on one another, measured without a sweep over spans.

Every measure gives one figure per pair of layers i < j, from the hidden states of the original
model, averaged over all tokens. f_i is what layer i adds to its input x_i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from truedepth.depth_study.schedule import Runner

MEASURES = {
    "interaction": "E‖f_j(x_j) - f_j(x_j - f_i)‖ / E‖f_j(x_j)‖: how j's update changes without i's",
    "input similarity": "E cos(x_i, x_j): how alike the inputs of i and j are",
    "update size": "E‖f_i‖ / E‖x_j‖: the size of i's update relative to j's input",
}
"""The measures and their formulas.

Pairing should cost more where interaction and update size are high and inputs differ.
"""


def dependence(
    runner: Runner, advance: Callable[[int], object] = lambda steps: None
) -> dict[str, Tensor]:
    """Every measure as a matrix `[layers, layers]` float64, NaN on and below the diagonal.

    Costs one layer evaluation per pair and one per layer; `advance(1)` is called after each pair.
    """
    states = runner.inputs()
    count = len(runner.layers)
    matrices = {
        name: torch.full((count, count), float("nan"), dtype=torch.float64) for name in MEASURES
    }
    for j in range(count):
        x_j, f_j = states[j], states[j + 1] - states[j]
        size = _norm(f_j)
        for i in range(j):
            f_i = states[i + 1] - states[i]
            lost = runner.update(j, x_j - f_i) - f_j
            matrices["interaction"][i, j] = _norm(lost) / size
            matrices["input similarity"][i, j] = cosine_similarity(states[i], x_j, -1).mean().item()
            matrices["update size"][i, j] = _norm(f_i) / _norm(x_j)
            advance(1)
    return matrices


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; ties get their mean rank. NaN for fewer than three values."""
    if len(first) < 3:
        return float("nan")
    ranks = torch.stack([_ranks(torch.tensor(v, dtype=torch.float64)) for v in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    smaller = (values[:, None] > values[None]).sum(1)
    equal = (values[:, None] == values[None]).sum(1)
    return smaller + (equal - 1) / 2


def _norm(x: Tensor) -> float:
    return float(x.norm(dim=-1).mean())
