"""From a model's last hidden states to its logits, by the model's own code.

Some families scale logits or cap them behind the head; calling the head alone would miss that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast


class OutputHead:
    """All that a model does behind its final norm."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Of a model; shares its head."""
        self._embeddings = model.get_output_embeddings()
        self._behind: Any = copy.copy(model)
        self._behind._modules = {**model._modules, model.base_model_prefix: _Given()}

    def __call__(self, states: Tensor) -> Tensor:
        """`[positions, hidden]`, normed, to `[positions, vocabulary]`."""
        # not the module's call: hooks on the whole model are not for a part of it
        logits: Tensor = self._behind.forward(inputs_embeds=states[None], use_cache=False).logits
        return logits[0]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The head's."""
        return iter(self._embeddings.parameters())


class _Given(nn.Module):
    """In the place of a model without a head: has computed already what it is given."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)
