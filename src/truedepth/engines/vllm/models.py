"""vLLM's own model classes with layers of different widths, and with stages of sub-layers.

Only vLLM imports this module.
"""

# The version is checked before anything is imported that another version may not have.
# ruff: noqa: E402

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import torch
import vllm
from torch import Tensor, nn
from vllm.logger import init_logger

from truedepth.engines.vllm.versions import check_version, qwen3_layer

logger = init_logger("vllm.truedepth")  # vLLM shows what is logged below its own name
if _warning := check_version(vllm.__version__):
    logger.warning(_warning)

from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models import ModelRegistry, commandr, gemma, granite, qwen3
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.transformers.base import Base as TransformersBackend
from vllm.model_executor.models.utils import extract_layer_index

from truedepth.engines.vllm.backend import reduce_once
from truedepth.engines.vllm.stages import check_alone, fuse_stages, merge_stages
from truedepth.families.registration import register_type
from truedepth.modeling import PREFIX, WIDENED


def layer_config(whole: Any, prefix: str) -> Any:
    """Make the config of one layer.

    It has the same class as the model's config, as vLLM's layers require.

    Args:
        whole: The model's config.
        prefix: The layer's name, such as `model.layers.3`.
    """
    if whole.side_by_side:
        raise ValueError(
            "vLLM does not run layers side by side, only wide layers; use transformers"
        )
    width = whole.layer_widths[extract_layer_index(prefix)]
    if width == 1:
        return whole
    own = copy.copy(whole)
    for name in WIDENED:
        setattr(own, name, getattr(whole, name) * width)
    return own


def head_dim(config: Any) -> int:
    """What a head has, however many heads a layer has."""
    size: int = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return size


class WideLlamaDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """vLLM's Llama layer, with the width that the config gives."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", **options: Any) -> None:
        config = layer_config(vllm_config.model_config.hf_config, prefix)
        super().__init__(vllm_config, prefix, config=config, **options)


class WithStages:
    """Mixed into a model class: stages of sub-layers, fused once their weights are loaded."""

    def merge(self, vllm_config: VllmConfig) -> None:
        """Let sub-layers read one state, as the checkpoint's config says."""
        model: Any = self
        whole = vllm_config.model_config.hf_config
        if whole.stages and whole.sublayers["parallel"]:
            self.fuses = None
            check_alone(whole)
            return
        merge_stages(model.model, whole)
        # maps that are quantized or adapted keep their names and places
        plain = vllm_config.quant_config is None and vllm_config.lora_config is None
        self.fuses = (
            whole if plain and whole.stages and getattr(whole, "fuse_stages", True) else None
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights as vLLM does, and fuse merged stages.

        Args:
            weights: Names and tensors of the checkpoint.

        Returns:
            Names of the model's weights.
        """
        model: Any = self
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]
        if self.fuses is None:
            return loaded
        before = {name for name, _ in model.named_parameters()}
        fuse_stages(model.model, self.fuses)
        logger.info_once("Fused the sub-layers of %d merged stages.", len(self.fuses.stages))
        return loaded | {name for name, _ in model.named_parameters()} - before


class TruedepthLlamaForCausalLM(WithStages, LlamaForCausalLM):  # type: ignore[misc]
    """vLLM's Llama with wide layers and stages."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=WideLlamaDecoderLayer)
        self.merge(vllm_config)


class TruedepthMistralForCausalLM(TruedepthLlamaForCausalLM):
    """Mistral: vLLM runs it as Llama and handles the sliding window in the engine."""


class TruedepthQwen2ForCausalLM(TruedepthLlamaForCausalLM):
    """Qwen2, run as vLLM's Llama with biases on queries, keys and values.

    vLLM's own Qwen2 does not accept another layer class.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        vllm_config.model_config.hf_config.qkv_bias = True
        super().__init__(vllm_config=vllm_config, prefix=prefix)


class TruedepthPhi3ForCausalLM(TruedepthLlamaForCausalLM):
    """Phi-3: vLLM runs it as Llama; its checkpoints have the maps packed already."""

    packed_modules_mapping = Phi3ForCausalLM.packed_modules_mapping


class HeadNorm(nn.Module):
    """RMSNorm over each head with its own gains; the weight is `[heads of this rank, head_dim]`.

    `modeling.HeadNorm` holds the gains of all heads on every rank; vLLM loads a rank's own only.
    """

    def __init__(self, norm: Any, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach().expand(heads, -1).clone())
        self.weight.weight_loader = self._load  # type: ignore[attr-defined]
        self.variance_epsilon = norm.variance_epsilon

    def _load(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Load this rank's part of the gains of all heads."""
        heads = len(parameter)
        start = get_tensor_model_parallel_rank() * heads % len(whole)
        parameter.data.copy_(whole[start : start + heads])

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize `[..., heads, head_dim]`."""
        x = hidden_states.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


def __getattr__(name: str) -> Any:
    """`Truedepth<Family>ForCausalLM` for any class of vLLM's: layers of one width, in stages."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    known = ModelRegistry.models.get(name.removeprefix(PREFIX))
    base: Any = known.load_model_cls() if known else TransformersForCausalLM

    class Stages(WithStages, base):  # type: ignore[misc]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            whole = vllm_config.model_config.hf_config
            if known is None:
                raise ValueError(
                    f"vLLM {vllm.__version__} does not know {name.removeprefix(PREFIX)}, so"
                    " truedepth cannot run stages in it; use transformers"
                )
            if whole.side_by_side or max(whole.layer_widths) > 1:
                raise ValueError(
                    f"vLLM runs stages of sub-layers of {base.__name__}, but not groups of its"
                    " layers; use transformers"
                )
            register_type(whole.model_type)
            whole.simulate_ranks = True  # transformers' code does not know of vLLM's ranks
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.fuses = None
            if isinstance(self, TransformersBackend):
                reduce_once(self.model, whole)
                return
            if not hasattr(getattr(self, "model", None), "layers"):
                raise ValueError(
                    f"vLLM's {base.__name__} has no layers where others have them, so truedepth"
                    " cannot run stages in it; use transformers"
                )
            self.merge(vllm_config)
            self.fuses = None

    Stages.__name__ = Stages.__qualname__ = name
    globals()[name] = Stages
    return Stages


def _with_wide_layers(base: Any, holder: Any, name: str) -> Any:
    """Make a vLLM model class whose layers have the widths that the config gives.

    Args:
        base: vLLM's model class, including the head.
        holder: The class or module in which the base looks up its layer class.
        name: The name of the layer class in `holder`.
    """

    class WideLayer(getattr(holder, name)):  # type: ignore[misc]
        def __init__(self, config: Any, *options: Any, prefix: str = "", **more: Any) -> None:
            own = layer_config(config, prefix)
            super().__init__(own, *options, prefix=prefix, **more)
            attention = self.self_attn
            if attention.head_dim != head_dim(config):
                raise ValueError(
                    f"vLLM {vllm.__version__} takes the heads of a wide {name} for vectors of"
                    f" {attention.head_dim}, but they have {head_dim(config)}; use transformers"
                )
            for norm, heads in (("q_norm", "num_heads"), ("k_norm", "num_kv_heads")):
                held = getattr(attention, norm, None)
                if own is not config and held is not None and held.weight.ndim == 1:
                    setattr(attention, norm, HeadNorm(held, getattr(attention, heads)))

    class Wide(WithStages, base):  # type: ignore[misc]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            with patch.object(holder, name, WideLayer):
                super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.merge(vllm_config)

    Wide.__name__ = Wide.__qualname__ = f"{PREFIX}{base.__name__}"
    return Wide


TruedepthQwen3ForCausalLM = _with_wide_layers(qwen3.Qwen3ForCausalLM, *qwen3_layer(qwen3))
TruedepthGraniteForCausalLM = _with_wide_layers(
    granite.GraniteForCausalLM, granite, "GraniteDecoderLayer"
)
TruedepthGemmaForCausalLM = _with_wide_layers(gemma.GemmaForCausalLM, gemma, "GemmaDecoderLayer")
TruedepthCohereForCausalLM = _with_wide_layers(
    commandr.CohereForCausalLM, commandr, "CohereDecoderLayer"
)
