"""Any model that can be opened -> a transformers model that runs."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from truedepth.errors import TruedepthError
from truedepth.plan import plan_of
from truedepth.registration import register
from truedepth.sources import Source, open_source
from truedepth.sources.directory import has_safetensors
from truedepth.tensors import LazyTensor, common_dtype

register()


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, and where it came from."""

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
        model: A directory, `.gguf` file, hub id, `default`, or an open source. What is loaded
            already is given back as it is. A file that truedepth exported runs in llama.cpp.
        device: By default the first GPU, else the CPU.
        dtype: By default float32 on a CPU and the checkpoint's own elsewhere. Not for llama.cpp,
            which computes with the types that the file has.
        options: For transformers' `from_pretrained`, such as `attn_implementation`.

    Raises:
        TruedepthError: There is no such model, transformers cannot load it, or it lacks weights.
    """
    if isinstance(model, Loaded):
        return model
    source = open_source(model)
    device = device_of(device)
    if source.path.is_file() and plan_of(source.config):
        from truedepth.engines.llama_cpp import load_llama_cpp

        return Loaded(load_llama_cpp(source, device), source)
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    options = {"dtype": dtype or "auto", "device_map": device, **options}
    tensors = source.tensors  # opened here so that a broken file is named
    try:
        config = transformers_config(source.config, source.path)
        if source.path.is_dir() and has_safetensors(source.path):
            loaded, report = AutoModelForCausalLM.from_pretrained(
                source.path,
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        else:
            # One reader of GGUF and pickles for loading and converting: both see the same weights.
            loaded, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
                None,
                config=config,
                state_dict={name: tensor.read() for name, tensor in tensors.items()},
                output_loading_info=True,
                **options,
            )
    except TruedepthError:
        raise
    except Exception as error:  # what a config's odd value leads to
        reason = _first_line(error)
        raise TruedepthError(f"transformers cannot load {source.path}: {reason}") from error
    for kind in ("missing_keys", "mismatched_keys"):  # transformers would fill them at random
        if names := report[kind]:
            raise TruedepthError(
                f"{source.path} does not hold the weights that its config.json describes:"
                f" {kind.replace('_', ' ')}, among them {min(map(str, names))!r}."
            )
    return Loaded(loaded.eval(), source)


def opened(model: str | Path | Source | Loaded) -> Source | Loaded:
    """What `load` takes, opened but not loaded: errors of its place and config come at once."""
    return model if isinstance(model, Loaded) else open_source(model)


def source_of(model: Source | Loaded) -> Source:
    """Where it came from."""
    return model.source if isinstance(model, Loaded) else model


def transformers_config(config: Mapping[str, Any], where: Path) -> Any:
    """A config.json as transformers' own class.

    Raises:
        TruedepthError: transformers does not know it or refuses a value.
    """
    try:
        return AutoConfig.for_model(**config)
    except Exception as error:  # config classes raise errors of every kind
        reason = _first_line(error)
        raise TruedepthError(f"transformers refuses the config of {where}: {reason}") from error


def empty_model(
    config: Mapping[str, Any], where: Path, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model that a config.json describes, without memory for its weights.

    Raises:
        TruedepthError: transformers cannot build it.
    """
    try:
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(
                transformers_config(config, where), dtype=dtype, trust_remote_code=False
            ).eval()
    except TruedepthError:
        raise
    except Exception as error:  # as above
        reason = _first_line(error)
        raise TruedepthError(f"transformers cannot build the model of {where}: {reason}") from error


def filled_model(
    source: Source, parameter: Callable[[str, LazyTensor], nn.Parameter]
) -> PreTrainedModel:
    """A model whose parameters are the caller's.

    Args:
        source: The model.
        parameter: From a parameter's name and its tensor in the source.

    Raises:
        TruedepthError: transformers cannot build it, or it lacks weights.
    """
    model = empty_model(source.config, source.path)
    missing = {name for name, _ in model.named_parameters()} - source.tensors.keys()
    if lacking := missing - model.all_tied_weights_keys.keys():
        raise TruedepthError(f"{source.path} has no tensor for {min(lacking)!r}.")
    for name in [name for name, _ in model.named_parameters() if name not in missing]:
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, parameter(name, source.tensors[name]))
    if missing:  # transformers, too, keeps apart what a file holds twice
        model.tie_weights()
    return model


def default_device() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fast_dtype(source: Source, device: torch.device) -> torch.dtype:
    """On a CPU bfloat16 where that is several times faster than float32, else float32; on a GPU the
    checkpoint's.
    """
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        fast = can.get("avx512_bf16") or can.get("amx_bf16")
        return torch.bfloat16 if fast else torch.float32
    return common_dtype([t for t in source.tensors.values() if len(t.shape) > 1])


def device_of(name: str | torch.device | None) -> torch.device:
    """The device of that name, by default the first GPU or else the CPU.

    Raises:
        TruedepthError: There is no such device.
    """
    name = name or default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise TruedepthError(f"There is no device {str(name)!r} on this machine.") from error
    return device


def _first_line(error: BaseException) -> str:
    """The error's first line, or of a long one the beginning, as the end of a sentence."""
    lines = str(error).strip().splitlines() or [""]
    said = textwrap.shorten(lines[0], 200, placeholder=" …")
    return f"{type(error).__name__}: {said.rstrip('.')}."
