"""How columns are shared out, against all the ways in which that can be done."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from truedepth.calibration.shares import LEAST, Missed, balanced


def random_missed(columns, ranks, attentions=2, seed=0):
    """Columns that matter to each other, to heads of five rows on each rank."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    heads = []
    for _ in range(attentions):
        features = random(columns + 3, columns)
        heads.append(([random(5, columns) for _ in range(ranks)], features.T @ features))
    return Missed(random(columns, ranks).abs() * 30, heads)


def plainly(missed, found):
    """The docstring's sums, term by term."""
    total = sum(missed.linear[j, r].item() for j, r in enumerate(found.tolist()))
    for writes, covariance in missed.heads:
        for rank, each in enumerate(writes):
            lacking = (found != rank).nonzero().squeeze(1)
            matters = each.T @ each * covariance
            total += matters[lacking][:, lacking].sum().item()
    return total


def halves(columns):
    """Every way to give half of the columns to the second of two ranks."""
    for second in combinations(range(columns), columns // 2):
        found = torch.zeros(columns, dtype=torch.int64)
        found[list(second)] = 1
        yield found


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_total_is_the_formula(ranks):
    missed = random_missed(12, ranks)
    found = torch.arange(12) % ranks
    assert missed.total(found) == pytest.approx(plainly(missed, found), rel=1e-12)


def test_two_ranks_share_out_as_is_best_where_what_is_missed_adds_up():
    missed = random_missed(8, 2).linear
    best = min(halves(8), key=lambda found: missed.gather(1, found[:, None]).sum().item())
    assert torch.equal(balanced(missed), best)


def test_columns_that_all_ranks_miss_alike_stay():
    assert balanced(torch.ones(12, 3)).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert Missed(torch.zeros(12, 3, dtype=torch.float64)).least().tolist() == [
        *([0] * 4 + [1] * 4 + [2] * 4)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_no_exchange_of_two_columns_pays(ranks, seed):
    missed = random_missed(24, ranks, seed=seed)
    found = missed.least()
    assert torch.bincount(found).tolist() == [24 // ranks] * ranks
    total = plainly(missed, found)
    assert total < plainly(missed, torch.arange(24) // (24 // ranks))
    for one, other in combinations(range(24), 2):
        exchanged = found.clone()
        exchanged[[one, other]] = found[[other, one]]
        assert plainly(missed, exchanged) >= total * (1 - 2 * LEAST)


@pytest.mark.parametrize("seed", range(5))
def test_little_is_missed_beside_the_least_possible(seed):
    """Within a tenth of the way from the best half to the mean of all."""
    missed = random_missed(10, 2, seed=seed)
    totals = torch.tensor([plainly(missed, found) for found in halves(10)])
    least = plainly(missed, missed.least())
    assert least <= totals.min() + 0.1 * (totals.mean() - totals.min())
