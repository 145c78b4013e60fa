"""NLL, KL and top-1 agreement against their formulas."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy, kl_div

from truedepth.evaluation.loss import FromOriginal, loss_of, measures, window_measures

LOGITS = torch.randn(2, 300, 17, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(300) % 17


def test_measures_are_the_formulas():
    ours, theirs = LOGITS.double().log_softmax(-1)
    (rows,) = window_measures(TARGETS, [LOGITS[0].__getitem__], LOGITS[1].__getitem__)
    expected = [
        cross_entropy(LOGITS[0].double(), TARGETS),
        cross_entropy(LOGITS[1].double(), TARGETS),
        kl_div(ours, theirs, reduction="batchmean", log_target=True),
        (ours.argmax(-1) == theirs.argmax(-1)).double().mean(),
    ]
    torch.testing.assert_close(rows, torch.stack(expected), atol=1e-6, rtol=1e-6)
    assert rows.dtype is torch.float64


def test_without_an_original_there_is_the_nll_alone():
    rows = window_measures(TARGETS, [logits.__getitem__ for logits in LOGITS])
    assert rows.shape == (2, 4)
    for row, logits in zip(rows, LOGITS, strict=True):
        torch.testing.assert_close(row[0].float(), cross_entropy(logits, TARGETS))
        assert row[1:].tolist() == [0, 0, 0]


def test_what_an_original_says_goes_into_its_columns():
    logp = LOGITS[0].log_softmax(-1)
    said = FromOriginal(torch.full((300,), 2.0), torch.full((300,), 0.5), logp.argmax(-1))
    rows = measures(logp, TARGETS, said)
    assert rows[:, 1:].unique(dim=0).tolist() == [[2.0, 0.5, 1.0]]
    torch.testing.assert_close(rows[:, 0].mean().float(), cross_entropy(LOGITS[0], TARGETS))


def test_a_loss_is_the_mean_over_windows_with_its_standard_error():
    rows = torch.tensor([[3.0, 2.0, 0.5, 1.0], [3.5, 2.0, 0.7, 0.5]], dtype=torch.float64)
    loss = loss_of(rows, window=33)
    assert (loss.tokens, loss.excess) == (64, 1.25)
    torch.testing.assert_close(loss.stderr, 0.25)
    torch.testing.assert_close(loss.kl, 0.6)
    assert loss_of(rows[:1], 33).stderr is None
