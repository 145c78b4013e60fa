"""Writes and reads a plan as config.json holds it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from truedepth.errors import TruedepthError
from truedepth.plan.plan import MAX_LAYERS, Plan
from truedepth.plan.stages import LocalStage, Stage, Sublayer, ranks_of, stage_of, written

GroupLayers = tuple[tuple[int, ...], ...]
"""For each group of a plan, its layers in the converted model: one wide layer, or every member."""


def plan_entries(plan: Plan, layers: GroupLayers) -> dict[str, Any]:
    """The entries of config.json that hold a plan.

    Args:
        plan: The plan.
        layers: For each of its groups, its layers in the converted model.
    """
    pairs = list(zip(plan.groups, layers, strict=True))
    widths = [len(group) if len(at) == 1 else 1 for group, at in pairs for _ in at]
    entries: dict[str, Any] = {"num_hidden_layers": len(widths), "layer_widths": widths}
    if side_by_side := [list(at) for _, at in pairs if len(at) > 1]:
        entries["side_by_side"] = side_by_side
    if plan.merged:
        now = {group[0]: at[0] for group, at in pairs}
        entries["stages"] = [written(stage, now) for stage in plan.merged]
    return entries


def plan_of(config: Mapping[str, Any]) -> Plan | None:
    """The plan of a converted checkpoint, from its config.json; None for any other model.

    Raises:
        TruedepthError: `layer_widths` is out of range, or `side_by_side` or `stages` is malformed.
    """
    widths = config.get("layer_widths")
    if not isinstance(widths, list) or not all(type(width) is int for width in widths):
        return None
    if not all(1 <= width <= MAX_LAYERS for width in widths) or len(widths) > MAX_LAYERS:
        raise TruedepthError(
            f"layer_widths must be 1 to {MAX_LAYERS} integers from 1 to {MAX_LAYERS}, not"
            f" {reprlib.repr(widths)}."
        )
    Plan(sum(widths))  # refuses too many layers
    members = iter(range(sum(widths)))
    sizes = [sum(widths[layer] for layer in layers) for layers in group_layers(config)]
    groups = [[next(members) for _ in range(size)] for size in sizes]
    first = list(accumulate(widths, initial=0))  # the original's layer that a layer begins with
    try:
        stages = [_moved(stage_of(names), first) for names in config.get("stages") or ()]
        return Plan(sum(widths), groups, stages=stages)
    except (TruedepthError, TypeError, IndexError) as error:
        raise TruedepthError(
            f"stages must be a list of lists of neighbouring sub-layers: {error}"
        ) from error


def _moved(stage: Stage, to: Sequence[int]) -> Stage:
    """The stage of layers that have these numbers instead."""
    moved = tuple(Sublayer(to[each.layer], each.kind) for each in stage)
    ranks = ranks_of(stage)
    return moved if ranks is None else LocalStage(moved, ranks)


def group_layers(config: Mapping[str, Any]) -> GroupLayers:
    """The layers of a model that realise each group of its plan, from its config.json.

    A group is realised by one wide layer, or by as many layers as it has, which run side by side.
    In an original, every layer realises itself.

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
            f"side_by_side must be a list of groups of consecutive layers: {error}"
        ) from error
    inside = {layer for group in side_by_side.values() for layer in group[1:]}
    return tuple(side_by_side.get(layer, (layer,)) for layer in range(depth) if layer not in inside)
