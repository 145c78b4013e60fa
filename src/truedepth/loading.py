"""Any model that can be opened -> a transformers model that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from truedepth.errors import TruedepthError
from truedepth.registration import register
from truedepth.sources import Source, open_source

register()


class Loaded(NamedTuple):
    """A model ready to run, and where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Source


def load(
    model: str | Path | Source,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Loaded:
    """Load a model and its tokenizer, original or converted, for inference.

    Args:
        model: A directory, `.gguf` file, hub id, `default`, or an open source.
        device: By default the first GPU, else the CPU.
        dtype: By default float32 on a CPU and the checkpoint's own elsewhere.
        options: For transformers' `from_pretrained`, such as `attn_implementation`.

    Raises:
        TruedepthError: There is no such model, or transformers cannot load it.
    """
    source = model if isinstance(model, Source) else open_source(model)
    device = _device(device)
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    options = {"dtype": dtype or "auto", "device_map": device, **options}
    tensors = source.tensors  # opened here so that a broken file is named
    try:
        if source.path.is_dir():
            loaded = AutoModelForCausalLM.from_pretrained(source.path, **options)
        else:
            # One reader of GGUF for loading and converting, so that both see the same weights.
            config = transformers_config(source)
            loaded = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
                None,
                config=config,
                state_dict={name: tensor.read() for name, tensor in tensors.items()},
                **options,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise TruedepthError(
            f"transformers cannot load {source.path}: {_first_line(error)}"
        ) from error
    return Loaded(loaded.eval(), source.tokenizer, source)


def default_device() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _device(name: str | torch.device | None) -> torch.device:
    """The device of that name, which must be there."""
    name = name or default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise TruedepthError(f"There is no device {str(name)!r} on this machine.") from error
    return device


def transformers_config(source: Source) -> Any:
    """The config of a source as transformers' own class.

    Raises:
        TruedepthError: transformers cannot read it.
    """
    try:
        if source.path.is_dir():
            return AutoConfig.from_pretrained(source.path)
        return AutoConfig.for_model(**source.config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TruedepthError(
            f"transformers cannot read the config of {source.path}: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
