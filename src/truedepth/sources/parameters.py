"""A model's parameters from the tensors of its files, by the rules of transformers.

Most tensors are parameters, under the same names. Where transformers keeps several as one, such as
the maps of a mixture's experts, its own conversions join them when they are read.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from truedepth.tensors import LazyTensor


def parameters_of(model: Any, tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
    """What a model's parameters are made of, by their names.

    Args:
        model: transformers' own, with or without weights.
        tensors: By their names in the files. Those that are no parameter keep their names.
    """
    rules = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    if not rules:
        return tensors
    expected = model.state_dict()
    found: dict[str, LazyTensor] = {}
    joined: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in sorted(tensors, key=_natural):
        target, pattern = rename_source_key(name, renamings, converters)
        if name in expected or target not in expected:
            found[name] = tensors[name]
        elif pattern is None:
            found[target] = tensors[name]
        else:
            joined[target].append((pattern, name))
    of_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    for target, parts in joined.items():
        converter = of_pattern[parts[0][0]]
        sources = [(pattern, name, tensors[name]) for pattern, name in parts]
        found[target] = _joined(model, target, converter, sources)
    return found


def renamed(model: Any, name: str) -> str:
    """The name that a tensor gets on loading, from its name in a file; none is joined.

    Args:
        model: transformers' own, with or without weights.
        name: The name in the file.
    """
    rules = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    found: str = rename_source_key(name, renamings, [])[0]
    return found


def _natural(name: str) -> list[Any]:
    """Sorts `experts.2` before `experts.10`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _joined(
    model: Any, name: str, converter: Any, parts: list[tuple[str, str, LazyTensor]]
) -> LazyTensor:
    """A parameter that transformers makes of several tensors: by pattern, name and tensor."""

    def read(start: int, stop: int) -> Tensor:
        own = copy.deepcopy(converter)
        for pattern, part, tensor in parts:
            own.add_tensor(name, part, pattern, tensor.read())
        made = own.convert(name, model=model, config=model.config)[name]
        whole: Tensor = made[0] if isinstance(made, list) else made
        return whole[start:stop]

    return LazyTensor(tuple(model.get_parameter(name).shape), parts[0][2].dtype, read)
