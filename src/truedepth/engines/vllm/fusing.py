"""Fuses merged stages in vLLM, once the weights are loaded. Only vLLM imports this module.

As in `runtime/fusing.py`, one norm and one product serve all maps that read, and one product all
maps that write. The attentions of a stage become one, over the heads of all, with one KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ReplicatedLinear, RowParallelLinear

from truedepth.plan.stages import ATTENTION, FFN, Sublayer
from truedepth.runtime.fusing import fold, join_biases, unit_norm


class Member:
    """A sub-layer of one of vLLM's layers."""

    MAPS = {ATTENTION: ("qkv_proj", "o_proj"), FFN: ("gate_up_proj", "down_proj")}  # noqa: RUF012
    """The map that reads and the one that writes, in the families whose stages are fused."""

    OTHERWISE = {"mlp": ("block_sparse_moe", "moe", "feed_forward")}  # noqa: RUF012
    """What vLLM calls modules of transformers."""

    def __init__(self, layers: Any, which: Sublayer, form: Mapping[str, Any]) -> None:
        """Find its parts in a layer.

        Args:
            layers: vLLM's.
            which: The sub-layer.
            form: What transformers calls them: `sublayers` of config.json.

        Raises:
            ValueError: The layer has other parts.
        """
        layer = layers[which.layer]
        self.reads, self.writes = self.MAPS[which.kind]
        self.attends = which.kind == ATTENTION
        module, norm, post_norm = form[which.kind]
        self.module = self._part(layer, module)
        self.norm = None if norm is None else self._part(layer, norm)
        self.post_norm = None if post_norm is None else self._part(layer, post_norm)

    def _part(self, layer: Any, name: str) -> Any:
        for each in (name, *self.OTHERWISE.get(name, ())):
            if hasattr(layer, each):
                return getattr(layer, each)
        raise ValueError(
            f"vLLM's {type(layer).__name__} has no {name}, so truedepth cannot run stages in it;"
            " use transformers"
        )

    def give_parts(self) -> None:
        """Leave out the all-reduce behind what it writes.

        Raises:
            ValueError: It has none that can be left out.
        """
        found = False
        for module in self.module.modules():
            experts = getattr(module, "moe_config", None)
            if experts is not None:
                experts.skip_final_all_reduce = found = True
            if isinstance(module, RowParallelLinear):
                module.reduce_results, found = False, True
        if not found:
            raise ValueError(
                f"truedepth does not know how vLLM's {type(self.module).__name__} sums over ranks;"
                " use transformers"
            )

    def __call__(self, positions: Tensor, normed: Tensor) -> Any:
        """What it adds, `[tokens, hidden]`; in a fused stage what it has to write or to attend."""
        if self.attends:
            return self.module(positions=positions, hidden_states=normed)
        return self.module(normed)


class Slice(nn.Module):
    """In the place of a map that reads: its rows of the product of all of them.

    They are copied for more tokens than one: vLLM's activations take their input for contiguous.
    """

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, product: Tensor) -> tuple[Tensor, None]:
        """`[tokens, all rows]` to `[tokens, rows]`, and no bias."""
        return product[:, self.start : self.stop].contiguous(), None


class Unwritten(nn.Module):
    """In the place of a map that writes: what it would read, and no bias."""

    def forward(self, features: Any) -> tuple[Any, None]:
        """Return the features."""
        return features, None


class Unattended(nn.Module):
    """In the place of attention over the heads of one layer: its queries, keys and values."""

    def forward(self, *heads: Tensor) -> tuple[Tensor, ...]:
        """Return them."""
        return heads


class Fused(nn.Module):
    """One norm and two products in the place of those of several sub-layers.

    The attentions among them become one, over the heads of all, with one KV cache.
    """

    def __init__(self, members: Sequence[Member], gain_offset: float) -> None:
        super().__init__()
        self.norm = unit_norm(members[0].norm, gain_offset)
        weights, biases, start = [], [], 0
        for each in members:
            linear = getattr(each.module, each.reads)
            weight, bias = fold(linear.weight.data, linear.bias, each.norm, gain_offset)
            weights.append(weight)
            biases.append(bias)
            setattr(each.module, each.reads, Slice(start, start := start + len(weight)))
        self.read = _product(torch.cat(weights), join_biases(biases, weights))
        weights, total = [], None
        for each in sorted(members, key=lambda each: not each.attends):
            linear = getattr(each.module, each.writes)
            weights.append(linear.weight.data)
            if linear.bias is not None:
                total = linear.bias.data if total is None else total + linear.bias.data
            setattr(each.module, each.writes, Unwritten())
        if total is not None and get_tensor_model_parallel_rank():
            total = torch.zeros_like(total)  # once in the sum
        self.write = _product(torch.cat(weights, 1), total)
        attentions = [each.module for each in members if each.attends]
        self.attention = None
        if len(attentions) > 1:
            self.attention = _joint([each.attn for each in attentions])
            for each in attentions:
                each.attn = Unattended()

    def forward(self, positions: Tensor, normed: Tensor, members: Sequence[Member]) -> Tensor:
        """What the members add, `[tokens, hidden]`; of this rank's part of the weights."""
        x = self.read(normed)
        attended = [each(positions, x) for each in members if each.attends]
        if self.attention is not None:
            heads = [torch.cat(each, -1) for each in zip(*attended, strict=True)]
            attended = [self.attention(*heads)]
        gated = [each(positions, x) for each in members if not each.attends]
        added: Tensor = self.write(torch.cat([*attended, *gated], -1))
        return added


def _joint(attentions: Sequence[Attention]) -> Attention:
    """One attention over the heads of several, in their order."""
    first, config = attentions[0], get_current_vllm_config()
    for each in attentions:
        del config.compilation_config.static_forward_context[each.layer_name]
    return Attention(
        sum(each.num_heads for each in attentions),
        first.head_size,
        first.impl.scale,
        num_kv_heads=sum(each.num_kv_heads for each in attentions),
        cache_config=config.cache_config,
        per_layer_sliding_window=first.sliding_window,
        prefix=first.layer_name,
        attn_type=first.attn_type,
    )


def can_join(attentions: Sequence[Attention]) -> bool:
    """Whether attentions differ in nothing but their heads."""
    first = attentions[0]
    names = ("head_size", "sliding_window", "attn_type", "has_sink")
    return not first.has_sink and all(
        [getattr(each, name) for name in names] == [getattr(first, name) for name in names]
        and each.num_heads * first.num_kv_heads == first.num_heads * each.num_kv_heads
        and each.impl.scale == first.impl.scale
        for each in attentions
    )


def _product(weight: Tensor, bias: Tensor | None) -> Any:
    """A linear map that vLLM prepares and runs as its own; the weight is `[out, in]`."""
    with weight.device:
        linear = ReplicatedLinear(
            weight.shape[1],
            weight.shape[0],
            bias=bias is not None,
            params_dtype=weight.dtype,
            return_bias=False,
            disable_tp=True,
        )
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear
