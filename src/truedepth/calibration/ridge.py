"""Linear maps refitted by ridge regression, from sums over tokens that fit in memory.

    W = argmin Σ_t ‖W x_t - z_t‖² + λ m ‖W - W⁰‖²        m: mean of the diagonal of Σ_t x_t x_tᵀ

Large λ gives W⁰ back. Which λ is chosen on tokens held out; the map is then solved on all of them,
and stays W⁰ where no λ does better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from truedepth.calibration.options import IN_FLOAT32
from truedepth.errors import TruedepthError

LAMBDAS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)

BLOCK_ROWS = 4096  # of held-out tokens at a time


@dataclass(frozen=True)
class Fit:
    """A refitted map, and what was gained on the tokens held out."""

    weight: Tensor
    """`[outputs, inputs]` float32, on the CPU."""

    penalty: float
    """λ; infinite where the map was left as it was."""

    before: float
    """Σ‖W⁰ x - z‖² / Σ‖z‖² of the held-out tokens."""

    after: float
    """The same error for the map that was solved on the other tokens."""


class Regression:
    """Sums over tokens that one map is solved from, and the tokens held out."""

    def __init__(
        self, parts: Sequence[int], outputs: int, device: torch.device | str = "cpu"
    ) -> None:
        """Sums for a map from the joined inputs of several maps.

        Args:
            parts: Elements of each map's inputs. m is the mean over those of one map.
            outputs: Elements of the outputs.
            device: Where to sum.
        """
        inputs = sum(parts)
        self._parts = list(parts)
        self._gram = torch.zeros(inputs, inputs, device=device)
        self._cross = torch.zeros(inputs, outputs, device=device)
        self._held: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, z: Tensor, held: Tensor) -> None:
        """Add the tokens of some windows; those of held-out windows are kept to choose λ on.

        Args:
            x: `[windows, length, inputs]`, in any floating dtype; summed in float32.
            z: `[windows, length, outputs]`.
            held: `[windows]` bool.
        """
        held = held.to(x.device)
        if held.any():
            self._held.append((x[held].flatten(0, 1), z[held].flatten(0, 1)))
        self._sum(x[~held].flatten(0, 1), z[~held].flatten(0, 1))

    def _sum(self, x: Tensor, z: Tensor) -> None:
        x, z = x.float(), z.float()
        self._gram.addmm_(x.T, x)
        self._cross.addmm_(x.T, z)

    def solve(self, prior: Tensor, lambdas: Sequence[float] = LAMBDAS) -> Fit:
        """Solve for the map; ends this regression.

        Args:
            prior: W⁰, `[outputs, inputs]`.
            lambdas: Penalties to choose from on held-out tokens; without any, the first is used.

        Raises:
            TruedepthError: The sums are not finite or not positive definite.
        """
        prior = prior.to(self._gram)
        check_finite(self._gram, self._cross)
        before = after = float("nan")
        penalty = lambdas[0]
        if self._held:
            before, after, penalty = self._choose(prior, lambdas)
            for x, z in self._held:
                self._sum(x, z)
        weight = prior if penalty == float("inf") else self._solution(prior, penalty)
        return Fit(weight.cpu(), penalty, before, after)

    def _choose(self, prior: Tensor, lambdas: Sequence[float]) -> tuple[float, float, float]:
        """Errors of the prior and of the best map, and its λ: the error has one minimum in λ."""
        before = self._error(prior)
        best, penalty = before, float("inf")
        for candidate in sorted(lambdas, reverse=True):
            error = self._error(self._solution(prior, candidate))
            if error > best:
                break
            best, penalty = error, candidate
        return before, best, penalty

    def _solution(self, prior: Tensor, penalty: float) -> Tensor:
        system = self._gram.clone()
        for diagonal in torch.split(system.diagonal(), self._parts):
            diagonal.add_(penalty * diagonal.mean())
        factor, info = torch.linalg.cholesky_ex(system)
        if info.item():
            raise TruedepthError(
                f"The Gram matrix of {len(self._gram)} inputs is not positive definite at"
                f" λ = {penalty:g}; give more calibration tokens or a larger λ.",
                1,
            )
        del system
        gap = self._cross - self._gram @ prior.T
        return prior + torch.cholesky_solve(gap, factor).T

    def _error(self, weight: Tensor) -> float:
        lost, total = 0.0, 0.0
        for x, z in self._blocks():
            lost += (x @ weight.T - z).double().pow(2).sum().item()
            total += z.double().pow(2).sum().item()
        return lost / total if total else 0.0

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, z in self._held:
            for start in range(0, len(x), BLOCK_ROWS):
                rows = slice(start, start + BLOCK_ROWS)
                yield x[rows].float(), z[rows].float()


def check_finite(*sums: Tensor) -> None:
    """Refuse sums over tokens that are not finite.

    Raises:
        TruedepthError: One is not.
    """
    if not all(each.isfinite().all() for each in sums):
        raise TruedepthError(
            f"The activations on the calibration text are not finite. {IN_FLOAT32}", 1
        )
