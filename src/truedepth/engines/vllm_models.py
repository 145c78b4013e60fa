"""vLLM's own model classes with layers of different width. Imported where vLLM is, by vLLM."""

from __future__ import annotations

from typing import Any

import vllm
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from truedepth.engines.vllm import check_version

check_version(vllm.__version__)


class WideLlamaDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """vLLM's Llama layer, as wide as the checkpoint says."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", **options: Any) -> None:
        whole = vllm_config.model_config.hf_config
        if whole.side_by_side:
            raise ValueError("vLLM runs no branch groups: layers side by side that are not one")
        config = whole.per_layer_config[extract_layer_index(prefix)]
        super().__init__(vllm_config, prefix, config=config, **options)


class TruedepthLlamaForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """vLLM's Llama with such layers."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=WideLlamaDecoderLayer)


class TruedepthMistralForCausalLM(TruedepthLlamaForCausalLM):
    """Mistral, which is Llama to vLLM; the sliding window is the engine's matter."""


class TruedepthQwen2ForCausalLM(TruedepthLlamaForCausalLM):
    """Qwen2 as vLLM's Llama with biases on queries, keys and values.

    vLLM's own Qwen2 takes no layers of another class.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        vllm_config.model_config.hf_config.qkv_bias = True
        super().__init__(vllm_config=vllm_config, prefix=prefix)
