"""Decoder-only models whose layers differ in width: the classes of truedepth checkpoints.

`config.layer_widths[i]` is the number of original layers that layer i runs side by side. Layer i is
the model family's own decoder layer, built from the model's config with head counts and FFN width
multiplied by that number; the rest of the model is the family's own code, so that attention back
ends, caches, generation and tensor-parallel plans are those of the original.

`TruedepthLlamaForCausalLM` and its like are made from `transformers.LlamaForCausalLM` and its like
when they are first asked for. This file is copied into every checkpoint and imports nothing but
transformers, so that checkpoints load with `trust_remote_code=True` where truedepth is not there.
"""

from __future__ import annotations

import sys
from typing import Any

import transformers

PREFIX = "Truedepth"

WIDENED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""What of a config grows with a layer's width."""


class LayerConfig:
    """The model's config as a layer of a given width sees it.

    A live view rather than a copy: `model.set_attn_implementation(...)` after construction changes
    the model's config, and wide layers must follow.
    """

    def __init__(self, config: Any, width: int) -> None:
        self._config = config
        self._width = width

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_config", "_width"):  # copy and pickle ask early
            raise AttributeError(name)
        value = getattr(self._config, name)
        return value * self._width if name in WIDENED else value


class LayerWidthsConfig:
    """Adds `layer_widths` (one integer a layer) and `truedepth` (how it was made) to a config."""

    layer_widths: list[int] | None = None
    truedepth: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if self.layer_widths is None:
            self.layer_widths = [1] * self.num_hidden_layers  # type: ignore[attr-defined]
        widths, depth = self.layer_widths, self.num_hidden_layers  # type: ignore[attr-defined]
        if not isinstance(widths, list) or not all(type(w) is int and w >= 1 for w in widths):
            raise ValueError(
                f"layer_widths must be a list of integers of at least 1, not {widths!r}"
            )
        if len(widths) != depth:
            raise ValueError(f"layer_widths has {len(widths)} entries for {depth} hidden layers")

    def validate_architecture(self) -> None:
        """Heads need not divide the hidden size: `head_dim` is given, and heads may be padded."""

    @property
    def per_layer_config(self) -> list[Any]:
        """One config a layer; what transformers' caches size themselves by (since 5.20)."""
        return [
            LayerConfig(self, width) if width > 1 else self for width in self.layer_widths or ()
        ]

    @per_layer_config.setter
    def per_layer_config(self, value: object) -> None:
        raise ValueError("per_layer_config follows from layer_widths and cannot be set")


class LayerWidthsModel:
    """Replaces the layers that are wider than one by the family's own layer, built wider."""

    def __init__(self, config: Any) -> None:
        ranks = getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        if heads % ranks or kv_heads % ranks:  # transformers would shard within heads
            raise ValueError(
                f"{heads} heads and {kv_heads} KV heads do not divide by {ranks} tensor-parallel"
                f" ranks; convert the original with --pad-heads {ranks}"
            )
        super().__init__(config)  # type: ignore[call-arg]
        layers = self.base_model.layers  # type: ignore[attr-defined]
        for index, layer_config in enumerate(config.per_layer_config):
            if layer_config is not config:
                layers[index] = type(layers[index])(layer_config, index)
        self.post_init()  # type: ignore[attr-defined]


_AUTO_CLASSES = {
    "Config": "AutoConfig",
    "Model": "AutoModel",
    "ForCausalLM": "AutoModelForCausalLM",
}


def __getattr__(name: str) -> Any:
    """`Truedepth<Family>Config`, `…Model`, `…ForCausalLM`, made when they are first asked for.

    Made ahead, every family's model code would have to be imported with this file.
    """
    suffix = next((suffix for suffix in _AUTO_CLASSES if name.endswith(suffix)), "")
    base = getattr(transformers, name.removeprefix(PREFIX), None) if suffix else None
    if not name.startswith(PREFIX) or base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = _config_class(name, base) if suffix == "Config" else _model_class(name, base)
    made.register_for_auto_class(_AUTO_CLASSES[suffix])  # save_pretrained then saves this file too
    globals()[name] = made
    return made


def _config_class(name: str, base: Any) -> Any:
    fields = LayerWidthsConfig.__annotations__
    body = {
        "__module__": __name__,
        "model_type": f"{PREFIX.lower()}_{base.model_type}",
        # transformers makes a dataclass of a config class from the fields in its own body.
        "__annotations__": fields,
        **dict.fromkeys(fields),
    }
    return type(name, (LayerWidthsConfig, base), body)


def _model_class(name: str, base: Any) -> Any:
    config_class = getattr(sys.modules[__name__], f"{PREFIX}{base.config_class.__name__}")
    body = {"__module__": __name__, "config_class": config_class}
    return type(name, (LayerWidthsModel, base), body)


def auto_map(class_prefix: str) -> dict[str, str]:
    """config.json's `auto_map`: where transformers finds the classes when it runs remote code."""
    module = __name__.rpartition(".")[2]
    return {
        auto: f"{module}.{PREFIX}{class_prefix}{suffix}" for suffix, auto in _AUTO_CLASSES.items()
    }
