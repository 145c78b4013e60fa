"""Columns shared out among ranks, as many to each, so that little is missed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from operator import itemgetter

import torch
from torch import Tensor

LEAST = 1e-5  # of all that is missed: for less, columns do not change places
NEAR = 32  # columns of each rank that are tried with as many of another


@dataclass(frozen=True)
class Missed:
    """What ranks miss of columns: a part that adds up, and parts in which columns matter to each
    other, as what heads miss of several may cancel or add up.
    """

    linear: Tensor
    """What rank r misses if column j is its own, `[columns, ranks]`."""

    heads: list[tuple[list[Tensor], Tensor]] = field(default_factory=list)
    """For attentions: what columns write in what the heads of each rank read, `[rows, columns]`,
    and the covariance of the columns' features, `[columns, columns]`. Rank r misses
    `Σ (T_rᵀ T_r ⊙ C)[i, j]` over all columns i and j that are not its own."""

    def total(self, found: Tensor) -> float:
        """What is missed if columns go to these ranks, `[columns]` int64."""
        own = self.linear.gather(1, found[:, None]).sum()
        for rank in range(self.linear.shape[1]):
            own += self._lacking(found, rank)[found != rank].sum()
        return float(own)

    def _lacking(self, found: Tensor, rank: int) -> Tensor:
        """`Σ_j (T_rᵀ T_r ⊙ C)[i, j]` over the columns j that a rank has not, `[columns]`."""
        lacking = self.linear.new_zeros(len(found))
        for writes, covariance in self.heads:
            missing = writes[rank] * (found != rank)
            lacking += (writes[rank] * (missing @ covariance)).sum(0, dtype=torch.float64)
        return lacking

    def _between(self, rank: int, some: Tensor, others: Tensor) -> Tensor:
        """`(T_rᵀ T_r ⊙ C)[some, others]`."""
        between = self.linear.new_zeros(len(some), len(others))
        for writes, covariance in self.heads:
            each = writes[rank]
            between += each[:, some].T @ each[:, others] * covariance[:, others][some]
        return between

    def least(self) -> Tensor:
        """Ranks for columns, as many columns for each, so that little is missed: `[columns]` int64.

        Columns go first where each by itself is missed least. Then two after two change places, as
        long as that pays.
        """
        columns, ranks = self.linear.shape
        alone = torch.stack([self._diagonal(rank) for rank in range(ranks)], 1)
        found = balanced(self.linear + alone.sum(1, keepdim=True) - alone)
        lacking = torch.stack([self._lacking(found, rank) for rank in range(ranks)], 1)
        total = self.total(found)
        every = torch.arange(columns, device=found.device)
        for _ in range(columns):
            # what it costs if column i goes to rank s while all others stay
            own = found[:, None]
            leaving = (2 * lacking + alone - self.linear).gather(1, own)
            moving = self.linear - 2 * lacking + alone + leaving
            gain, (one, other) = min(self._exchanges(found, moving), key=itemgetter(0))
            if -gain <= LEAST * total:
                break
            for column, to in ((one, found[other].clone()), (other, found[one].clone())):
                at = every[column : column + 1]
                lacking[:, found[column]] += self._between(int(found[column]), every, at)[:, 0]
                lacking[:, to] -= self._between(int(to), every, at)[:, 0]
                found[column] = to
        return found

    def _exchanges(self, found: Tensor, moving: Tensor) -> Iterator[tuple[float, tuple[int, int]]]:
        """The best exchange of columns between every two ranks, and what it costs."""
        for first, second in combinations(range(moving.shape[1]), 2):
            some, others = (
                here[moving[here, there].argsort()[:NEAR]]
                for here, there in (
                    ((found == first).nonzero().squeeze(1), second),
                    ((found == second).nonzero().squeeze(1), first),
                )
            )
            cost = moving[some, second][:, None] + moving[others, first]
            cost -= 2 * (self._between(first, some, others) + self._between(second, some, others))
            best = int(cost.argmin())
            one, other = some[best // len(others)], others[best % len(others)]
            yield float(cost.flatten()[best]), (int(one), int(other))

    def _diagonal(self, rank: int) -> Tensor:
        alone = self.linear.new_zeros(len(self.linear))
        for writes, covariance in self.heads:
            alone += writes[rank].square().sum(0) * covariance.diagonal()
        return alone


def balanced(missed: Tensor) -> Tensor:
    """Ranks for columns, as many columns for each, so that little is missed.

    Every two ranks share their columns out as is best for them, until no two gain by it.

    Args:
        missed: `[columns, ranks]`, not negative; the columns divide by the ranks.

    Returns:
        `[columns]` int64.
    """
    columns, ranks = missed.shape
    found = torch.arange(columns, device=missed.device) // (columns // ranks)
    total = missed.gather(1, found[:, None]).sum()
    while True:
        for first, second in combinations(range(ranks), 2):
            both = ((found == first) | (found == second)).nonzero().squeeze(1)
            order = both[(missed[both, first] - missed[both, second]).argsort(stable=True)]
            found[order[: len(order) // 2]] = first
            found[order[len(order) // 2 :]] = second
        before, total = total, missed.gather(1, found[:, None]).sum()
        if before - total <= LEAST * before:
            return found
