"""Computes logits from a model's last hidden states, with the model's own code.

Some families scale or cap the logits after the head; calling the head module alone would miss that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast


class OutputHead:
    """Everything that a model computes after its final norm."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a model's head; its parameters are shared, not copied."""
        self._embeddings = model.get_output_embeddings()
        self._behind: Any = copy.copy(model)
        self._behind._modules = {**model._modules, model.base_model_prefix: _Given()}

    def __call__(self, states: Tensor) -> Tensor:
        """Logits `[positions, vocabulary]` of final-normed hidden states `[positions, hidden]`."""
        # forward, not __call__: hooks registered on the whole model must not run for a part of it
        logits: Tensor = self._behind.forward(inputs_embeds=states[None], use_cache=False).logits
        return logits[0]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The head's parameters."""
        return iter(self._embeddings.parameters())


class _Given(nn.Module):
    """Stands in for the model without its head: returns the hidden states that it is given."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)
