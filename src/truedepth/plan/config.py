"""The plan as config.json says it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from truedepth.errors import TruedepthError
from truedepth.plan.plan import MAX_LAYERS, Plan


def plan_of(config: Mapping[str, Any]) -> Plan | None:
    """The plan of a converted checkpoint, from its config.json; None for any other model."""
    widths = config.get("layer_widths")
    if not isinstance(widths, list) or not all(type(width) is int for width in widths):
        return None
    if not all(1 <= width <= MAX_LAYERS for width in widths) or len(widths) > MAX_LAYERS:
        raise TruedepthError(f"The layer_widths {reprlib.repr(widths)} are no widths of layers.")
    Plan(sum(widths))  # refuses too many
    layers = iter(range(sum(widths)))
    sizes = [sum(widths[index] for index in place) for place in places_of(config)]
    return Plan(sum(widths), [[next(layers) for _ in range(size)] for size in sizes])


def places_of(config: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The layers of a model that stand for each group of its plan, by its config.json.

    A wide layer stands for a group by itself; the layers of a branch group are as many as it has.
    An original's layers stand for themselves.

    Raises:
        TruedepthError: `side_by_side` has no groups of consecutive layers.
    """
    depth = len(config.get("layer_widths") or range(config["num_hidden_layers"]))
    branches: dict[int, tuple[int, ...]] = {}
    groups = config.get("side_by_side") or []
    try:
        for group in Plan(depth, groups).groups if groups else ():
            if len(group) > 1:
                branches[group[0]] = group
    except (TruedepthError, TypeError) as error:
        raise TruedepthError(
            f"The side_by_side of a config is no list of groups: {error}"
        ) from error
    inside = {index for group in branches.values() for index in group[1:]}
    return [branches.get(index, (index,)) for index in range(depth) if index not in inside]


def paired_places(config: Mapping[str, Any]) -> set[int]:
    """The layers of a converted model that stand for, or are in, groups of two and more."""
    plan = plan_of(config)
    groups = plan.groups if plan else ()
    return {
        index
        for group, place in zip(groups, places_of(config), strict=True)
        if len(group) > 1
        for index in place
    }
