"""A student, and the loss that trains it toward its original.

    loss = (1 - a) τ² D(original, student) + a NLL of the next token + b error of hidden states

D compares the predictions at temperature τ, in nats per token: KL(original ‖ student), unless the
objective names another divergence. The error compares the outputs h of
the wide layers, and of those with a sub-layer in a stage of several, with the original's h*:
‖h - h*‖² / ‖h*‖² per token, averaged over layers and tokens.
The logits of all tokens are never in memory at once.
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
from truedepth.healing.rollouts import rolled_out
from truedepth.healing.teacher import Outputs, Reference, Teacher, chunks, hidden_states
from truedepth.runtime.output_head import OutputHead
from truedepth.widening.layout import Layout


class Distillation(nn.Module):
    """The student as the module to train; its teachers are not submodules."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher,
        validation: Teacher,
        layout: Layout,
        objective: Objective,
        seed: int = 0,
    ) -> None:
        """Join a student and its teachers.

        Args:
            student: The model to train, made from the original by a plan.
            teacher: The teacher for the training windows.
            validation: The teacher for the validation windows.
            layout: The student's layout; it says which layers' outputs should be alike.
            objective: The loss to minimise.
            seed: Random seed of what the student writes itself.
        """
        super().__init__()
        self.student = student
        self._seed = seed
        self._teacher, self._validation = teacher, validation
        self._objective = objective
        sharing = {each.layer for each in layout.shared_sublayers}
        self._alike = [
            (layers[-1] + 1, group[-1] + 1)
            for group, layers in zip(layout.plan.groups, layout.layers, strict=True)
            if layers[-1] in sharing
        ]

    def forward(self, input_ids: Tensor, number: Tensor, measure: bool = False) -> Tensor:
        """The loss; with `measure`, the means per window of `evaluation.loss.measures`.

        Args:
            input_ids: `[windows, length]` int64.
            number: `[windows]` int64, the index of each window among the training or validation
                windows.
            measure: Compare the student's predictions for validation windows with the original's.

        Returns:
            A scalar in float32; with `measure`, `[windows, 4]` float64.
        """
        if measure:
            return self._measures(input_ids, number)
        objective = self._objective
        if objective.on_policy > 0:
            share, tokens = objective.on_policy, objective.rollout
            input_ids = rolled_out(self.student, input_ids, number, tokens, share, self._seed)
        hidden = objective.hidden > 0
        states, outputs = hidden_states(self.student, input_ids, hidden)
        reference: Reference | None = None
        wanted: Outputs = ()
        if objective.next_token < 1 or hidden:
            reference, wanted = self._teacher.predict(
                input_ids, number, objective.temperature, hidden
            )
        targets = input_ids[:, 1:].flatten()

        def loss_of(chunk: slice, logits: Tensor) -> Tensor:
            return self._prediction_loss(logits, targets[chunk], chunk, reference)

        head = OutputHead(self.student)
        summed: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
            states, head, loss_of, targets, *head.parameters()
        )
        loss = summed / len(targets)
        if hidden:
            errors = [_relative_error(_added_up(outputs[i]), wanted[j]) for i, j in self._alike]
            loss = loss + objective.hidden * torch.stack(errors).mean()
        return loss

    def _prediction_loss(
        self, logits: Tensor, targets: Tensor, chunk: slice, reference: Reference | None
    ) -> Tensor:
        """The loss of the predictions at some positions, summed."""
        share = self._objective.next_token
        loss: Tensor = logits.new_zeros(())
        if share < 1:
            assert reference is not None
            divergence = reference.divergence(chunk, logits, self._objective.divergence)
            loss = loss + (1 - share) * divergence.sum()
        if share > 0:
            loss = loss + share * cross_entropy(logits, targets, reduction="sum")
        return loss

    @torch.no_grad()
    def _measures(self, ids: Tensor, number: Tensor) -> Tensor:
        states, _ = hidden_states(self.student, ids, False)
        reference, _ = self._validation.predict(ids, number, 1.0, False)
        targets, head = ids[:, 1:].flatten(), OutputHead(self.student)
        rows = []
        for chunk in chunks(targets):
            logits, wanted = head(states[chunk]).float(), targets[chunk]
            kl, top1 = reference.divergence(chunk, logits), reference.top1(chunk)
            original = FromOriginal(reference.nll(chunk, wanted), kl, top1)
            rows.append(measures(logits.log_softmax(-1), wanted, original))
        return torch.cat(rows).view(len(ids), -1, 4).mean(1)


class _HeadLoss(torch.autograd.Function):
    """A loss of an output head's logits, summed over chunks of positions.

    The forward pass computes the gradients chunk by chunk, so logits are neither kept nor computed
    twice.
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
        """The loss, a scalar in float32.

        Args:
            ctx: Autograd's context.
            states: `[positions, hidden]`, the last hidden states.
            head: Computes logits `[positions, vocabulary]`.
            loss: Computes the summed loss of a chunk of positions from its logits in float32.
            targets: `[positions]`, the next tokens.
            parameters: The head's parameters.
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
        """The gradients from the forward pass, times the outer one."""
        slopes, *sums = (outer[0] * each for each in ctx.saved_tensors)
        rest = iter(sums)
        return (slopes, None, None, None, *(next(rest) if had else None for had in ctx.trained))


def _added_up(output: Tensor) -> Tensor:
    """The stream behind a layer; one at whose end a stage is open passes on x and a sum."""
    return output.sum(0) if output.ndim == 4 else output


def _relative_error(states: Tensor, wanted: Tensor) -> Tensor:
    difference = (states.float() - wanted.float()).pow(2).sum(-1)
    return (difference / wanted.float().pow(2).sum(-1)).mean()
