"""A student and its original on the same tokens, and the loss between them.

    loss = (1 - a) τ² KL(original ‖ student) + a NLL of the next token + b error of hidden states

KL is that of the predictions at temperature τ, in nats a token; the error is that of what wide
layers give, ‖h - h*‖² / ‖h*‖² of a token, on average over layers and tokens. Logits are never in
memory for all tokens at once, and what both models have in common is in memory once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from truedepth.evaluate import window_measures
from truedepth.heal_options import Objective
from truedepth.plan import Plan

CHUNK_TOKENS = 512  # whose logits are in memory at a time

Divergence = Callable[[slice, Tensor], Tensor]
"""Sum of τ² KL over some positions, from the student's logits `[positions, vocabulary]` there."""


class Distillation(nn.Module):
    """The student as the module that is trained; the original stands beside it."""

    def __init__(
        self,
        student: PreTrainedModel,
        original: PreTrainedModel,
        plan: Plan,
        objective: Objective,
        kept: KeptPredictions | None = None,
    ) -> None:
        """Join the two.

        Args:
            student: What the plan makes of the original.
            original: Not trained.
            plan: Says which layers' outputs should be alike.
            objective: Of the training.
            kept: Where the original's predictions are kept; each window is predicted once.
        """
        super().__init__()
        self.student = student
        self._beside = [original]  # in a list, so that it is no part of this module
        self._objective, self._kept = objective, kept
        self._alike = [(i + 1, group[-1] + 1) for i, group in enumerate(plan.groups) if group[1:]]

    @property
    def original(self) -> PreTrainedModel:
        """The original."""
        return self._beside[0]

    def forward(self, input_ids: Tensor, number: Tensor, measure: bool = False) -> Tensor:
        """The loss; with `measure`, `[windows, 4]` float32 as `window_measures` gives them.

        Args:
            input_ids: `[windows, length]` int64.
            number: `[windows]` int64: each window's own, by which predictions are kept.
            measure: Compare the two models' predictions of the next tokens.
        """
        if measure:
            return self._measures(input_ids)
        objective = self._objective
        states, outputs = _run(self.student, input_ids, objective.hidden > 0)
        wanted: tuple[Tensor, ...] = ()
        with torch.no_grad():
            if objective.hidden > 0:
                theirs, wanted = _run(self.original, input_ids, True)
            elif objective.next_token < 1 and not (self._kept and self._kept.have(number)):
                theirs, _ = _run(self.original, input_ids, False)
            else:
                theirs = None
            divergence = self._divergence(theirs, number) if objective.next_token < 1 else None
        targets = input_ids[:, 1:].flatten()
        sums = [
            checkpoint(
                self._chunk, chunk, states[chunk], targets[chunk], divergence, use_reentrant=False
            )
            for chunk in _chunks(len(targets))
        ]
        loss: Tensor = torch.stack(sums).sum() / len(targets)
        if objective.hidden > 0:
            errors = [_relative_error(outputs[i], wanted[j]) for i, j in self._alike]
            loss = loss + objective.hidden * torch.stack(errors).mean()
        return loss

    def _divergence(self, states: Tensor | None, number: Tensor) -> Divergence:
        """From the original's last hidden states, or from what was kept."""
        temperature = self._objective.temperature
        if self._kept is None:
            assert states is not None
            head = self.original.get_output_embeddings()

            def divergence(chunk: slice, logits: Tensor) -> Tensor:
                reference = (head(states[chunk]).float() / temperature).log_softmax(-1)
                ours = (logits / temperature).log_softmax(-1)
                loss: Tensor = (reference.exp() * (reference - ours)).sum()
                return temperature**2 * loss

            return divergence
        return self._kept.divergence(self.original, states, number, temperature)

    def _chunk(
        self, chunk: slice, states: Tensor, targets: Tensor, divergence: Divergence | None
    ) -> Tensor:
        """Sum of the loss over some positions, without that of hidden states."""
        share = self._objective.next_token
        logits = self.student.get_output_embeddings()(states).float()
        loss: Tensor = logits.new_zeros(())
        if divergence is not None:
            loss = loss + (1 - share) * divergence(chunk, logits)
        if share > 0:
            loss = loss + share * cross_entropy(logits, targets, reduction="sum")
        return loss

    @torch.no_grad()
    def _measures(self, ids: Tensor) -> Tensor:
        models = (self.student, self.original)
        states = [_run(model, ids, False)[0].view(*ids[:, 1:].shape, -1) for model in models]
        rows = []
        for window, targets in enumerate(ids[:, 1:]):
            ours, theirs = (
                lambda chunk, model=model, state=state[window]: model.get_output_embeddings()(
                    state[chunk]
                )
                for model, state in zip(models, states, strict=True)
            )
            rows.append(window_measures(targets, [ours], theirs)[0])
        return torch.stack(rows).to(ids.device, torch.float32)


class KeptPredictions:
    """The original's most likely next tokens, computed once for each window and kept in files."""

    def __init__(self, directory: Path, windows: int, length: int, count: int) -> None:
        """Open the files, or make them.

        Args:
            directory: Where they are.
            windows: That are numbered.
            length: Tokens a window.
            count: Tokens kept at each position, from the most likely on; all the others are one.
        """
        directory.mkdir(parents=True, exist_ok=True)

        def mapped(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            size = torch.Size(shape).numel()
            path = str(directory / name)
            return torch.from_file(path, shared=True, size=size, dtype=dtype).view(shape)

        shape = (windows, length - 1, count)
        self._tokens = mapped("tokens.int32", shape, torch.int32)
        self._values = mapped("values.float16", shape, torch.float16)
        self._done = mapped("done.uint8", (windows,), torch.uint8)

    def have(self, number: Tensor) -> bool:
        """Whether all of these windows are there."""
        return bool(self._done[number.cpu()].all())

    def divergence(
        self, original: PreTrainedModel, states: Tensor | None, number: Tensor, temperature: float
    ) -> Divergence:
        """Of some windows; their predictions are computed from the states where states are given.

        Args:
            original: Whose output head gives the predictions.
            states: `[windows · (length - 1), hidden]`, its last.
            number: `[windows]` int64.
            temperature: Of the predictions, the same in every call.
        """
        rows = number.cpu()
        if states is not None and not self.have(number):
            head = original.get_output_embeddings()
            count = self._tokens.shape[-1]
            found = [
                (head(states[chunk]).float() / temperature).log_softmax(-1).topk(count)
                for chunk in _chunks(len(states))
            ]
            shape = (len(rows), *self._tokens.shape[1:])
            values, tokens = (torch.cat(each) for each in zip(*found, strict=True))
            self._tokens[rows] = tokens.view(shape).cpu().int()
            self._values[rows] = values.view(shape).cpu().half()
            self._done[rows] = 1
        tokens = self._tokens[rows].flatten(0, 1).to(number.device, torch.int64)
        values = self._values[rows].flatten(0, 1).to(number.device, torch.float32)

        def divergence(chunk: slice, logits: Tensor) -> Tensor:
            reference = _with_rest(values[chunk])
            ours = (logits / temperature).log_softmax(-1).gather(-1, tokens[chunk])
            return temperature**2 * (reference.exp() * (reference - _with_rest(ours))).sum()

        return divergence


def _with_rest(values: Tensor) -> Tensor:
    """Log probabilities `[positions, count]`, and behind them that of all other tokens."""
    rest = (1 - values.exp().sum(-1, keepdim=True)).clamp(min=1e-6).log()
    return torch.cat([values, rest], -1)


def _run(model: PreTrainedModel, ids: Tensor, hidden: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The last hidden states of all but the last position, and if asked for what layers give."""
    output: Any = model.base_model(input_ids=ids, use_cache=False, output_hidden_states=hidden)
    return output.last_hidden_state[:, :-1].flatten(0, 1), output.hidden_states or ()


def _relative_error(states: Tensor, wanted: Tensor) -> Tensor:
    difference = (states.float() - wanted.float()).pow(2).sum(-1)
    return (difference / wanted.float().pow(2).sum(-1)).mean()


def _chunks(positions: int) -> list[slice]:
    return [slice(start, start + CHUNK_TOKENS) for start in range(0, positions, CHUNK_TOKENS)]
