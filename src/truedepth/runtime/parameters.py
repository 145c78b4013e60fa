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
        shape = tuple(expected[target].shape)
        found[target] = _Joined(model, target, converter, sources).lazily(shape)
    return found


def _natural(name: str) -> list[Any]:
    """Sorts `experts.2` before `experts.10`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


class _Joined:
    """A parameter that transformers makes of several tensors."""

    def __init__(
        self, model: Any, name: str, converter: Any, parts: list[tuple[str, str, LazyTensor]]
    ) -> None:
        self._model, self._name, self._converter, self._parts = model, name, converter, parts

    def lazily(self, shape: tuple[int, ...]) -> LazyTensor:
        """It, read when it is asked for."""
        dtype = self._parts[0][2].dtype
        return LazyTensor(shape, dtype, lambda start, stop: self._read()[start:stop])

    def _read(self) -> Tensor:
        converter = copy.deepcopy(self._converter)
        for pattern, name, tensor in self._parts:
            converter.add_tensor(self._name, name, pattern, tensor.read())
        made = converter.convert(self._name, model=self._model, config=self._model.config)
        whole = made[self._name]
        value: Tensor = whole[0] if isinstance(whole, list) else whole
        return value
