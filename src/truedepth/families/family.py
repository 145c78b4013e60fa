"""What the package has to know of a model family, one small file a family.

Families are data. A decoder layer adds two things to the residual stream, attention and FFN, each
behind a norm of its own. Linear maps read the normed stream and write to it; the names of all these
are what widening needs, and docs/families.md says how to write them down.

Some layers cannot become one wide layer, because something nonlinear stands between their output
and the stream, or because they attend in different ways. They keep
their places and run side by side as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

QUERY, KEY_VALUE, FFN = "num_attention_heads", "num_key_value_heads", "intermediate_size"


@dataclass(frozen=True)
class SublayerNames:
    """Attention or FFN: `x + post_norm(module(norm(x)))`, each by its name within a layer."""

    module: str
    norm: str | None
    post_norm: str | None = None


@dataclass(frozen=True)
class Family:
    """Names of one family's tensors, as transformers calls them, and what its layers do."""

    model_type: str
    """`model_type` in config.json."""

    class_prefix: str
    """What transformers' class names begin with: `Llama` for `LlamaForCausalLM`."""

    reads: tuple[str, ...]
    """Linear maps that read the normed residual stream; they absorb their norm's gain."""

    writes: tuple[str, str]
    """Linear maps whose output goes to the residual stream, of attention and FFN."""

    heads: Mapping[str, str]
    """Linear maps whose rows (or columns, where they write) are heads -> what config.json calls the
    number of these. None where heads cannot be padded."""

    body_prefix: str = ""
    """The same of the config and the model without a head, where these have another."""

    attention: SublayerNames = SublayerNames("self_attn", "input_layernorm")
    ffn: SublayerNames = SublayerNames("mlp", "post_attention_layernorm")

    packed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Linear maps that are several in one, one under another -> what config.json calls the size of
    each: `(QUERY, KEY_VALUE, KEY_VALUE)`, counted in heads, or `(FFN, FFN)`."""

    head_norms: Mapping[str, str] = field(default_factory=dict)
    """Norms over single heads -> what config.json calls the number of these. Their gains do not
    fold: in a wide layer every head has its own."""

    gain_offset: float = 0.0
    """What is added to a norm's weight to give its gain: 1 for Gemma."""

    parallel: bool | str = False
    """Whether attention and FFN read the same state, or what the config calls that."""

    multiplier: str | None = None
    """What a layer calls the number that the outputs of its attention and FFN are multiplied by."""

    per_layer: tuple[str, ...] = ("layer_types",)
    """Lists in the config with one entry a layer. Layers that differ in one are not joined."""

    side_by_side_only: str = ""
    """Why layers of this family cannot become one wide layer, as the end of a sentence."""

    obsolete: tuple[str, ...] = ()
    """Tensors of a layer that old checkpoints carry and no current model class reads."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of names in files -> what transformers makes of them when it loads these."""

    layer: str = "model.layers.{}."
    """Prefix of the tensors of one layer."""

    outside: tuple[str, str, str] = ("model.embed_tokens", "model.norm", "lm_head")
    """Modules that belong to no layer: embedding, final norm, head."""

    @property
    def classes(self) -> tuple[str, str, str]:
        """Transformers' classes: config, model, model with a head."""
        body = self.body_prefix or self.class_prefix
        return f"{body}Config", f"{body}Model", f"{self.class_prefix}ForCausalLM"

    @property
    def sublayers(self) -> tuple[SublayerNames, SublayerNames]:
        """Attention and FFN."""
        return self.attention, self.ffn

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms that maps read, each once."""
        return tuple(dict.fromkeys(each.norm for each in self.sublayers if each.norm))

    def norm_before(self, name: str) -> str | None:
        """The norm that the map of that name, or any other part of a sublayer, reads."""
        inside = (each for each in self.sublayers if name.startswith(f"{each.module}."))
        return next(inside).norm

    def reads_behind(self, norm: str | None) -> list[str]:
        """The maps that read a norm."""
        return [name for name in self.reads if self.norm_before(name) == norm]

    @property
    def modules(self) -> tuple[str, ...]:
        """Every module of a layer that widening knows."""
        return (*self.norms, *self.reads, *self.head_norms, *self.writes)

    @property
    def layer_tensors(self) -> set[str]:
        """Every tensor that a layer may have for widening: weights and biases."""
        return {f"{module}.{part}" for module in self.modules for part in ("weight", "bias")}

    @property
    def tied(self) -> tuple[str, str]:
        """The tensor that tied embeddings leave out, and the one that stands for it."""
        return f"{self.outside[2]}.weight", f"{self.outside[0]}.weight"

    def is_parallel(self, config: Any) -> bool:
        """Whether attention and FFN of a model with that config (transformers') read one state."""
        return bool(
            getattr(config, self.parallel) if isinstance(self.parallel, str) else self.parallel
        )

    def layer_form(self, config: Any) -> dict[str, Any]:
        """What a layer computes, as config.json says it: the fields of `modeling.LayerForm`.

        Args:
            config: The model's, transformers' own.
        """
        return {
            "attention": [self.attention.module, self.attention.norm, self.attention.post_norm],
            "ffn": [self.ffn.module, self.ffn.norm, self.ffn.post_norm],
            "parallel": self.is_parallel(config),
            "multiplier": self.multiplier,
        }

    def current_name(self, tensor: str) -> str:
        """What transformers calls the tensor of that name in a file."""
        for old, new in self.renamed.items():
            if tensor.startswith(old):
                return new + tensor.removeprefix(old)
        return tensor

    def split(self, tensor: str) -> tuple[int | None, str]:
        """`model.layers.3.mlp.up_proj.weight` as `(3, "mlp.up_proj.weight")`.

        A tensor of no layer gives `(None, tensor)`.
        """
        head, tail = self.layer.split("{}")
        if tensor.startswith(head):
            index, separator, rest = tensor.removeprefix(head).partition(tail)
            if separator and index.isdecimal():
                return int(index), rest
        return None, tensor

    def why_not_wide(self, config: Any, group: Sequence[int]) -> str:
        """Why the layers of a group cannot be one wide layer, as the end of a sentence; else "".

        Args:
            config: The original's, transformers' own.
            group: Layers of the original.
        """
        if self.side_by_side_only and len(group) > 1:
            return self.side_by_side_only
        for key in self.per_layer:
            entries = getattr(config, key, None)
            if entries and len(found := dict.fromkeys(entries[layer] for layer in group)) > 1:
                said = ", ".join(map(str, found))
                return f"they differ in {key} ({said})"
        return ""


def head_dim(config: Mapping[str, Any]) -> int:
    """Of a config.json, which need not say it."""
    return int(config.get("head_dim") or config["hidden_size"] // config[QUERY])
