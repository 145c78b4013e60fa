"""Wide layers: several of a family's decoder layers as one of its own class, built wider."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDENED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""The values of a config that grow with a layer's width."""


class LayerConfig:
    """The model's config as a layer of a given width sees it.

    It is a live view, not a copy: `model.set_attn_implementation(...)` changes the model's config
    after construction, and wide layers must follow.
    """

    def __init__(self, config: Any, width: int) -> None:
        self._config = config
        self._width = width

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_config", "_width"):  # copy and pickle ask early
            raise AttributeError(name)
        value = getattr(self._config, name)
        return value * self._width if name in WIDENED else value


def wide_layer(layer: nn.Module, config: Any, width: int, index: int) -> nn.Module:
    """A layer of the same class, `width` times as wide, with new weights.

    Args:
        layer: A layer of a model of the original family.
        config: The model's config, with `head_dim`: a wide layer's heads do not determine it.
        width: The width as a multiple of the layer's.
        index: The layer's index in the model.
    """
    own = LayerConfig(config, width)
    wide: nn.Module = type(layer)(own, index)
    _give_heads_their_gains(wide, own)
    return wide


def _give_heads_their_gains(layer: nn.Module, config: Any) -> None:
    """Give every head its own q and k gains: a wide layer's heads come from different layers."""
    heads = {"q_norm": config.num_attention_heads, "k_norm": config.num_key_value_heads}
    for module in list(layer.modules()):
        for name, norm in module.named_children():
            if name in heads and norm.weight.ndim == 1:
                setattr(module, name, HeadNorm(norm, heads[name]))


class HeadNorm(nn.Module):
    """RMSNorm over each head, with gains per head: weight `[heads, head_dim]`."""

    def __init__(self, norm: Any, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach().expand(heads, -1).clone())
        self.variance_epsilon = norm.variance_epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Takes and gives `[..., heads, head_dim]`; under tensor parallelism, this rank's heads."""
        gains: Tensor = self.weight
        held = hidden_states.shape[-2]
        if held < len(gains):
            start = torch.distributed.get_rank() % (len(gains) // held) * held
            gains = gains[start : start + held]
        x = hidden_states.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return gains * x.to(hidden_states.dtype)
