"""Decoder-only models whose layers differ in width: the classes of truedepth checkpoints.

`config.layer_widths[i]` is the number of original layers that layer i runs side by side. Layer i is
the model family's own decoder layer, built from the model's config with head counts and FFN width
multiplied by that number. The rest of the model is the family's own code, so attention back ends,
caches, generation and tensor-parallel plans are those of the original.

Other layers stay as they are. `config.stages` says which of their sub-layers read the same state,
such as `["F14", "A15"]`, an FFN and the next layer's attention, and which are local to the ranks of
tensor parallelism, `{"sublayers": ["F14", "A15"], "local": 2}`; `config.side_by_side`, which layers
that cannot be merged read the same input; and `config.sublayers`, how such layers compute.

`TruedepthLlamaForCausalLM` is made from `transformers.LlamaForCausalLM` when it is first asked for,
and so for every family. In a model that takes other input too, such as
`LlavaForConditionalGeneration`, all this is said of the decoder inside, `config.text_config`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import transformers
from transformers.models.auto import configuration_auto, modeling_auto

from .forms import LayerForm, places_and_ranks
from .stages import SideBySide, merge_stages, mix_into, wrong_ranks
from .wide_layers import LayerConfig, wide_layer

PREFIX = "Truedepth"


class LayerWidthsConfig:
    """Adds to a config `layer_widths` (one integer per layer), `stages` (neighbouring sub-layers
    that end in one all-reduce), `side_by_side` (groups of layers that run on one input),
    `sublayers` (their `LayerForm`), `truedepth` (how it was made) and `simulate_ranks` (whether one
    process computes what the ranks of local stages would; an option of `from_pretrained`).
    """

    layer_widths: list[int] | None = None
    stages: list[Any] | None = None
    side_by_side: list[list[int]] | None = None
    sublayers: dict[str, Any] | None = None
    truedepth: dict[str, Any] | None = None
    simulate_ranks: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        depth = text_config(self).num_hidden_layers
        if self.layer_widths is None:
            self.layer_widths = [1] * depth
        widths = self.layer_widths
        if not isinstance(widths, list) or not all(type(w) is int and w >= 1 for w in widths):
            raise ValueError(
                f"layer_widths must be a list of integers of at least 1, not {widths!r}"
            )
        if len(widths) != depth:
            raise ValueError(
                f"layer_widths has {len(widths)} entries, but num_hidden_layers is {depth}"
            )
        for group in self.side_by_side or ():
            first, size = group[0], len(group)
            if group != list(range(first, first + size)) or first < 0 or first + size > depth:
                raise ValueError(
                    f"side_by_side must hold groups of consecutive layers, not {group}"
                )

        for stage in self.stages or ():
            places, _ = places_and_ranks(stage)
            first, size = places[0], len(places)
            if places != list(range(first, first + size)) or first < 0 or first + size > 2 * depth:
                raise ValueError(f"stages must hold neighbouring sub-layers, not {stage}")

    def validate_architecture(self) -> None:
        """Check nothing: heads need not divide the hidden size, for `head_dim` is given."""

    @property
    def per_layer_config(self) -> list[Any]:
        """One config per layer; transformers (since 5.20) sizes caches by these."""
        return [
            LayerConfig(self, width) if width > 1 else self for width in self.layer_widths or ()
        ]

    @per_layer_config.setter
    def per_layer_config(self, value: object) -> None:
        raise ValueError("per_layer_config follows from layer_widths and cannot be set")


class LayerWidthsModel:
    """Replaces layers of width 2 and more by the family's own layer, built wider, and makes the
    sub-layers of each stage in `stages`, and the layers of each group in `side_by_side`, read one
    state.
    """

    def __init__(self, config: Any) -> None:
        ranks = getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1
        text, stages = text_config(config), config.stages or ()
        local = next(filter(None, (places_and_ranks(stage)[1] for stage in stages)), ranks)
        if local != ranks and (ranks > 1 or not config.simulate_ranks):
            raise ValueError(wrong_ranks(local, ranks))
        ranks = local
        heads = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        if heads % ranks or kv_heads % ranks:  # transformers would shard within heads
            raise ValueError(
                f"{heads} heads and {kv_heads} KV heads are not divisible by {ranks}"
                f" tensor-parallel ranks; convert the original with truedepth convert --pad-heads"
                f" {ranks}"
            )
        super().__init__(config)  # type: ignore[call-arg]
        layers = self.get_decoder().base_model.layers  # type: ignore[attr-defined]
        for index, width in enumerate(config.layer_widths):
            if width > 1:
                layers[index] = wide_layer(layers[index], config, width, index)
        if stages:
            form, simulate = LayerForm(**config.sublayers), bool(config.simulate_ranks)
            merge_stages(layers, form, stages, styles_of(text), simulate)
        for group in config.side_by_side or ():
            for index in group:
                mix_into(layers[index], SideBySide, LayerForm(**config.sublayers))
            layers[group[0]].is_first, layers[group[-1]].is_last = True, True
            # a tuple, so that they do not become submodules of the last layer
            layers[group[-1]].members = tuple(layers[index] for index in group)
        self.post_init()  # type: ignore[attr-defined]

    def _get_static_cache_init_shape(self) -> Any:
        """KV heads of each layer, and head_dim; transformers before 5.20 takes layers for alike."""
        shape = super()._get_static_cache_init_shape()  # type: ignore[misc]
        config = self.config  # type: ignore[attr-defined]
        if shape is None or isinstance(shape[0], list) or max(config.layer_widths) == 1:
            return shape
        ranks = getattr(self, "_tp_size", None) or 1
        heads = [
            (getattr(each, "num_key_value_heads", None) or each.num_attention_heads) // ranks
            for each in config.per_layer_config
        ]
        return heads, shape[1]


def text_config(config: Any) -> Any:
    """The config of the decoder in a model that takes other input too; of others, their own."""
    return getattr(config, "text_config", None) or config


def styles_of(config: Any) -> dict[str, str]:
    """How transformers shards maps and parameters over ranks, by their names in a layer."""
    plan = getattr(config, "base_model_tp_plan", None) or {}
    return {name.removeprefix("layers.*."): style for name, style in plan.items()}


AUTO = {
    "AutoConfig": configuration_auto.CONFIG_MAPPING_NAMES,
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "AutoModelForMultimodalLM": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    "AutoModelForSpeechSeq2Seq": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}
"""transformers' auto classes, and the class of each that they make by `model_type`."""


def __getattr__(name: str) -> Any:
    """`Truedepth<Family>Config`, `…Model`, `…ForCausalLM` and others, made when first asked for.

    Making them ahead would import every family's model code with this file.
    """
    known = name.removeprefix(PREFIX)
    auto = next((auto for auto, table in AUTO.items() if known in table.values()), None)
    base = getattr(transformers, known, None) if auto else None
    if not name.startswith(PREFIX) or base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = _config_class(name, base) if auto == "AutoConfig" else _model_class(name, base)
    _keep_conversions(made, base)
    made.register_for_auto_class(auto)  # save_pretrained copies this file too
    globals()[name] = made
    return made


def _config_class(name: str, base: Any) -> Any:
    fields = LayerWidthsConfig.__annotations__
    body = {
        "__module__": __name__,
        "model_type": f"{PREFIX.lower()}_{base.model_type}",
        # transformers makes a config class a dataclass of the fields in its own body.
        "__annotations__": fields,
        **dict.fromkeys(fields),
    }
    return type(name, (LayerWidthsConfig, base), body)


def _model_class(name: str, base: Any) -> Any:
    config_class = getattr(sys.modules[__name__], f"{PREFIX}{base.config_class.__name__}")
    body = {"__module__": __name__, "config_class": config_class}
    return type(name, (LayerWidthsModel, base), body)


def _keep_conversions(made: Any, base: Any) -> None:
    """Let transformers join and rename weights on loading as it does those of the original.

    It looks for such rules by the type of a model and by the names of its classes.
    """
    from transformers import conversion_mapping as rules

    keys = {base.__name__: made.__name__}
    if hasattr(base, "model_type"):
        keys[base.model_type] = made.model_type
    for original, ours in keys.items():
        if found := rules.get_checkpoint_conversion_mapping(original):
            rules.register_checkpoint_conversion_mapping(ours, found, overwrite=True)


def auto_classes(model_type: str) -> dict[str, str]:
    """The names of transformers' classes for a type of model, by their auto classes."""
    found = {auto: table.get(model_type) for auto, table in AUTO.items()}
    return {auto: name for auto, name in found.items() if isinstance(name, str)}


def auto_map(classes: Mapping[str, str]) -> dict[str, str]:
    """config.json's `auto_map`: where transformers finds the classes when it runs remote code.

    Args:
        classes: Names of transformers' classes, by their auto classes.
    """
    module = __name__.rpartition(".")[2]
    return {auto: f"{module}.{PREFIX}{name}" for auto, name in classes.items()}
