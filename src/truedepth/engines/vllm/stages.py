"""Stages of sub-layers in vLLM's decoder layers. Only vLLM imports this module.

vLLM's layers pass on what was added last and the stream that it is still to be added to. While a
stage is open, that is its sum so far and the state x that its members read, so nothing else crosses
from layer to layer. A stage ends in one all-reduce: its members leave out their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_pp_group, tensor_model_parallel_all_reduce

from truedepth.plan.stages import ATTENTION, Stage, stage_of


class Staged:
    """Mixed into a decoder layer that has a sub-layer in a stage of several.

    These flags mean what they mean in `modeling.Staged`.
    """

    continues = joined = leaves_open = False

    attends_alone = feeds_alone = True
    """Whether attention and FFN are stages of their own, whose maps reduce what they write."""

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Called like a Llama layer of vLLM.

        Args:
            positions: `[tokens]`.
            hidden_states: What was added last, or the sum so far of an open stage; `[tokens,
                hidden]`.
            residual: What it is to be added to, `[tokens, hidden]`.
        """
        layer: Any = self
        if self.continues:
            assert residual is not None
            x, normed = residual, layer.input_layernorm(residual)
        elif residual is None:
            x, normed = hidden_states, layer.input_layernorm(hidden_states)
        else:
            normed, x = layer.input_layernorm(hidden_states, residual)
        added = layer.self_attn(positions=positions, hidden_states=normed)
        added = hidden_states + added if self.continues else added
        if self.joined:
            added = added + layer.mlp(layer.post_attention_layernorm(x))
        else:
            added = added if self.attends_alone else tensor_model_parallel_all_reduce(added)
            normed, x = layer.post_attention_layernorm(added, x)
            added = layer.mlp(normed)
        if not self.leaves_open and not self.feeds_alone:
            added = tensor_model_parallel_all_reduce(added)
        return added, x


class StagedGranite(Staged):
    """The same for Granite, whose layers pass on the stream alone and scale what they add.

    While a stage is open, x and the sum so far cross as `[2, tokens, hidden]`.
    """

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Called like a Granite layer of vLLM."""
        layer: Any = self
        x, so_far = hidden_states.unbind(0) if self.continues else (hidden_states, None)
        normed = layer.input_layernorm(x)
        added = layer.self_attn(positions=positions, hidden_states=normed)
        added = added if so_far is None else so_far + added
        if self.joined:
            added = added + layer.mlp(layer.post_attention_layernorm(x))
        else:
            added = added if self.attends_alone else tensor_model_parallel_all_reduce(added)
            x = x + added * layer.residual_multiplier
            added = layer.mlp(layer.post_attention_layernorm(x))
        if self.leaves_open:
            return torch.stack([x, added])
        added = added if self.feeds_alone else tensor_model_parallel_all_reduce(added)
        y: Tensor = x + added * layer.residual_multiplier
        return y


def merge_stages(model: nn.Module, config: Any) -> None:
    """Let sub-layers of vLLM's layers read one state, in place.

    Args:
        model: vLLM's model without the head.
        config: The checkpoint's, whose `stages` say which.

    Raises:
        ValueError: Layers that a stage spans are in different processes of a pipeline.
    """
    if config.stages and get_pp_group().world_size > 1:
        raise ValueError(
            "vLLM runs stages of sub-layers with tensor parallelism, not with pipeline parallelism"
        )
    for names in config.stages or ():
        _merge(model.layers, stage_of(names))


def _merge(layers: Any, stage: Stage) -> None:
    for sublayer in stage:
        layer = layers[sublayer.layer]
        if not isinstance(layer, Staged):
            own = type(layer)
            staged = StagedGranite if hasattr(layer, "residual_multiplier") else Staged
            layer.__class__ = type(own.__name__, (staged, own), {"__module__": own.__module__})
        if sublayer.kind == ATTENTION:
            layer.attends_alone = layer.self_attn.o_proj.reduce_results = False
        else:
            layer.feeds_alone = layer.mlp.down_proj.reduce_results = False
    for sublayer in stage[:-1]:
        layer = layers[sublayer.layer]
        if sublayer.kind == ATTENTION:
            layer.joined = True
        else:
            layer.leaves_open = layers[sublayer.layer + 1].continues = True
