"""Builds the transformers model that a config.json describes, without its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from truedepth.errors import TruedepthError, reason_of
from truedepth.families.family import QUERY
from truedepth.families.lookup import CONVERTED
from truedepth.families.registration import register
from truedepth.runtime.generation_config import without_generation
from truedepth.sources.parameters import parameters_of
from truedepth.sources.source import Source
from truedepth.tensors import LazyTensor


def transformers_config(config: Mapping[str, Any], where: Path) -> Any:
    """Turn the data of a config.json into an instance of transformers' config class.

    Args:
        config: The contents of config.json.
        where: The model's path, for error messages.

    Raises:
        TruedepthError: transformers does not know the model type or refuses a value.
    """
    model_type = str(config.get("model_type"))
    if model_type.startswith(CONVERTED):
        register()
    try:
        # Config classes write into what they are given.
        return AutoConfig.for_model(**copy.deepcopy(without_generation(config)))
    except Exception as error:  # config classes raise exceptions of any type
        reason = reason_of(error)
        if uneven := _uneven_heads(config):
            if config.get("head_dim") and not model_type.startswith(CONVERTED):
                # A padded original, whose heads need not divide the hidden size.
                return transformers_config({**config, "model_type": CONVERTED + model_type}, where)
            reason = uneven
        raise TruedepthError(f"transformers refuses the config of {where}: {reason}") from error


def in_one_process(config: Any) -> Any:
    """The config of a model for which one process computes what ranks of local stages would."""
    if any(isinstance(stage, Mapping) for stage in getattr(config, "stages", None) or ()):
        config.simulate_ranks = True
    return config


def _uneven_heads(config: Mapping[str, Any]) -> str:
    """Whether a config's heads do not divide its hidden size: the end of a sentence."""
    hidden, heads = config.get("hidden_size"), config.get(QUERY)
    if not (isinstance(hidden, int) and isinstance(heads, int)):
        return ""
    if heads < 1 or hidden % heads == 0:
        return ""
    return f"hidden_size {hidden} is not a multiple of {QUERY} {heads}, and head_dim is missing."


def empty_model(
    config: Mapping[str, Any], where: Path, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Build the model that a config.json describes, with its parameters on the meta device.

    Args:
        config: The contents of config.json.
        where: The model's path, for error messages.
        dtype: Dtype of the parameters; default: the config's.

    Raises:
        TruedepthError: transformers cannot build the model.
    """
    try:
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(
                in_one_process(transformers_config(config, where)),
                dtype=dtype,
                trust_remote_code=False,
            ).eval()
    except TruedepthError:
        raise
    except Exception as error:  # as above
        reason = reason_of(error)
        raise TruedepthError(f"transformers cannot build the model of {where}: {reason}") from error


def filled_model(
    source: Source, parameter: Callable[[str, LazyTensor], nn.Parameter]
) -> PreTrainedModel:
    """Build a model and fill it with parameters that the caller makes.

    Args:
        source: The model's config and tensors.
        parameter: Makes a parameter from its name and its tensor in the source.

    Raises:
        TruedepthError: transformers cannot build the model, or the source lacks a weight.
    """
    model = empty_model(source.config, source.path)
    tensors = parameters_of(model, source.tensors)
    missing = {name for name, _ in model.named_parameters()} - tensors.keys()
    if lacking := missing - model.all_tied_weights_keys.keys():
        raise TruedepthError(f"{source.path} has no tensor for {min(lacking)!r}.")
    for name in [name for name, _ in model.named_parameters() if name not in missing]:
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, parameter(name, tensors[name]))
    if missing:  # as in transformers, weights that a file stores twice stay untied
        model.tie_weights()
    return model
