"""A student and the loss that takes it toward its original.

    loss = (1 - a) τ² KL(original ‖ student) + a NLL of the next token + b error of hidden states

KL is that of the predictions at temperature τ, in nats a token; the error is that of what wide
layers give, ‖h - h*‖² / ‖h*‖² of a token, on average over layers and tokens. Logits are never in
memory for all tokens at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from truedepth.heal_options import Objective
from truedepth.plan import Plan
from truedepth.teacher import Outputs, Reference, Teacher, chunks, run


class Distillation(nn.Module):
    """The student as the module that is trained; its teachers stand beside it."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher,
        validation: Teacher,
        plan: Plan,
        objective: Objective,
    ) -> None:
        """Join them.

        Args:
            student: What the plan makes of the original.
            teacher: Of the windows that are trained on.
            validation: Of those that are measured on.
            plan: Says which layers' outputs should be alike.
            objective: Of the training.
        """
        super().__init__()
        self.student = student
        self._teacher, self._validation = teacher, validation
        self._objective = objective
        self._alike = [(i + 1, group[-1] + 1) for i, group in enumerate(plan.groups) if group[1:]]

    def forward(self, input_ids: Tensor, number: Tensor, measure: bool = False) -> Tensor:
        """The loss; with `measure`, `[windows, 4]` as `evaluate.window_measures` has them.

        Args:
            input_ids: `[windows, length]` int64.
            number: `[windows]` int64, each window's among those of its use.
            measure: Compare the student's predictions of validation windows with the original's.
        """
        if measure:
            return self._measures(input_ids, number)
        objective = self._objective
        hidden = objective.hidden > 0
        states, outputs = run(self.student, input_ids, hidden)
        reference: Reference | None = None
        wanted: Outputs = ()
        if objective.next_token < 1 or hidden:
            reference, wanted = self._teacher.look(input_ids, number, objective.temperature, hidden)
        targets = input_ids[:, 1:].flatten()
        sums = [
            checkpoint(
                self._chunk, chunk, states[chunk], targets[chunk], reference, use_reentrant=False
            )
            for chunk in chunks(targets)
        ]
        loss: Tensor = torch.stack(sums).sum() / len(targets)
        if hidden:
            errors = [_relative_error(outputs[i], wanted[j]) for i, j in self._alike]
            loss = loss + objective.hidden * torch.stack(errors).mean()
        return loss

    def _chunk(
        self, chunk: slice, states: Tensor, targets: Tensor, reference: Reference | None
    ) -> Tensor:
        """Sum of the loss over some positions, without that of hidden states."""
        share = self._objective.next_token
        logits = self._logits(states)
        loss: Tensor = logits.new_zeros(())
        if share < 1:
            assert reference is not None
            loss = loss + (1 - share) * reference.kl(chunk, logits).sum()
        if share > 0:
            loss = loss + share * cross_entropy(logits, targets, reduction="sum")
        return loss

    def _logits(self, states: Tensor) -> Tensor:
        logits: Tensor = self.student.get_output_embeddings()(states).float()
        return logits

    @torch.no_grad()
    def _measures(self, ids: Tensor, number: Tensor) -> Tensor:
        states, _ = run(self.student, ids, False)
        reference, _ = self._validation.look(ids, number, 1.0, False)
        targets = ids[:, 1:].flatten()
        rows = []
        for chunk in chunks(targets):
            logits, wanted = self._logits(states[chunk]), targets[chunk]
            measures = (
                cross_entropy(logits, wanted, reduction="none"),
                reference.nll(chunk, wanted),
                reference.kl(chunk, logits),
                reference.best(chunk) == logits.argmax(-1),
            )
            rows.append(torch.stack([each.float() for each in measures], -1))
        return torch.cat(rows).view(len(ids), -1, 4).mean(1)


def _relative_error(states: Tensor, wanted: Tensor) -> Tensor:
    difference = (states.float() - wanted.float()).pow(2).sum(-1)
    return (difference / wanted.float().pow(2).sum(-1)).mean()
