"""Ridge solutions against a direct dense solve."""

from __future__ import annotations

import math

import pytest
import torch

import truedepth as td
from truedepth.calibration.ridge import Regression

INPUTS, OUTPUTS = 12, 5


def made(windows=8, length=20, noise=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(windows, length, INPUTS, generator=generator) * torch.linspace(0.2, 3, INPUTS)
    truth = torch.randn(OUTPUTS, INPUTS, generator=generator)
    z = x @ truth.T + noise * torch.randn(windows, length, OUTPUTS, generator=generator)
    return x, z, truth, torch.randn(OUTPUTS, INPUTS, generator=generator)


def summed(x, z, held=None):
    regression = Regression([INPUTS], OUTPUTS)
    held = torch.zeros(len(x), dtype=torch.bool) if held is None else held
    for start in range(0, len(x), 3):  # in batches
        batch = slice(start, start + 3)
        regression.add(x[batch], z[batch], held[batch])
    return regression


def dense(x, z, prior, penalty, scale_of=None):
    """Least squares over the tokens and one row for every penalised element."""
    x, z, prior = x.flatten(0, 1).double(), z.flatten(0, 1).double(), prior.double()
    weight = math.sqrt(penalty * x.pow(2).sum(0).mean())
    rows = torch.cat([x, weight * torch.eye(INPUTS, dtype=torch.float64)])
    return torch.linalg.lstsq(rows, torch.cat([z, weight * prior.T])).solution.T.float()


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0, 100.0])
def test_solutions_are_those_of_a_dense_solve(penalty):
    x, z, _, prior = made()
    fit = summed(x, z).solve(prior, [penalty])
    torch.testing.assert_close(fit.weight, dense(x, z, prior, penalty), atol=1e-4, rtol=1e-4)
    assert fit.penalty == penalty


def test_each_part_of_the_inputs_counts_by_its_own_size():
    x, z, _, prior = made()
    x = x * torch.tensor([1.0] * 4 + [30.0] * 8)
    regression = Regression([4, 8], OUTPUTS)
    regression.add(x, z, torch.zeros(len(x), dtype=torch.bool))
    flat = x.flatten(0, 1).double()
    weights = torch.cat(
        [part.pow(2).sum(0).mean().sqrt().expand(part.shape[1]) for part in flat.split([4, 8], 1)]
    )
    rows = torch.cat([flat, math.sqrt(0.3) * weights.diag()])
    aims = torch.cat([z.flatten(0, 1).double(), math.sqrt(0.3) * weights[:, None] * prior.T])
    expected = torch.linalg.lstsq(rows, aims).solution.T.float()
    torch.testing.assert_close(
        regression.solve(prior, [0.3]).weight, expected, atol=1e-4, rtol=1e-4
    )


def test_a_large_penalty_gives_the_prior():
    x, z, _, prior = made()
    torch.testing.assert_close(summed(x, z).solve(prior, [1e9]).weight, prior, atol=1e-5, rtol=1e-5)


def test_the_penalty_is_the_best_on_what_is_held_out():
    x, z, _, prior = made(noise=6.0)
    held = torch.arange(8) % 4 == 3
    lambdas = [1e-3, 1e-2, 0.1, 1.0, 10.0]
    fit = summed(x, z, held).solve(prior, lambdas)

    def error(weight):
        return ((x[held] @ weight.T - z[held]).pow(2).sum() / z[held].pow(2).sum()).item()

    errors = {each: error(dense(x[~held], z[~held], prior, each)) for each in lambdas}
    assert fit.penalty == min(errors, key=errors.get)
    assert 1e-3 < fit.penalty < 10  # neither end: there was something to choose
    assert fit.before == pytest.approx(error(prior), rel=1e-4)
    assert fit.after == pytest.approx(min(errors.values()), rel=1e-4)
    expected = dense(x, z, prior, fit.penalty)  # on all tokens
    torch.testing.assert_close(fit.weight, expected, atol=1e-3, rtol=1e-3)


def test_a_map_that_cannot_be_bettered_is_left_alone():
    x, z, truth, _ = made(noise=20.0)
    held = torch.arange(8) == 7
    fit = summed(x, z, held).solve(truth)
    assert torch.equal(fit.weight, truth)
    assert fit.penalty == math.inf
    assert fit.before == fit.after


def test_activations_that_are_no_numbers():
    x, z, _, prior = made()
    x[3, 4, 5] = math.inf
    with pytest.raises(td.TruedepthError, match="not finite"):
        summed(x, z).solve(prior)


def test_too_few_tokens_without_a_penalty():
    x, z, _, prior = made(windows=1, length=4)
    with pytest.raises(td.TruedepthError, match="12 inputs is not positive definite at λ = 0"):
        summed(x, z).solve(prior, [0.0])
