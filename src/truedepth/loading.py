"""Any model that can be opened -> a transformers model that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from truedepth.errors import TruedepthError
from truedepth.plan import Plan
from truedepth.sources import Source, open_source


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
    device = torch.device(device or default_device())
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    options = {"dtype": dtype or "auto", **options}
    try:
        if source.path.is_dir():
            loaded = AutoModelForCausalLM.from_pretrained(source.path, **options)
        else:
            # One reader of GGUF for loading and converting, so that both see the same weights.
            config = AutoConfig.for_model(**source.config)
            loaded = AutoModelForCausalLM._model_mapping[type(config)].from_pretrained(
                None,
                config=config,
                state_dict={name: tensor.read() for name, tensor in source.tensors.items()},
                **options,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise TruedepthError(
            f"transformers cannot load {source.path}: {_first_line(error)}"
        ) from error
    return Loaded(loaded.to(device).eval(), source.load_tokenizer(), source)


def default_device() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def unpaired_plan(source: Source) -> Plan:
    """The plan of a model in which every layer runs alone."""
    return Plan(source.num_layers, model=source.name)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
