"""Opens any supported model and loads it as a transformers model that runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from truedepth.errors import TruedepthError, reason_of
from truedepth.families.registration import register
from truedepth.plan.config import plan_of
from truedepth.progress import note
from truedepth.runtime.device import device_of
from truedepth.runtime.empty import in_one_process, transformers_config
from truedepth.runtime.generation_config import as_written
from truedepth.sources.opening import open_source
from truedepth.sources.source import Source

register()


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, and the source that it was loaded from."""

    model: PreTrainedModel
    source: Source

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.source.tokenizer


def load(
    model: str | Path | Source | Loaded,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Loaded:
    """Load a model, original or converted, for inference.

    Args:
        model: A directory, `.gguf` file, hub id, `default`, or an open source. A `Loaded` is
            returned unchanged. A GGUF file that truedepth exported runs in llama.cpp.
        device: Default: the first GPU, else the CPU.
        dtype: Dtype of the weights; default: float32 on a CPU, the checkpoint's own dtype on other
            devices. Ignored for llama.cpp, which computes with the types stored in the file.
        options: Passed to transformers' `from_pretrained`, such as `attn_implementation`.

    Raises:
        TruedepthError: The model does not exist, transformers cannot load it, or weights are
            missing or of another shape.
    """
    if isinstance(model, Loaded):
        return model
    source = open_source(model)
    device = device_of(device)
    if source.path.is_file() and plan_of(source.config):
        from truedepth.runtime.llama_cpp import load_llama_cpp

        return Loaded(load_llama_cpp(source, device), source)
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    options = {"dtype": dtype or "auto", "device_map": device, **options}
    tensors = source.tensors  # opened here, so that the error names a broken file
    try:
        config = transformers_config(source.config, source.path)
        if "distributed_config" not in options:
            config = in_one_process(config)
            if (plan := plan_of(source.config)) and plan.ranks:
                note(f"One process computes what {plan.ranks} ranks of {source.name} would.")
        # Of transformers' own reader only what fills a model is used: which file holds which tensor
        # is decided by the source alone, so that all commands compute with the same tensors.
        loaded, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict={name: tensor.read() for name, tensor in tensors.items()},
            output_loading_info=True,
            **options,
        )
        if source.path.is_dir() or source.generation_config:
            loaded.generation_config = as_written(source.generation_config or source.config)
    except TruedepthError:
        raise
    except Exception as error:  # an unusual config value can raise anything
        reason = reason_of(error)
        raise TruedepthError(f"transformers cannot load {source.path}: {reason}") from error
    for kind in ("missing_keys", "mismatched_keys"):  # transformers would fill these at random
        if names := report[kind]:
            raise TruedepthError(
                f"{source.path} does not contain the weights that its config.json describes:"
                f" {len(names)} {kind.replace('_', ' ')}, for example {min(map(str, names))!r}."
            )
    if unused := {str(name) for name in report["unexpected_keys"]}:
        note(
            f"{source.path} holds {len(unused)} tensors that are not part of the model which its"
            f" config.json describes, such as {min(unused)!r}; they are not used."
        )
    source.check_unchanged()
    return Loaded(loaded.eval(), source)


def opened(model: str | Path | Source | Loaded) -> Source | Loaded:
    """Open what `load` takes without loading it: a wrong path or config is reported at once."""
    return model if isinstance(model, Loaded) else open_source(model)


def source_of(model: Source | Loaded) -> Source:
    """The source of an open or loaded model."""
    return model.source if isinstance(model, Loaded) else model
