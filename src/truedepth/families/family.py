"""What the package needs to know about a model family.

Families are data, one small file each. A decoder layer adds two things to the residual stream,
attention and FFN, each computed from the stream after a norm. Linear maps read the normed stream
and write to the stream. Widening needs the names of all these; docs/families.md says how to write
them down.

Some layers cannot be merged into one wide layer, because something nonlinear stands between their
output and the stream, or because they attend in different ways. They stay as they are and run side
by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

QUERY, KEY_VALUE, FFN = "num_attention_heads", "num_key_value_heads", "intermediate_size"


@dataclass(frozen=True)
class SublayerNames:
    """Attention or FFN, `x + post_norm(module(norm(x)))`: the names of its parts in a layer.

    A norm that it does not have is None.
    """

    module: str
    norm: str | None
    post_norm: str | None = None


@dataclass(frozen=True)
class Family:
    """The names that transformers gives one family's tensors, and how its layers compute."""

    model_type: str
    """`model_type` in config.json."""

    class_prefix: str
    """What transformers' class names begin with: `Llama` for `LlamaForCausalLM`."""

    reads: tuple[str, ...]
    """Linear maps that read the normed residual stream; they absorb their norm's gain."""

    writes: tuple[str, ...]
    """The linear maps of attention and FFN that write to the residual stream, in this order."""

    heads: Mapping[str, str]
    """Linear maps whose rows are heads (columns, for those that write) -> the key in config.json of
    the number of these heads. Empty if heads cannot be padded."""

    summands: tuple[str, ...] | None = None
    """The modules whose outputs add up to what attention and FFN give, in mixtures the experts too;
    by default `writes`. A sub-layer that has none is not shared out over ranks in a stage."""

    is_mixture: bool = False
    """Whether some of its FFNs are mixtures of experts."""

    traced: bool = False
    """Whether all this was found by running a small model."""

    body_prefix: str = ""
    """The class prefix of the config and of the model without a head, if it is another."""

    attention: SublayerNames = SublayerNames("self_attn", "input_layernorm")
    ffn: SublayerNames = SublayerNames("mlp", "post_attention_layernorm")

    packed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Linear maps that hold several, one under another -> the key in config.json of each one's
    size: `(QUERY, KEY_VALUE, KEY_VALUE)`, counted in heads, or `(FFN, FFN)`."""

    head_norms: Mapping[str, str] = field(default_factory=dict)
    """Norms over single heads -> the key in config.json of the number of these heads. Their gains
    do not fold: in a wide layer every head has its own."""

    gain_offset: float = 0.0
    """What is added to a norm's weight to give its gain: 1 for Gemma."""

    parallel: bool | str = False
    """Whether attention and FFN read the same state, or the config's key that says so."""

    multiplier: str | None = None
    """The attribute of a layer by which it multiplies the outputs of attention and FFN, if any."""

    per_layer: tuple[str, ...] = ("layer_types",)
    """Lists in the config with one entry per layer. Layers that differ in one are not merged."""

    side_by_side_only: str = ""
    """Why layers of this family cannot be merged into one wide layer: the end of a sentence."""

    obsolete: tuple[str, ...] = ()
    """Tensors of a layer that old checkpoints hold and no current model class reads."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    """Prefixes of tensor names in files -> what transformers replaces them by on loading."""

    layer: str = "model.layers.{}."
    """Prefix of the tensors of one layer."""

    outside: tuple[str, str, str] = ("model.embed_tokens", "model.norm", "lm_head")
    """The modules outside the layers: embedding, final norm, head."""

    @property
    def classes(self) -> tuple[str, str, str]:
        """Names of transformers' classes: config, model, model with a head."""
        body = self.body_prefix or self.class_prefix
        return f"{body}Config", f"{body}Model", f"{self.class_prefix}ForCausalLM"

    @property
    def sublayers(self) -> tuple[SublayerNames, SublayerNames]:
        """Attention and FFN."""
        return self.attention, self.ffn

    def is_dense(self, name: str) -> bool:
        """Whether a tensor of a layer is not of experts that only some tokens run through, nor of
        what chooses among them.
        """
        norms = (norm for each in self.sublayers for norm in (each.norm, each.post_norm))
        dense = (*self.reads, *self.writes, *filter(None, norms))
        return not self.is_mixture or not self.part_of("ffn", name) or _within(name, dense)

    @property
    def parts_of_sums(self) -> list[list[str]]:
        """The modules whose outputs add up to what attention, and what the FFN, gives."""
        names = self.writes if self.summands is None else self.summands
        return [
            [name for name in names if self.part_of(kind, name)] for kind in ("attention", "ffn")
        ]

    def part_of(self, kind: str, name: str) -> bool:
        """Whether a module or tensor of a layer belongs to its attention or FFN, norms included.

        Args:
            kind: `attention` or `ffn`.
            name: Within the layer.
        """
        names: SublayerNames = getattr(self, kind)
        return _within(name, filter(None, (names.module, names.norm, names.post_norm)))

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms that maps read, each once."""
        return tuple(dict.fromkeys(each.norm for each in self.sublayers if each.norm))

    def norm_before(self, name: str) -> str | None:
        """The norm before a map, or before any other part of a sublayer; None if it has none."""
        inside = (each for each in self.sublayers if name.startswith(f"{each.module}."))
        return next(inside).norm

    def reads_behind(self, norm: str | None) -> list[str]:
        """The maps that read the output of a norm."""
        return [name for name in self.reads if self.norm_before(name) == norm]

    @property
    def modules(self) -> tuple[str, ...]:
        """Every module that widening knows in a layer."""
        return (*self.norms, *self.reads, *self.head_norms, *self.writes)

    @property
    def layer_tensors(self) -> set[str]:
        """Every tensor that widening accepts in a layer: weights and biases."""
        return {f"{module}.{part}" for module in self.modules for part in ("weight", "bias")}

    @property
    def tied(self) -> tuple[str, str]:
        """The head's tensor, which tied checkpoints leave out, and the embedding's in its place."""
        return f"{self.outside[2]}.weight", f"{self.outside[0]}.weight"

    def is_parallel(self, config: Any) -> bool:
        """Whether attention and FFN read the same state, by a model's transformers config."""
        return bool(
            getattr(config, self.parallel) if isinstance(self.parallel, str) else self.parallel
        )

    def layer_form(self, config: Any) -> dict[str, Any]:
        """How a layer computes, as config.json says it: the fields of `modeling.LayerForm`.

        Args:
            config: The model's transformers config.
        """
        return {
            "attention": [self.attention.module, self.attention.norm, self.attention.post_norm],
            "ffn": [self.ffn.module, self.ffn.norm, self.ffn.post_norm],
            "parallel": self.is_parallel(config),
            "multiplier": self.multiplier,
        }

    def current_name(self, tensor: str) -> str:
        """The name that transformers gives a tensor, from its name in a file."""
        for old, new in self.renamed.items():
            if tensor.startswith(old):
                return new + tensor.removeprefix(old)
        return tensor

    def split(self, tensor: str) -> tuple[int | None, str]:
        """`model.layers.3.mlp.up_proj.weight` as `(3, "mlp.up_proj.weight")`.

        A tensor outside the layers gives `(None, tensor)`.
        """
        head, tail = self.layer.split("{}")
        if tensor.startswith(head):
            index, separator, rest = tensor.removeprefix(head).partition(tail)
            if separator and index.isdecimal():
                return int(index), rest
        return None, tensor

    def why_not_wide(self, config: Any, group: Sequence[int]) -> str:
        """Why the layers of a group cannot be merged into one wide layer.

        Args:
            config: The original's transformers config.
            group: Indices of layers of the original.

        Returns:
            The end of a sentence; empty if they can be merged.
        """
        if self.side_by_side_only and len(group) > 1:
            return self.side_by_side_only
        for key in self.per_layer:
            entries = getattr(config, key, None)
            if entries and len(found := dict.fromkeys(entries[layer] for layer in group)) > 1:
                said = ", ".join(map(str, found))
                return f"they differ in {key} ({said})"
        return ""


def _within(name: str, modules: Iterable[str]) -> bool:
    """Whether a name is that of one of the modules, or of something within it."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def head_dim(config: Mapping[str, Any]) -> int:
    """The head dimension by config.json; where it is not given, hidden size / heads."""
    return int(config.get("head_dim") or config["hidden_size"] // config[QUERY])
