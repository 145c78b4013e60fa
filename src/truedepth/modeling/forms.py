"""How a decoder layer computes, and how config.json names its sub-layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

KINDS = ("attention", "ffn")

Entry = Sequence[str] | Mapping[str, Any]
"""A stage in config.json: the names of its sub-layers, such as `A14` and `F14`; a rank-local one
also has its number of ranks: `{"sublayers": ["F14", "A15"], "local": 2}`."""


def places_and_ranks(stage: Entry) -> tuple[list[int], int | None]:
    """The places of a stage's sub-layers, and its number of ranks if it is local.

    Raises:
        ValueError: The number is not one of at least 2.
    """
    if not isinstance(stage, Mapping):
        return list(map(place_of, stage)), None
    ranks = stage.get("local")
    if type(ranks) is not int or ranks < 2:
        raise ValueError(f"a local stage is for at least 2 ranks, not for {ranks!r}")
    return list(map(place_of, stage["sublayers"])), ranks


def place_of(sublayer: str) -> int:
    """The place of `A14` or `F14` in the order A0 F0 A1 F1 …; -1 if it is neither."""
    kind, layer = sublayer[:1], sublayer[1:]
    return 2 * int(layer) + (kind == "F") if kind in ("A", "F") and layer.isdecimal() else -1


@dataclass(frozen=True)
class LayerForm:
    """How the layers of a model compute, by names within a layer; `sublayers` in config.json."""

    attention: Sequence[str | None]
    """Names of the attention, the norm before it and the norm after it; None for a missing norm."""

    ffn: Sequence[str | None]
    """Names of the FFN, the norm before it and the norm after it."""

    parallel: bool
    """Whether attention and FFN read the same state."""

    multiplier: str | None
    """The layer's attribute by which attention's and the FFN's outputs are multiplied, if any."""

    writes: Sequence[Sequence[str]] = ((), ())
    """Names of the modules whose outputs add up to what attention, and what the FFN, gives."""

    def normed(self, layer: Any, kind: str, x: Tensor) -> Tensor:
        """What a sub-layer's module reads, from the residual stream; of the same shape."""
        norm = getattr(self, kind)[1]
        normed: Tensor = x if norm is None else layer.get_submodule(norm)(x)
        return normed

    def output(self, layer: Any, kind: str, normed: Tensor, *args: Any, **call: Any) -> Tensor:
        """What a sub-layer's module gives, `[batch, length, hidden]`.

        Args:
            layer: The decoder layer.
            kind: `attention` or `ffn`.
            normed: What it reads, `[batch, length, hidden]`.
            args: Positional arguments for the module: for attention, those that the layer gets.
            call: Keyword arguments for the module.
        """
        output = layer.get_submodule(getattr(self, kind)[0])(normed, *args, **call)
        whole: Tensor = output[0] if isinstance(output, tuple) else output
        return whole

    def added(self, layer: Any, kind: str, output: Tensor) -> Tensor:
        """What a sub-layer adds to the residual stream, from what its module gives."""
        norm = getattr(self, kind)[2]
        if norm is not None:
            output = layer.get_submodule(norm)(output)
        return output if self.multiplier is None else output * getattr(layer, self.multiplier)

    def added_by_rank(self, layer: Any, kind: str, part: Tensor, ranks: int) -> Tensor:
        """What a rank goes on with of a sub-layer in a local stage, from its part of the output.

        A norm behind the sub-layer would make of the part alone as much as of the whole. Parts that
        are independent of one another are `1 / √ranks` of it.
        """
        added = self.added(layer, kind, part)
        return added if getattr(self, kind)[2] is None else added * ranks**-0.5


def run_sublayer(
    layer: Any, form: LayerForm, kind: str, x: Tensor, *args: Any, **call: Any
) -> Tensor:
    """What a sub-layer adds to the residual stream x, `s(N_s x)`; see `LayerForm.output`."""
    normed = form.normed(layer, kind, x)
    return form.added(layer, kind, form.output(layer, kind, normed, *args, **call))
