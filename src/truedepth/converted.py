"""A model under a plan, not yet written: its tensors, computed when read, and its config."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from truedepth import modeling
from truedepth.errors import TruedepthError
from truedepth.families import CONVERTED, head_dim
from truedepth.loading import empty_model, transformers_config
from truedepth.sources import Source
from truedepth.tensors import LazyTensor, dtype_name
from truedepth.widen import widen


def converted_tensors(
    source: Source, groups: Sequence[Sequence[int]], dtype: torch.dtype | None = None
) -> dict[str, LazyTensor]:
    """The tensors of the converted model by name, with one layer for each group.

    Args:
        source: The original.
        groups: Of consecutive layers. A group of one is that layer as it is, renumbered. A layer
            may be in several, as in the model of all candidates that a search looks at.
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
    if _tied(source):
        tensors.pop("lm_head.weight", None)  # the embedding again; transformers ties it on loading

    for index, group in enumerate(groups):
        members = [layers[layer] for layer in group]
        try:
            wide = members[0] if len(group) == 1 else widen(source.family, members, dtype)
        except TruedepthError as error:
            raise TruedepthError(f"Layers {list(group)} cannot be joined: {error}") from error
        tensors |= {source.family.layer.format(index) + name: t for name, t in wide.items()}
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return tensors


def converted_config(
    source: Source, groups: Sequence[Sequence[int]], tensors: Mapping[str, LazyTensor]
) -> dict[str, Any]:
    """config.json of the model that `converted_tensors` gives these `tensors` of.

    Raises:
        TruedepthError: The layers of a group attend differently.
    """
    prefix = source.family.class_prefix
    original = transformers_config(source.config, source.path)
    config = {key: value for key, value in source.config.items() if key != "torch_dtype"}
    bytes_by_dtype: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        bytes_by_dtype[tensor.dtype] += tensor.nbytes
    config["dtype"] = dtype_name(bytes_by_dtype.most_common(1)[0][0])
    config["model_type"] = f"{CONVERTED}{source.family.model_type}"
    config["architectures"] = [f"{modeling.PREFIX}{prefix}ForCausalLM"]
    config["auto_map"] = modeling.auto_map(prefix)
    config["tie_word_embeddings"] = _tied(source)
    config["num_hidden_layers"] = len(groups)
    config["layer_widths"] = [len(group) for group in groups]
    # Of a wide layer these do not follow from the number of heads.
    config["head_dim"] = head_dim(original.to_dict())
    config["num_key_value_heads"] = original.num_key_value_heads
    if kinds := getattr(original, "layer_types", None):
        for group in groups:
            if len({kinds[layer] for layer in group}) > 1:
                raise TruedepthError(
                    f"Layers {list(group)} cannot be joined: they attend differently"
                    f" ({', '.join(kinds[layer] for layer in group)})."
                )
        config["layer_types"] = [kinds[group[0]] for group in groups]
    return config


def _tied(source: Source) -> bool:
    """Whether the output projection is the embedding.

    A config may say so while the file holds another projection; transformers then takes the file's.
    """
    if not source.config.get("tie_word_embeddings"):
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
