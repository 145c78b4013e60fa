"""What the package has to know of a model family, one small file a family.

Families are data. A decoder layer adds two things to the residual stream, attention and FFN, each
behind a norm of its own. Linear maps read the normed stream and write to it; the names of all these
are what widening needs, and docs/families.md says how to write them down.

Some layers cannot become one wide layer, because something nonlinear stands between their output
and the stream, or because they attend in different ways. They run side by side as they are: a
*branch group*.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

from truedepth.errors import TruedepthError

QUERY, KEY_VALUE, FFN = "num_attention_heads", "num_key_value_heads", "intermediate_size"


@dataclass(frozen=True)
class Sublayer:
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

    attention: Sublayer = Sublayer("self_attn", "input_layernorm")
    ffn: Sublayer = Sublayer("mlp", "post_attention_layernorm")

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

    branches_only: str = ""
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
    def sublayers(self) -> tuple[Sublayer, Sublayer]:
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

    def why_branches(self, config: Any, group: Sequence[int]) -> str:
        """Why the layers of a group cannot be one wide layer, as the end of a sentence; else "".

        Args:
            config: The original's, transformers' own.
            group: Layers of the original.
        """
        if self.branches_only and len(group) > 1:
            return self.branches_only
        for key in self.per_layer:
            entries = getattr(config, key, None)
            if entries and len(found := dict.fromkeys(entries[layer] for layer in group)) > 1:
                said = ", ".join(map(str, found))
                return f"they differ in {key} ({said})"
        return ""


@cache
def all_families() -> tuple[Family, ...]:
    """Every supported family: what the files beside this one list as `FAMILIES`."""
    files = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(
        family for file in files for family in import_module(f"{__name__}.{file}").FAMILIES
    )


def head_dim(config: Mapping[str, Any]) -> int:
    """Of a config.json, which need not say it."""
    return int(config.get("head_dim") or config["hidden_size"] // config[QUERY])


CONVERTED = "truedepth_"
"""Before the `model_type` of the original, that of a layer-parallel checkpoint."""

MIXTURES = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
)
"""What configs call the number of experts."""


def unconverted(model_type: str) -> str:
    """`llama` for `truedepth_llama`."""
    return model_type.removeprefix(CONVERTED)


def known_family(config: Mapping[str, Any]) -> Family | None:
    """The family of an original's config.json, if it is supported."""
    return {family.model_type: family for family in all_families()}.get(
        str(config.get("model_type"))
    )


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json.

    Raises:
        TruedepthError: The family is unknown, or this model of it cannot be widened exactly.
    """
    model_type = str(config.get("model_type"))
    if model_type.startswith(CONVERTED):
        raise TruedepthError(
            f"{where} is layer-parallel already; convert the model that it was made from instead."
        )
    family = known_family(config)
    if family is None:
        known = (family.model_type for family in all_families())
        if any(config.get(key) for key in MIXTURES):
            raise TruedepthError(
                f"{where} ({model_type}) is a mixture of experts: each of its layers' routers takes"
                " the best few of its own experts, which are not the best few of two layers'"
                " experts together, so pairs of such layers are no wide layer; not supported."
            )
        if isinstance(inside := config.get("text_config"), dict):
            raise TruedepthError(
                f"{where} ({model_type}) takes more than text; save its language model"
                f" ({inside.get('model_type')}) as a checkpoint of its own and convert that."
            )
        raise TruedepthError(
            f"{where} is of the family {model_type!r}, which is not supported;"
            f" supported: {', '.join(sorted(known))}."
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise TruedepthError(
            f"{where} holds quantized weights ({method or 'of an unknown method'}), which cannot be"
            " folded exactly; convert the unquantized model and quantize the result."
        )
    return family


def made_from(config: Mapping[str, Any], where: str) -> Family:
    """The family of a layer-parallel checkpoint's original; its weights may be quantized since.

    Raises:
        TruedepthError: The family is unknown.
    """
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return original_family(plain, where)


def original_family(config: Mapping[str, Any], where: str) -> Family:
    """The family of a model, or of the original of a layer-parallel checkpoint.

    Raises:
        TruedepthError: As `family_of` does.
    """
    return family_of({**config, "model_type": unconverted(str(config.get("model_type")))}, where)
