"""Versions of vLLM: which are supported, what is relied on, and where the tested ones differ.

vLLM's model classes are no public interface and change between minor versions. All that depends on
the version is here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from operator import attrgetter
from typing import Any

from packaging.version import Version

from truedepth.errors import TruedepthError

FLOOR, TESTED = "0.29", "0.32"
"""The oldest supported minor version, and the newest tested one; the tests ran on all between.

The extra `vllm` of pyproject.toml takes these alone.
"""

_MODELS, _LAYERS = "vllm.model_executor.models", "vllm.model_executor.layers"
_LAYER = ("config", "cache_config", "quant_config", "prefix")

RELIED_ON: Mapping[str, tuple[str, ...]] = {
    f"{_MODELS}.llama:LlamaForCausalLM.__init__": ("vllm_config", "prefix", "layer_type"),
    f"{_MODELS}.llama:LlamaForCausalLM.load_weights": ("weights",),
    f"{_MODELS}.llama:LlamaDecoderLayer.__init__": ("vllm_config", "prefix", "config"),
    f"{_MODELS}.llama:LlamaDecoderLayer.forward": ("positions", "hidden_states", "residual"),
    f"{_MODELS}.phi3:Phi3ForCausalLM.packed_modules_mapping": (),
    f"{_MODELS}.qwen3:Qwen3ForCausalLM": (),
    f"{_MODELS}.qwen3:Qwen3DecoderLayer.__init__": _LAYER,
    f"{_MODELS}.granite:GraniteForCausalLM": (),
    f"{_MODELS}.granite:GraniteDecoderLayer.__init__": _LAYER,
    f"{_MODELS}.gemma:GemmaForCausalLM": (),
    f"{_MODELS}.gemma:GemmaDecoderLayer.__init__": _LAYER,
    f"{_MODELS}.commandr:CohereForCausalLM": (),
    f"{_MODELS}.commandr:CohereDecoderLayer.__init__": _LAYER,
    f"{_MODELS}.transformers:TransformersForCausalLM.__init__": ("vllm_config", "prefix"),
    f"{_MODELS}.transformers.base:Base": (),
    f"{_MODELS}.utils:extract_layer_index": ("layer_name",),
    f"{_MODELS}:ModelRegistry.models": (),
    f"{_LAYERS}.attention:Attention.__init__": (
        *("num_heads", "head_size", "scale", "num_kv_heads", "cache_config"),
        *("per_layer_sliding_window", "prefix", "attn_type"),
    ),
    f"{_LAYERS}.linear:RowParallelLinear.__init__": ("reduce_results",),
    f"{_LAYERS}.linear:ReplicatedLinear.__init__": (
        *("input_size", "output_size", "bias", "params_dtype", "return_bias", "disable_tp"),
    ),
    f"{_LAYERS}.fused_moe.config:FusedMoEConfig": ("skip_final_all_reduce",),
    "vllm.distributed:get_pp_group": (),
    "vllm.distributed:get_tensor_model_parallel_rank": (),
    "vllm.distributed:get_tensor_model_parallel_world_size": (),
    "vllm.distributed:tensor_model_parallel_all_reduce": (),
    "vllm.config:get_current_vllm_config": (),
}
"""`module:object` in vLLM that the classes here use, and the parameters that it must have."""


def missing() -> list[str]:
    """What is relied on and the installed vLLM does not have: objects, and `object(parameter)`."""
    found = []
    for place, parameters in RELIED_ON.items():
        module, _, path = place.partition(":")
        try:
            it = attrgetter(path)(import_module(module))
        except (ImportError, AttributeError):
            found.append(f"{module}.{path}")
            continue
        known = inspect.signature(it).parameters if parameters else {}
        found += [f"{module}.{path}({each})" for each in parameters if each not in known]
    return found


def check_version(version: str) -> str | None:
    """Say whether checkpoints of ours may be loaded. Called only when one is.

    Newer versions than those tested, and builds between releases, may if they have what is relied
    on: objects, and parameters by name. That does not show that these do what they did.

    Args:
        version: vLLM's.

    Returns:
        A warning, if the version was not tested.

    Raises:
        TruedepthError: The version is too old, or lacks something.
    """
    given = Version(version)
    minor = Version(".".join(map(str, given.release[:2])))
    if minor < Version(FLOOR) and not given.is_devrelease:
        raise TruedepthError(
            f"This is vLLM {version}, but truedepth needs {FLOOR} or newer (tested up to {TESTED})."
        )
    if Version(FLOOR) <= minor <= Version(TESTED) and not given.is_devrelease:
        return None
    lacking = missing()
    if lacking:
        raise TruedepthError(
            f"This is vLLM {version}, which truedepth was not tested with and which lacks what it"
            f" needs: {', '.join(lacking)}. Install vLLM {FLOOR} to {TESTED}."
        )
    return (
        f"truedepth was tested with vLLM {FLOOR} to {TESTED}. This is {version}: it has all that is"
        " needed, but compare some of its answers with those of transformers."
    )


def qwen3_layer(module: Any) -> tuple[Any, str]:
    """Where vLLM's Qwen3 looks up the class of its layers.

    Args:
        module: `vllm.model_executor.models.qwen3`.

    Returns:
        The class or module, and the name in it: since 0.32 the model's class holds it.
    """
    if hasattr(module.Qwen3Model, "decoder_layer_type"):
        return module.Qwen3Model, "decoder_layer_type"
    return module, "Qwen3DecoderLayer"
