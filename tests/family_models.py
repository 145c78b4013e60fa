"""A small config of every supported family, and its layers side by side, by its own code alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import truedepth as td
from truedepth.healing.options import TextPart

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 3
TWO_OF_A_KIND = ["sliding_attention", "sliding_attention", "full_attention"] * 2

CAPPED = {"gemma2": "eager"}
"""The attention of families that cap its logits. transformers 5.16 to 5.19 take one that does not
unless told, of the original too."""

# Every model has 6 layers; its groups are wide layers but for those of `side_by_side`.
CASES: dict[str, dict[str, Any]] = {
    "llama": {"config": "LlamaConfig"},
    "llama 3": {"config": "LlamaConfig", "rope_parameters": LLAMA_3_ROPE},
    "mistral": {"config": "MistralConfig", "sliding_window": None},
    "mistral, window": {"config": "MistralConfig", "sliding_window": 8},
    "mistral, head_dim": {"config": "MistralConfig", "sliding_window": None, "head_dim": 32},
    "ministral": {
        "config": "MinistralConfig",
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": TWO_OF_A_KIND,
        "side_by_side": True,
    },
    "ministral 3": {
        "config": "Ministral3Config",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "qwen2": {"config": "Qwen2Config"},
    "qwen2, windows": {
        "config": "Qwen2Config",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 2,
        "side_by_side": True,
    },
    "qwen3": {"config": "Qwen3Config", "head_dim": 16},
    "qwen3, biases": {"config": "Qwen3Config", "head_dim": 32, "attention_bias": True},
    "smollm3": {
        "config": "SmolLM3Config",
        "no_rope_layers": [1, 1, 1, 0, 0, 1],
        "side_by_side": True,
    },
    "phi3": {"config": "Phi3Config"},
    "phi4-mini": {
        "config": "Phi3Config",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        "sliding_window": 8,
    },
    "granite": {
        "config": "GraniteConfig",
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 5.0,
        "logits_scaling": 3.0,
    },
    "gemma": {"config": "GemmaConfig", "head_dim": 16},
    "gemma2": {
        "config": "Gemma2Config",
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "layer_types": ALTERNATING,
        "side_by_side": True,
    },
    "gemma3": {
        "config": "Gemma3TextConfig",
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "layer_types": TWO_OF_A_KIND,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "side_by_side": True,
    },
    "glm": {"config": "GlmConfig", "head_dim": 16, "attention_bias": True},
    "glm4": {"config": "Glm4Config", "head_dim": 16, "side_by_side": True},
    "cohere": {"config": "CohereConfig", "logit_scale": 0.25},
    "cohere, norms": {"config": "CohereConfig", "use_qk_norm": True, "logit_scale": 0.25},
    "cohere2": {
        "config": "Cohere2Config",
        "sliding_window": 8,
        "layer_types": TWO_OF_A_KIND,
        "side_by_side": True,
    },
    "olmo2": {"config": "Olmo2Config", "side_by_side": True},
    "olmo3": {
        "config": "Olmo3Config",
        "sliding_window": 8,
        "layer_types": TWO_OF_A_KIND,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "side_by_side": True,
    },
    "arcee": {"config": "ArceeConfig", "hidden_act": "relu2"},
    "starcoder2": {"config": "Starcoder2Config", "sliding_window": 8},
    "pythia": {
        "config": "GPTNeoXConfig",
        "num_key_value_heads": None,
        "hidden_dropout": 0.0,
        "side_by_side": True,
    },
    "gpt-neox, sequential": {
        "config": "GPTNeoXConfig",
        "num_key_value_heads": None,
        "use_parallel_residual": False,
        "side_by_side": True,
    },
}


def options_of(case: str) -> dict[str, Any]:
    """For `make_model`."""
    options = {name: value for name, value in CASES[case].items() if name != "side_by_side"}
    return options | {"family": getattr(transformers, options.pop("config"))}


ATTENTIONS = ("self_attn", "attention", "self_attention")
FFNS = ("mlp", "feed_forward", "block_sparse_moe")


class Off:
    """Within it a module gives zeros: the layer around it adds nothing in its place."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __enter__(self) -> None:
        self._hook = self._module.register_forward_hook(self._zeros)

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    @staticmethod
    def _zeros(module: Any, given: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)


def side_by_side(
    model: Any, ids: Tensor, groups: Sequence[Sequence[int]], parallel: bool
) -> Tensor:
    """Logits of a model whose layers run in groups.

    a = x + Σ_i A_i(x)        y = a + Σ_i F_i(a)        or F_i(x), where layers are parallel
    """
    stages: list[list[str]] = []
    for group in sorted(groups):
        attentions, ffns = ([f"{kind}{layer}" for layer in group] for kind in "AF")
        stages += [attentions + ffns] if parallel else [attentions, ffns]
    return staged(model, ids, stages)


class Alone:
    """The sub-layers of a model one by one, from whole layers of its own, for some token ids.

    With the FFN switched off a layer gives x + A(x), with the attention switched off x + F(x), with
    all norms, windows and multipliers that are its own; so nothing of truedepth is used here.
    """

    @torch.no_grad()
    def __init__(self, model: Any, ids: Tensor, **inputs: Any) -> None:
        self._layers = list(model.get_decoder().base_model.layers)
        self._calls: dict[int, tuple[Any, Any]] = {}
        entered: list[Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(self._keep(index), with_kwargs=True)
            for index, layer in enumerate(self._layers)
        ]
        hooks.append(
            self._layers[0].register_forward_pre_hook(lambda _, given: entered.append(given[0]))
        )
        model(input_ids=ids, use_cache=False, **inputs)
        for hook in hooks:
            hook.remove()
        self.entered = entered[0]
        """What enters the first layer."""

    def _keep(self, index: int) -> Any:
        def hook(module: Any, given: Any, call: Any) -> None:
            self._calls[index] = given[1:], call

        return hook

    @torch.no_grad()
    def added(self, name: str, x: Tensor, gave: Tensor | None = None) -> Tensor:
        """What a sub-layer such as `F2` adds to a state, or would if its module gave this."""
        layer, (own, other) = self._found(name)
        given, call = self._calls[int(name[1:])]

        def instead(module: Any, given: Any, output: Any) -> Any:
            if gave is None:
                return output
            return (gave, *output[1:]) if isinstance(output, tuple) else gave

        hook = own.register_forward_hook(instead)
        with Off(other):
            changed: Tensor = layer(x, *given, **call)
        hook.remove()
        return changed - x

    @torch.no_grad()
    def gives(self, name: str, x: Tensor) -> Tensor:
        """What a sub-layer's module gives, before a norm behind it or a multiplier."""
        kept: list[Any] = []
        hook = self._found(name)[1][0].register_forward_hook(lambda *call: kept.append(call[-1]))
        self.added(name, x)
        hook.remove()
        return kept[0][0] if isinstance(kept[0], tuple) else kept[0]

    def _found(self, name: str) -> tuple[Any, tuple[Any, Any]]:
        """The layer of a sub-layer, its module and that of the layer's other sub-layer."""
        layer = self._layers[int(name[1:])]
        attention, ffn = (
            next(getattr(layer, each) for each in names if hasattr(layer, each))
            for names in (ATTENTIONS, FFNS)
        )
        return layer, (attention, ffn) if name[0] == "A" else (ffn, attention)


@torch.no_grad()
def staged(model: Any, ids: Tensor, stages: Sequence[Sequence[str]], **inputs: Any) -> Tensor:
    """Logits of a model whose sub-layers run in stages, y = x + Σ_s s(x); `inputs` are pictures."""
    alone = Alone(model, ids, **inputs)
    x = alone.entered
    for stage in stages:
        x = x + sum(alone.added(name, x) for name in stage)

    return _behind(model, ids, x, **inputs)


def _behind(model: Any, ids: Tensor, x: Tensor, **inputs: Any) -> Tensor:
    """Logits from the state behind the layers: they are passed by, the last of them giving x."""
    last = model.get_decoder().base_model.layers[-1]
    hook = last.register_forward_hook(lambda *_: x)
    logits: Tensor = model(input_ids=ids, use_cache=False, **inputs).logits
    hook.remove()
    return logits


WRITERS = ("o_proj", "dense", "down_proj", "dense_4h_to_h", "c_proj")
"""Last parts of the names of maps that write to the residual stream."""


def share(model: Any, rank: int, ranks: int) -> Any:
    """A copy of a model that writes what one rank would: its share of the inputs of such maps."""
    own = copy.deepcopy(model)

    def keep(weight: Tensor, dim: int) -> None:
        for other, part in enumerate(weight.chunk(ranks, dim)):
            if other != rank:
                part.zero_()

    with torch.no_grad():
        for name, module in own.get_decoder().base_model.layers.named_modules():
            experts = getattr(module, "down_proj", None)
            if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in WRITERS:
                keep(module.weight, 1)
                if module.bias is not None and rank:
                    module.bias.zero_()
            elif isinstance(experts, Tensor):  # [experts, hidden, features], transposed in Aria
                transposed = experts.shape[-1] == model.config.hidden_size
                keep(experts, 1 if transposed else 2)
    return own


@torch.no_grad()
def locally(
    model: Any, ids: Tensor, stages: Sequence[Sequence[str]], ranks: int, parallel: bool = False
) -> Tensor:
    """Logits of a model whose stages of several sub-layers, if they are lists, are local to ranks;
    those that are tuples read one state.

    Rank r goes on with x + p_r, what it has written itself; at the end of a stage y = x + Σ_r p_r.
    Of what is normed behind a sub-layer, a rank takes `1 / √ranks` of its own part, normed.
    """
    alone = Alone(model, ids)
    own = [Alone(share(model, rank, ranks), ids) for rank in range(ranks)]
    x = alone.entered
    for stage in stages:
        if len(stage) == 1 or isinstance(stage, tuple):
            x = x + sum(alone.added(name, x) for name in stage)
            continue
        gave: dict[str, Tensor] = {}
        for each in own:
            read = state = x
            for name in stage:
                if not parallel or name[0] == "A":
                    read = state
                part = each.gives(name, read)
                gave[name] = gave.get(name, 0) + part
                added, doubled = (alone.added(name, x, factor * part) for factor in (1, 2))
                is_normed = (doubled - 2 * added).abs().max() > 1e-2 * added.abs().max()
                state = state + added * (ranks**-0.5 if is_normed else 1.0)
        x = x + sum(alone.added(name, x, whole) for name, whole in gave.items())
    return _behind(model, ids, x)


def repaired(
    source: Path, plan: td.Plan, prose: Path, out: Path, learning_rate: float = 1e-3
) -> list[float]:
    """KL from the original of `out/raw`, `out/calibrated` and `out/healed`, which this writes."""
    td.convert(source, out / "raw", plan)
    text = td.Calibration(text=[prose], tokens=4096)
    td.convert(source, out / "calibrated", plan, calibration=text)
    healing = td.Healing(
        text=(TextPart(str(prose)),),
        tokens=4096,
        sequence_length=64,
        batch_size=4,
        micro_batch_size=4,
        learning_rate=learning_rate,
    )
    td.heal(out / "calibrated", out / "healed", teacher=source, healing=healing)
    found = [
        td.perplexity(out / name, against=source, text=prose, window=64, windows=16).kl
        for name in ("raw", "calibrated", "healed")
    ]
    return [kl for kl in found if kl is not None]


WITHOUT_TRUEDEPTH = """
import json, sys
sys.modules["truedepth"] = None  # importing it now fails
import torch
from transformers import AutoModelForCausalLM
ids, found = torch.load(sys.argv[1]), {}
with torch.no_grad():
    for case, path in json.loads(sys.argv[2]).items():
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
        found[case] = model(ids).logits
torch.save(found, sys.argv[3])
"""
"""Logits of checkpoints by name, where truedepth cannot be imported: ids, paths, where to."""
