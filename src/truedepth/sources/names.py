"""The names that a model's own class gives its tensors, from those in its files.

Tools save the body of a model without its head's prefix, or the whole of it under a wrapper's, and
of two names for one tensor either. Every command sees the names that result here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from truedepth.families.family import Family
from truedepth.families.lookup import known_original_family
from truedepth.families.registration import register
from truedepth.progress import note
from truedepth.tensors import LazyTensor


def current_names(
    tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], path: Path
) -> Mapping[str, LazyTensor]:
    """A model's tensors under the names of transformers' class.

    Names of a family that truedepth does not know stay as they are.

    Args:
        tensors: By their names in the files.
        config: The contents of config.json.
        path: The model's path, for messages.
    """
    family = known_original_family(config)
    if family is None:
        return tensors
    named = {family.current_name(name): tensor for name, tensor in tensors.items()}
    named = _prefixed(named, family, path)
    head, embedding = family.tied
    if embedding not in named and head in named and ties_embedding(config):
        named[embedding] = named.pop(head)
    return named


def may_be_left_out(config: Mapping[str, Any], names: Collection[str]) -> set[str]:
    """Those of a model's tensors that its files need not hold, though their index names them.

    Of two tied names a file may hold either. What models of unknown families tie, transformers says
    when it loads them: it refuses a gap.
    """
    family = known_original_family(config)
    if family is None:
        return set(names)
    return set(family.tied).intersection(names) if ties_embedding(config) else set()


def ties_embedding(config: Mapping[str, Any]) -> bool:
    """Whether a model's output projection is its embedding, by its config.json."""
    from transformers import AutoConfig

    register()
    try:
        found = AutoConfig.for_model(**copy.deepcopy(dict(config)))
    except Exception:  # what is wrong with it is said where the model is built
        return bool(config.get("tie_word_embeddings"))
    return bool(found.tie_word_embeddings)


def _prefixed(named: dict[str, LazyTensor], family: Family, path: Path) -> dict[str, LazyTensor]:
    """The tensors with the prefix that the family's layers have."""
    body, layers = re.split(r"(?<=\.)", family.layer.removesuffix("{}."), maxsplit=1)
    pattern = re.compile(rf"(.*?){re.escape(layers)}\d+\.")
    found = {match[1] for match in map(pattern.match, named) if match}
    if body in found or len(found) != 1:
        return named
    (prefix,) = found
    if not prefix:  # the body alone, as embedding models are saved; transformers adds it too
        head = f"{family.outside[2]}."
        return {name if name.startswith(head) else body + name: t for name, t in named.items()}
    if not prefix.endswith(body):
        return named
    wrapper = prefix.removesuffix(body)  # `module.`, `_orig_mod.`, `base_model.model.`
    note(f"The tensors of {path} are named {wrapper}…; they are read without {wrapper!r}.")
    return {name.removeprefix(wrapper): tensor for name, tensor in named.items()}
