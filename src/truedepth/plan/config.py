"""The plan as config.json says it: its one reader and writer."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from truedepth.errors import TruedepthError
from truedepth.plan.plan import MAX_LAYERS, Plan

GroupLayers = tuple[tuple[int, ...], ...]
"""For each group of a plan its layers in the converted model: one wide layer, or each member."""


def plan_entries(widths: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """What config.json says of a plan.

    Args:
        widths: Of every group the number of its layers in the original and in the converted model:
            the second is 1 for a wide layer, else the same.
    """
    entries: list[int] = []
    side_by_side: list[list[int]] = []
    for members, layers in widths:
        if layers > 1:
            side_by_side.append(list(range(len(entries), len(entries) + layers)))
        entries += [members] if layers == 1 else [1] * layers
    beside = {"side_by_side": side_by_side} if side_by_side else {}
    return {"num_hidden_layers": len(entries), "layer_widths": entries, **beside}


def plan_of(config: Mapping[str, Any]) -> Plan | None:
    """The plan of a converted checkpoint, from its config.json; None for any other model.

    Raises:
        TruedepthError: `layer_widths` or `side_by_side` hold something else.
    """
    widths = config.get("layer_widths")
    if not isinstance(widths, list) or not all(type(width) is int for width in widths):
        return None
    if not all(1 <= width <= MAX_LAYERS for width in widths) or len(widths) > MAX_LAYERS:
        raise TruedepthError(
            f"layer_widths must be integers from 1 to {MAX_LAYERS}, not {reprlib.repr(widths)}."
        )
    Plan(sum(widths))  # refuses too many
    members = iter(range(sum(widths)))
    sizes = [sum(widths[layer] for layer in layers) for layers in group_layers(config)]
    return Plan(sum(widths), [[next(members) for _ in range(size)] for size in sizes])


def group_layers(config: Mapping[str, Any]) -> GroupLayers:
    """The layers of a model that stand for each group of its plan, by its config.json.

    A wide layer stands for a group by itself; layers that run side by side are as many as the group
    has. An original's layers stand for themselves.

    Raises:
        TruedepthError: `side_by_side` is not a list of groups of consecutive layers.
    """
    depth = len(config.get("layer_widths") or range(config["num_hidden_layers"]))
    side_by_side: dict[int, tuple[int, ...]] = {}
    groups: Sequence[Sequence[int]] = config.get("side_by_side") or []
    try:
        for group in Plan(depth, groups).groups if groups else ():
            if len(group) > 1:
                side_by_side[group[0]] = group
    except (TruedepthError, TypeError) as error:
        raise TruedepthError(
            f"side_by_side of a config must be a list of groups of layers: {error}"
        ) from error
    inside = {layer for group in side_by_side.values() for layer in group[1:]}
    return tuple(side_by_side.get(layer, (layer,)) for layer in range(depth) if layer not in inside)
