"""A student and the loss that takes it toward its original.

    loss = (1 - a) τ² KL(original ‖ student) + a NLL of the next token + b error of hidden states

KL is that of the predictions at temperature τ, in nats a token; the error is that of what wide
layers give, ‖h - h*‖² / ‖h*‖² of a token, on average over layers and tokens. Logits are never in
memory for all tokens at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from truedepth.evaluation.loss import FromOriginal, measures
from truedepth.healing.options import Objective
from truedepth.healing.teacher import Outputs, Reference, Teacher, chunks, run
from truedepth.runtime.output_head import OutputHead
from truedepth.widening.layout import Layout


class Distillation(nn.Module):
    """The student as the module that is trained; its teachers stand beside it."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher,
        validation: Teacher,
        layout: Layout,
        objective: Objective,
    ) -> None:
        """Join them.

        Args:
            student: What the plan makes of the original.
            teacher: Of the windows that are trained on.
            validation: Of those that are measured on.
            layout: Of the student; says which layers' outputs should be alike.
            objective: Of the training.
        """
        super().__init__()
        self.student = student
        self._teacher, self._validation = teacher, validation
        self._objective = objective
        self._alike = [
            (layers[-1] + 1, group[-1] + 1)
            for group, layers in zip(layout.plan.groups, layout.layers, strict=True)
            if group[1:]
        ]

    def forward(self, input_ids: Tensor, number: Tensor, measure: bool = False) -> Tensor:
        """The loss; with `measure`, `[windows, 4]` as `evaluation.loss.measures` has them.

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

        def loss_of(chunk: slice, logits: Tensor) -> Tensor:
            return self._predicted(logits, targets[chunk], chunk, reference)

        head = OutputHead(self.student)
        summed: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
            states, head, loss_of, targets, *head.parameters()
        )
        loss = summed / len(targets)
        if hidden:
            errors = [_relative_error(outputs[i], wanted[j]) for i, j in self._alike]
            loss = loss + objective.hidden * torch.stack(errors).mean()
        return loss

    def _predicted(
        self, logits: Tensor, targets: Tensor, chunk: slice, reference: Reference | None
    ) -> Tensor:
        """Sum over some positions of the loss of what is predicted there."""
        share = self._objective.next_token
        loss: Tensor = logits.new_zeros(())
        if share < 1:
            assert reference is not None
            loss = loss + (1 - share) * reference.kl(chunk, logits).sum()
        if share > 0:
            loss = loss + share * cross_entropy(logits, targets, reduction="sum")
        return loss

    @torch.no_grad()
    def _measures(self, ids: Tensor, number: Tensor) -> Tensor:
        states, _ = run(self.student, ids, False)
        reference, _ = self._validation.look(ids, number, 1.0, False)
        targets, head = ids[:, 1:].flatten(), OutputHead(self.student)
        rows = []
        for chunk in chunks(targets):
            logits, wanted = head(states[chunk]).float(), targets[chunk]
            original = FromOriginal(
                reference.nll(chunk, wanted), reference.kl(chunk, logits), reference.best(chunk)
            )
            rows.append(measures(logits.log_softmax(-1), wanted, original))
        return torch.cat(rows).view(len(ids), -1, 4).mean(1)


class _HeadLoss(torch.autograd.Function):
    """A loss of the logits that an output head gives, summed over chunks of positions.

    Gradients are taken chunk by chunk on the way forward, so no logits are kept or computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head: OutputHead,
        loss: Callable[[slice, Tensor], Tensor],
        targets: Tensor,
        *parameters: nn.Parameter,
    ) -> Tensor:
        """The sum.

        Args:
            ctx: autograd's.
            states: `[positions, hidden]`.
            head: Gives `[positions, vocabulary]`.
            loss: Of some positions, from their logits in float32.
            targets: `[positions]`.
            parameters: The head's.
        """
        total = states.new_zeros((), dtype=torch.float32)
        slopes = torch.empty_like(states)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        sums = [torch.zeros_like(parameter) for parameter in trained]
        for chunk in chunks(targets):
            with torch.enable_grad():
                inputs = states[chunk].detach().requires_grad_()
                logits = head(inputs)
                leaf = logits.detach().float().requires_grad_()
                value = loss(chunk, leaf)
            (slope,) = torch.autograd.grad(value, leaf)
            found = torch.autograd.grad(logits, (inputs, *trained), slope.to(logits.dtype))
            slopes[chunk] = found[0]
            for each, more in zip(sums, found[1:], strict=True):
                each += more
            total += value.detach()
        ctx.save_for_backward(slopes, *sums)
        ctx.trained = [parameter.requires_grad for parameter in parameters]
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that were taken."""
        slopes, *sums = (outer[0] * each for each in ctx.saved_tensors)
        rest = iter(sums)
        return (slopes, None, None, None, *(next(rest) if had else None for had in ctx.trained))


def _relative_error(states: Tensor, wanted: Tensor) -> Tensor:
    difference = (states.float() - wanted.float()).pow(2).sum(-1)
    return (difference / wanted.float().pow(2).sum(-1)).mean()
