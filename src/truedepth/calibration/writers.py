"""What the map of a sub-layer that writes reads and gives, as equations of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from truedepth.errors import TruedepthError
from truedepth.runtime.calls import Calls
from truedepth.runtime.stage import LoadedSublayer


class Writer:
    """A sub-layer whose output is linear in the weights W of one map:

        output = W φ + rest

    Of most sub-layers the rest is the map's bias. A mixture's shared experts, times their gate, are
    one part of its output, and the chosen experts are the rest. In a local stage, φ holds each
    rank's share of what it computes from its own state; mixtures are there left as they are.
    """

    def __init__(self, sublayer: LoadedSublayer, maps: Sequence[str]) -> None:
        """Take a sub-layer and the maps in it that write: one, or none in a mixture.

        Raises:
            TruedepthError: There are several.
        """
        if len(maps) > 1:
            raise TruedepthError(
                f"Several maps of layer {sublayer.index} write: {', '.join(maps)}; this is not"
                " supported."
            )
        self.sublayer, self.name = sublayer, maps[0] if maps else ""
        if sublayer.ranks is not None and sublayer.kind == "ffn" and sublayer.is_mixture:
            self.name = ""

    def run(self, x: Tensor, calls: Calls) -> tuple[list[Tensor], Tensor | float, Tensor]:
        """What the map reads, `[φ]`, and the rest; `[]` and the output if there is none.

        Args:
            x: The state, `[windows, length, hidden]`; in a local stage, those of all ranks.
            calls: How the model calls its attentions.

        Returns:
            φ and the rest, `[windows, length, …]`, and what the sub-layer's module gives.
        """
        if not self.name:
            output = self.sublayer.output(x, calls)
            return [], self.sublayer.summed(output.float()), output
        module: Any = self.sublayer.layer.get_submodule(self.name)
        kept: list[tuple[Tensor, Tensor]] = []
        hook = module.register_forward_hook(
            lambda _, given, output: kept.append((given[0], output))
        )
        output = gave = self.sublayer.output(x, calls)
        hook.remove()
        ((features, written),) = kept
        features = features.reshape(*x.shape[:-1], -1).float()
        written = written.reshape(x.shape).float()
        bias = 0.0 if module.bias is None else module.bias.float()
        if self.sublayer.ranks is not None:
            features = self.sublayer.ranks.own(features)
        if self.sublayer.kind == "attention" or not self.sublayer.is_mixture:
            return [features], bias, gave
        output = output.float()
        hook = module.register_forward_hook(lambda _, given, output: output * 0)
        rest = self.sublayer.output(x, calls).float()
        hook.remove()
        # by how much the gate scales each token
        scale = ((output - rest) * written).sum(-1, keepdim=True)
        scale = scale / written.square().sum(-1, keepdim=True).clamp_min(1e-30)
        return [features * scale], rest + bias * scale, gave
