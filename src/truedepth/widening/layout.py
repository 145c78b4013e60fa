"""A model under a plan, not yet written: its tensors, computed when read, and its config."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from truedepth import modeling
from truedepth.errors import TruedepthError
from truedepth.families.family import KEY_VALUE, head_dim, sublayers
from truedepth.families.lookup import CONVERTED
from truedepth.plan.config import places_of, plan_of
from truedepth.plan.plan import Plan
from truedepth.runtime.empty import empty_model, transformers_config
from truedepth.sources.source import Source
from truedepth.tensors import LazyTensor, dtype_name
from truedepth.widening.widen import widen

Places = tuple[tuple[int, ...], ...]
"""For each group its layers in the converted model: one wide layer, or the branches of a group."""


def places_of_groups(source: Source, groups: Sequence[Sequence[int]]) -> Places:
    """Where the groups go: into one wide layer each where their layers can be one."""
    original = transformers_config(source.config, source.path)
    places, depth = [], 0
    for group in groups:
        size = len(group) if source.family.why_branches(original, group) else 1
        places.append(tuple(range(depth, depth + size)))
        depth += size
    return tuple(places)


def as_run(source: Source, plan: Plan) -> Plan:
    """The plan with the layers of branch groups by themselves, as engines run them.

    Args:
        source: The original, or what was made of it under this plan.
        plan: Of the original's layers.
    """
    if plan_of(source.config) is None:
        places: Sequence[Sequence[int]] = places_of_groups(source, plan.groups)
    elif plan_of(source.config) == plan:
        places = places_of(source.config)
    else:
        return plan
    wide = [g for g, p in zip(plan.groups, places, strict=True) if len(p) < len(g)]
    return Plan(plan.num_layers, wide)


def converted_tensors(
    source: Source, groups: Sequence[Sequence[int]], dtype: torch.dtype | None = None
) -> dict[str, LazyTensor]:
    """The tensors of the converted model by name.

    Args:
        source: The original.
        groups: Of consecutive layers. A group of one is that layer as it is, renumbered, and so are
            the layers of a branch group; any other is one wide layer. A layer may be in several
            groups, as in the model of all candidates that a search looks at.
        dtype: Of the tensors; by default as in the source.

    Raises:
        TruedepthError: A layer has tensors that cannot be widened exactly.
    """
    layers: list[dict[str, LazyTensor]] = [{} for _ in range(source.num_layers)]
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in source.tensors.items():
        layer, rest = source.family.split(name)
        if layer is None:
            tensors[name] = tensor
        elif layer >= source.num_layers:
            raise TruedepthError(
                f"{source.path} has the tensor {name!r}, but its config says {source.num_layers}"
                " layers."
            )
        elif rest not in source.family.obsolete:
            layers[layer][rest] = tensor
    if missing := [layer for layer, held in enumerate(layers) if not held]:
        raise TruedepthError(f"{source.path} has no tensors for layer {missing[0]}.")
    if _tied(source):  # the embedding again; transformers ties it on loading
        tensors.pop(source.family.tied[0], None)

    sizes = transformers_config(source.config, source.path).to_dict()
    for group, place in zip(groups, places_of_groups(source, groups), strict=True):
        members = [layers[layer] for layer in group]
        if len(place) < len(group):
            try:
                members = [widen(source.family, members, dtype, sizes)]
            except TruedepthError as error:
                raise TruedepthError(f"Layers {list(group)} cannot be joined: {error}") from error
        for index, member in zip(place, members, strict=True):
            tensors |= {source.family.layer.format(index) + name: t for name, t in member.items()}
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return tensors


def converted_config(
    source: Source, groups: Sequence[Sequence[int]], tensors: Mapping[str, LazyTensor]
) -> dict[str, Any]:
    """config.json of the model that `converted_tensors` gives these `tensors` of."""
    family = source.family
    original = transformers_config(source.config, source.path)
    config = {key: value for key, value in source.config.items() if key != "torch_dtype"}
    bytes_by_dtype: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        bytes_by_dtype[tensor.dtype] += tensor.nbytes
    config["dtype"] = dtype_name(bytes_by_dtype.most_common(1)[0][0])
    config["model_type"] = f"{CONVERTED}{family.model_type}"
    config["architectures"] = [f"{modeling.PREFIX}{family.classes[-1]}"]
    config["auto_map"] = modeling.auto_map(family.classes)
    config["tie_word_embeddings"] = _tied(source)
    places = places_of_groups(source, groups)
    config["num_hidden_layers"] = sum(map(len, places))
    config["layer_widths"] = [
        width
        for group, place in zip(groups, places, strict=True)
        for width in ([len(group)] if len(place) == 1 else [1] * len(place))
    ]
    if branches := [list(place) for place in places if len(place) > 1]:
        config["side_by_side"] = branches
        config["sublayers"] = sublayers(family, original)
    # Of a wide layer these do not follow from the number of heads.
    config["head_dim"] = head_dim(original.to_dict())
    if key_value := getattr(original, KEY_VALUE, None):
        config[KEY_VALUE] = key_value
    for key in family.per_layer:
        if entries := getattr(original, key, None):
            config[key] = [
                entries[layer]
                for group, place in zip(groups, places, strict=True)
                for layer in group[: len(place)]
            ]
    return config


def _tied(source: Source) -> bool:
    """Whether the output projection is the embedding.

    A config may say so while the file holds another projection; transformers then takes the file's.
    """
    if not transformers_config(source.config, source.path).tie_word_embeddings:
        return False
    head, embedding = (source.tensors.get(name) for name in source.family.tied)
    if head is None or embedding is None:
        return True
    return (head.shape, head.dtype) == (embedding.shape, embedding.dtype) and all(
        map(torch.equal, head.blocks(1 << 20), embedding.blocks(1 << 20))
    )


def check_loadable(
    config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], source: Path
) -> None:
    """The tensors must be those of the model that transformers will build from the config.

    Raises:
        TruedepthError: They are not.
    """
    model = empty_model(config, source)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in model.all_tied_weights_keys:
        expected.pop(name)
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise TruedepthError(f"{source} has no tensor for {name!r}.")
        if name not in expected:
            raise TruedepthError(f"{source} gives the tensor {name!r}, which its model has not.")
        if expected[name] != tensors[name].shape:
            raise TruedepthError(
                f"{source} gives {name!r} the shape {list(tensors[name].shape)}, but its config"
                f" says {list(expected[name])}."
            )
